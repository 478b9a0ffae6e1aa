// Included by one file for each instruction set, after its target pragma; see attention_simd.h.
#include <cstdint>

namespace fastgpt {
namespace {

constexpr int64_t kStride = 64;

int64_t Scan(const int32_t* bits, int64_t begin, int64_t end, int32_t bound) {
  int64_t i = begin;
  for (; i + kStride <= end; i += kStride) {
    int32_t above = 0;
    for (int64_t j = 0; j < kStride; ++j) {
      const int32_t x = bits[i + j];
      above |= -static_cast<int32_t>((x ^ ((x >> 31) & 0x7fffffff)) > bound);
    }
    if (above != 0) break;
  }
  for (; i < end; ++i) {
    const int32_t x = bits[i];
    if ((x ^ ((x >> 31) & 0x7fffffff)) > bound) return i;
  }
  return end;
}

}  // namespace

using NextAbove = int64_t (*)(const int32_t* bits, int64_t begin, int64_t end, int32_t bound);

extern const NextAbove FASTGPT_NEXT_ABOVE;
const NextAbove FASTGPT_NEXT_ABOVE = Scan;

}  // namespace fastgpt

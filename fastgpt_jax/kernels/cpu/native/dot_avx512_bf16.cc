// The dot kernels with AVX512 where it also has products of pairs of bf16.
#include "dot.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,prefer-vector-width=512")
#include <immintrin.h>

#include "variant.h"

namespace fastgpt {
namespace {

#include "vector_avx512.h"
#include "dot_prepare.h"
#include "dot_tiles.h"

struct Bf16Bf16 : StepSizes<32, 64, 64> {
  using Acc = __m512;
  using Weights = __m512i;
  using Token = __m512i;
  static constexpr int kGroupsPerStep = 0;
  static INLINE Acc Zero() { return V::ZeroF(); }
  static INLINE Weights LoadWeights(const uint8_t* w, const uint16_t*) { return _mm512_loadu_si512(w); }
  static INLINE Token LoadToken(const uint8_t* x) { return _mm512_loadu_si512(x); }
  static INLINE Acc Step(Acc acc, const Weights& w, const Token& x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
};

}  // namespace

const DotKernels* DotKernelsAvx512Bf16() {
  static DotKernels kernels = [] {
    DotKernels all = *DotKernelsAvx512Vnni();
    all.kernels[static_cast<int>(DotKind::kBf16Bf16)] = MakeKernel<Bf16Bf16, 6>(PrepareBf16);
    return all;
  }();
  return &kernels;
}

}  // namespace fastgpt
#else
const fastgpt::DotKernels* fastgpt::DotKernelsAvx512Bf16() { return nullptr; }
#endif

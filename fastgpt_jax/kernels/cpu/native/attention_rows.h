// Rows of keys and values as floats, and where the rows of a block of keys lie. Included after attention_simd.h.
#include "attention.h"

namespace fastgpt {
namespace {

constexpr int kBlock = kBlockKeys;
constexpr float kNever = -__builtin_inff();
constexpr float kLog2E = 1.44269504f;

FASTGPT_INLINE int64_t Up16(int64_t n) { return (n + 15) / 16 * 16; }

FASTGPT_INLINE float FromBf16(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

FASTGPT_INLINE uint16_t ToBf16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

FASTGPT_INLINE void WidenBf16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = FromBf16(from[i]);
}

FASTGPT_INLINE void WidenS8(const int8_t* from, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]) * scale;
}

// One row of queries.
FASTGPT_INLINE void LoadQuery(const AttentionCall& call, int64_t row, float* to) {
  if (call.query_type == Number::kBf16) {
    WidenBf16(static_cast<const uint16_t*>(call.query) + row * call.H, call.H, to);
  } else {
    __builtin_memcpy(to, static_cast<const float*>(call.query) + row * call.H, call.H * sizeof(float));
  }
  for (int64_t i = call.H; i < call.Hp(); ++i) to[i] = 0;
}

// A block of keys that some query of a task sees.
struct Block {
  int64_t first;
  int num_keys;            // Up to the last that is seen, rounded up to 16.
  bool is_full;            // Every query sees all 64.
  uint64_t seen;           // By any query.
  uint64_t bits[kTileRows];  // By each.
  int64_t slots[kBlock];     // p * Z + z for keys that are seen.
};

FASTGPT_INLINE void FindSlots(const AttentionCall& call, const AttentionTask& task, Block& block) {
  const int32_t* pages = call.pages + task.first / call.T * call.M;
  for (int i = 0; i < block.num_keys;) {
    const int64_t s = block.first + i, in_page = s % call.Z;
    const int64_t page_of = s / call.Z < call.M ? s / call.Z : call.M - 1;
    int64_t page = pages[page_of];
    page = page < 0 ? 0 : page >= call.P ? call.P - 1 : page;
    const int64_t left = call.Z - in_page;
    const int end = left < block.num_keys - i ? i + static_cast<int>(left) : block.num_keys;
    for (int64_t slot = page * call.Z + in_page; i < end; ++i, ++slot) block.slots[i] = slot;
  }
}

// The first block at `first` or later, below `task.end`, in which anything is seen; false where there is none.
bool NextBlock(const AttentionCall& call, const AttentionTask& task, int64_t first, Block& block) {
  constexpr int64_t kFar = 1024;
  for (; first < task.end; first += kBlock) {
    if (first % kFar == 0 && task.end - first > kFar) {
      bool may_see = false;
      for (int64_t i = 0; i < task.num_queries && !may_see; ++i) {
        const int64_t query = task.first + i;
        may_see = call.mask.MaySee(query / call.T, query % call.T, first, first + kFar);
      }
      if (!may_see) {
        first += kFar - kBlock;
        continue;
      }
    }
    uint64_t any = 0, all = ~uint64_t{0};
    for (int64_t i = 0; i < task.num_queries; ++i) {
      const int64_t query = task.first + i;
      block.bits[i] = call.mask.Bits(query / call.T, query % call.T, first, call.S);
      any |= block.bits[i];
      all &= block.bits[i];
    }
    if (any == 0) continue;
    block.first = first;
    block.is_full = all == ~uint64_t{0};
    block.seen = any;
    block.num_keys = static_cast<int>(Up16(64 - __builtin_clzll(any)));
    FindSlots(call, task, block);
    return true;
  }
  return false;
}

// Pointers to the rows of a block in a pool, as floats: where they lie, or in `staged`, `[64, width]`. Rows that nobody
// sees are zeros, whatever the pool holds.
FASTGPT_INLINE void FindRows(const AttentionCall& call, const Block& block, const void* pool, const uint16_t* scales,
                             int64_t kv, int64_t size, int64_t width, bool in_place, float* staged, const float* zeros,
                             const float** rows) {
  for (int i = 0; i < block.num_keys; ++i) {
    const int64_t row = block.slots[i] * call.K + kv;
    if (!(block.seen >> i & 1)) {
      rows[i] = zeros;
    } else if (in_place) {
      rows[i] = static_cast<const float*>(pool) + row * size;
    } else {
      float* to = staged + i * width;
      rows[i] = to;
      if (call.pool_type == Number::kF32) {
        __builtin_memcpy(to, static_cast<const float*>(pool) + row * size, size * sizeof(float));
      } else if (call.pool_type == Number::kBf16) {
        WidenBf16(static_cast<const uint16_t*>(pool) + row * size, size, to);
      } else {
        WidenS8(static_cast<const int8_t*>(pool) + row * size, size, FromBf16(scales[row]), to);
      }
      for (int64_t d = size; d < width; ++d) to[d] = 0;
    }
  }
}

// What is added to a score, scaled and capped already, of query head n.
FASTGPT_INLINE float BiasOf(const AttentionCall& call, int64_t query, int64_t n, int64_t k) {
  const int64_t* strides = call.bias_strides;
  if (k >= call.S) return 0;
  return call.bias[query / call.T * strides[0] + query % call.T * strides[1] + n * strides[2] + k * strides[3]];
}

FASTGPT_INLINE float SlopeOf(const AttentionCall& call, int64_t query, int64_t n) {
  return call.slopes[query / call.T * call.slope_stride + n];
}

FASTGPT_INLINE V Capped(const AttentionCall& call, V products) {
  if (call.soft_cap == 0) return products * Set(call.scale);
  return Tanh(products * Set(call.scale / call.soft_cap)) * Set(call.soft_cap);
}

}  // namespace
}  // namespace fastgpt

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

// Where the rows of a block lie in a pool, for one KV head. Rows that nobody sees are zeros, whatever the pool holds.
struct Rows {
  const char* at[kBlock];
};

FASTGPT_INLINE int64_t BytesOf(Number number) {
  return number == Number::kF32 ? 4 : number == Number::kBf16 ? 2 : 1;
}

FASTGPT_INLINE void FindRows(const AttentionCall& call, const Block& block, const void* pool, int64_t kv, int64_t size,
                             const float* zeros, Rows& rows) {
  const int64_t bytes = size * BytesOf(call.pool_type);
  const char* first = static_cast<const char*>(pool) + kv * bytes;
  for (int i = 0; i < block.num_keys; ++i) rows.at[i] = first + block.slots[i] * call.K * bytes;
  if (block.is_full) return;
  for (int i = 0; i < block.num_keys; ++i) {
    if (!(block.seen >> i & 1)) rows.at[i] = reinterpret_cast<const char*>(zeros);
  }
}

// The rows as floats: where they lie, or `[64, width]` in `staged`.
FASTGPT_INLINE void AsFloats(const AttentionCall& call, const Block& block, const Rows& rows, const uint16_t* scales,
                             int64_t kv, int64_t size, int64_t width, bool in_place, float* staged,
                             const float** floats) {
  for (int i = 0; i < block.num_keys; ++i) {
    if (in_place || !(block.seen >> i & 1)) {
      floats[i] = reinterpret_cast<const float*>(rows.at[i]);
      continue;
    }
    float* to = staged + i * width;
    floats[i] = to;
    if (call.pool_type == Number::kF32) {
      __builtin_memcpy(to, rows.at[i], size * sizeof(float));
    } else if (call.pool_type == Number::kBf16) {
      WidenBf16(reinterpret_cast<const uint16_t*>(rows.at[i]), size, to);
    } else {
      WidenS8(reinterpret_cast<const int8_t*>(rows.at[i]), size, FromBf16(scales[block.slots[i] * call.K + kv]), to);
    }
    for (int64_t d = size; d < width; ++d) to[d] = 0;
  }
}

// Brings the rows of a block that is next nearer, a few lines at a time, in the order in which they lie: all heads of a
// token after each other. Reading head by head leaves gaps that no processor's own prefetching sees through (Zen 4, pages
// in order: 9 GB/s a core without, 18 with).
class Ahead {
 public:
  // `num_calls`: how often Fetch will be called.
  void Start(const AttentionCall& call, const Block& block, const void* pool, int64_t size, int64_t num_calls) {
    slot_bytes_ = call.K * size * BytesOf(call.pool_type);
    pool_ = static_cast<const char*>(pool);
    slots_ = block.slots;
    left_ = block.num_keys;
    at_ = 0;
    lines_ = static_cast<int>((block.num_keys * ((slot_bytes_ + 63) / 64) + num_calls - 1) / num_calls);
  }

  void Stop() { left_ = 0; }

  FASTGPT_INLINE void Fetch() {
    for (int64_t wanted = lines_ * 64; wanted > 0 && left_ > 0;) {
      const char* from = pool_ + *slots_ * slot_bytes_ + at_;
      const int64_t bytes = wanted < slot_bytes_ - at_ ? wanted : slot_bytes_ - at_;
#pragma GCC unroll 4
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b, 0, 2);
      wanted -= bytes;
      at_ += bytes;
      if (at_ >= slot_bytes_) {
        at_ = 0;
        ++slots_;
        --left_;
      }
    }
  }

 private:
  const char* pool_ = nullptr;
  const int64_t* slots_ = nullptr;
  int64_t slot_bytes_ = 0, at_ = 0;
  int left_ = 0, lines_ = 0;
};

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

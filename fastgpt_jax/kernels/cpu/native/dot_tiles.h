// The loops of the dot kernels, for any vector: a variant defines `V` (its vectors) and includes this file once, inside
// its anonymous namespace and under its own target pragma.
//
// `V` has: kBytes and kLanes = kBytes / 4; F and I, vectors of float32 and of int32; ZeroF(), ZeroI(); LoadF32,
// LoadBf16, LoadS8 (kLanes numbers as F); Fma(acc, a, b); Reduce4 of four F or I into four sums;
// for int8: W8 LoadW8(p), X8 LoadX8(p), I Dot8(I, W8, X8), kOffset8 (added to every weight by LoadW8);
// for int4: struct W4, LoadW4(p) (low and high nibbles plus kOffset4), Dot4(I, W4, even, odd), ScaleLanes(p): F from four
// times kBytes / 64 bf16, each in four lanes; NibblesF(p, scale, even, odd): kLanes bytes as 2 * kLanes scaled floats;
// ToF(I), LoadI, SplatBf16; NumberOf(F) and NumberOf(I): the type of a lane.

// ---- Operations: what a step along the contracted axis does ----

template <int kDepth_, int kWeightBytes_, int kTokenBytes_>
struct StepSizes {
  static constexpr int kDepth = kDepth_;              // Numbers a step.
  static constexpr int kWeightBytes = kWeightBytes_;  // Of a row a step.
  static constexpr int kTokenBytes = kTokenBytes_;    // Of a token a step.
};

struct Int8Int8 : StepSizes<V::kBytes, V::kBytes, V::kBytes> {
  using Acc = V::I;
  using Weights = V::W8;
  using Token = V::X8;
  static constexpr int kGroupsPerStep = 0;
  static INLINE Acc Zero() { return V::ZeroI(); }
  static INLINE Weights LoadWeights(const uint8_t* w, const uint16_t*) { return V::LoadW8(w); }
  static INLINE Token LoadToken(const uint8_t* x) { return V::LoadX8(x); }
  static INLINE Acc Step(Acc acc, const Weights& w, const Token& x) { return V::Dot8(acc, w, x); }
};

// A token's step is its even numbers, its odd ones, and kOffset4 times the sum of those that share a lane, negated.
struct Int4Int8 : StepSizes<2 * V::kBytes, V::kBytes, 3 * V::kBytes> {
  using Acc = V::F;
  struct Weights {
    V::W4 nibbles;
    V::F scale;
  };
  struct Token {
    V::X8 even, odd;
    V::I start;
  };
  static constexpr int kGroupsPerStep = V::kBytes / 16;
  static INLINE Acc Zero() { return V::ZeroF(); }
  static INLINE Weights LoadWeights(const uint8_t* w, const uint16_t* scale) {
    return {V::LoadW4(w), V::ScaleLanes(scale)};
  }
  static INLINE Token LoadToken(const uint8_t* x) {
    return {V::LoadX8(x), V::LoadX8(x + V::kBytes), V::LoadI(x + 2 * V::kBytes)};
  }
  static INLINE Acc Step(Acc acc, const Weights& w, const Token& x) {
    return V::Fma(acc, V::ToF(V::Dot4(x.start, w.nibbles, x.even, x.odd)), w.scale);
  }
};

template <int kBytesEach, V::F (*kLoad)(const uint8_t*)>
struct WithF32 : StepSizes<V::kLanes, V::kLanes * kBytesEach, V::kBytes> {
  using Acc = V::F;
  using Weights = V::F;
  using Token = V::F;
  static constexpr int kGroupsPerStep = 0;
  static INLINE Acc Zero() { return V::ZeroF(); }
  static INLINE Weights LoadWeights(const uint8_t* w, const uint16_t*) { return kLoad(w); }
  static INLINE Token LoadToken(const uint8_t* x) { return V::LoadF32(x); }
  static INLINE Acc Step(Acc acc, Weights w, Token x) { return V::Fma(acc, w, x); }
};
using F32F32 = WithF32<4, V::LoadF32>;
using Bf16F32 = WithF32<2, V::LoadBf16>;
using Int8F32 = WithF32<1, V::LoadS8>;

// kLanes bytes a step, which lie in one group of 32 at most where kLanes <= 16.
struct Int4F32 : StepSizes<2 * V::kLanes, V::kLanes, 2 * V::kBytes> {
  using Acc = V::F;
  struct Weights {
    V::F even, odd;
  };
  struct Token {
    V::F even, odd;
  };
  static constexpr int kGroupsPerStep = -16 / V::kLanes;  // Negative: steps a group.
  static INLINE Acc Zero() { return V::ZeroF(); }
  static INLINE Weights LoadWeights(const uint8_t* w, const uint16_t* scale) {
    Weights found;
    V::NibblesF(w, V::SplatBf16(*scale), &found.even, &found.odd);
    return found;
  }
  static INLINE Token LoadToken(const uint8_t* x) { return {V::LoadF32(x), V::LoadF32(x + V::kBytes)}; }
  static INLINE Acc Step(Acc acc, const Weights& w, const Token& x) {
    return V::Fma(V::Fma(acc, w.even, x.even), w.odd, x.odd);
  }
};

// ---- Tiles ----

constexpr int kMaxLinearTokens = 1;

// The scale of the first group of a step.
template <class Op>
INLINE const uint16_t* ScaleOf(const uint16_t* scales, int64_t step) {
  if constexpr (Op::kGroupsPerStep > 0) return scales + step * Op::kGroupsPerStep;
  if constexpr (Op::kGroupsPerStep < 0) return scales + step / -Op::kGroupsPerStep;
  return nullptr;
}

struct Rows {
  const uint8_t* weights[kRowsPerTile];
  const uint16_t* scales[kRowsPerTile];  // One for each 32 numbers.
};

struct Steps {
  int64_t begin, end;      // Whole steps.
  int64_t tail_bytes;      // Of a row behind them.
  int64_t tail_groups;     // Scales behind them.
  int64_t prefetch_bytes;  // How far ahead to ask for weights; 0 for not at all.
};

// What is left of a row behind its whole steps, and zeros.
template <class Op>
INLINE typename Op::Weights TailWeights(const Rows& rows, int r, const Steps& steps) {
  alignas(64) uint8_t bytes[Op::kWeightBytes] = {};
  uint16_t groups[Op::kGroupsPerStep > 0 ? Op::kGroupsPerStep : 1] = {};
  __builtin_memcpy(bytes, rows.weights[r] + steps.end * Op::kWeightBytes, steps.tail_bytes);
  if constexpr (Op::kGroupsPerStep != 0) {
    __builtin_memcpy(groups, ScaleOf<Op>(rows.scales[r], steps.end), steps.tail_groups * sizeof(uint16_t));
  }
  return Op::LoadWeights(bytes, groups);
}

template <class Op, int T>
INLINE void StepAll(typename Op::Acc (&acc)[T][kRowsPerTile], const typename Op::Weights (&w)[kRowsPerTile],
                    const uint8_t* x) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    const typename Op::Token token = Op::LoadToken(x + t * Op::kTokenBytes);
#pragma GCC unroll 4
    for (int r = 0; r < kRowsPerTile; ++r) acc[t][r] = Op::Step(acc[t][r], w[r], token);
  }
}

// Sums of four rows and T tokens, as 4-byte numbers [T][4]. With kAhead, asks for the weights of the next four rows.
template <class Op, int T, bool kAhead>
NOINLINE void Tile(const Rows& rows, const uint8_t* x, const Steps& steps, void* sums) {
  typename Op::Acc acc[T][kRowsPerTile];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kRowsPerTile; ++r) acc[t][r] = Op::Zero();
  }
  const uint8_t* const base = rows.weights[0];
  int64_t apart[kRowsPerTile];
  const uint16_t* scales[kRowsPerTile];
  for (int r = 0; r < kRowsPerTile; ++r) {
    apart[r] = rows.weights[r] - base;
    scales[r] = rows.scales[r];
  }
  x += steps.begin * T * Op::kTokenBytes;
  const uint8_t* here = base + steps.begin * Op::kWeightBytes;
  for (int64_t s = steps.begin; s < steps.end; ++s, x += T * Op::kTokenBytes, here += Op::kWeightBytes) {
    typename Op::Weights w[kRowsPerTile];
#pragma GCC unroll 4
    for (int r = 0; r < kRowsPerTile; ++r) {
      w[r] = Op::LoadWeights(here + apart[r], ScaleOf<Op>(scales[r], s));
      // Into the second level: asking for the first one takes the few places that loads wait in (T = 4 and 8 on Zen 4:
      // 0.6 and 0.45 of the read bandwidth so, 1.0 and 0.75 with the second).
      if (kAhead) __builtin_prefetch(here + apart[r] + steps.prefetch_bytes, 0, 2);
    }
    StepAll<Op, T>(acc, w, x);
  }
  if (steps.tail_bytes != 0) {
    typename Op::Weights w[kRowsPerTile];
    for (int r = 0; r < kRowsPerTile; ++r) w[r] = TailWeights<Op>(rows, r, steps);
    StepAll<Op, T>(acc, w, x);
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    V::Reduce4(acc[t][0], acc[t][1], acc[t][2], acc[t][3], static_cast<uint8_t*>(sums) + t * 16);
  }
}

// The same, row after row, so that memory is read in its own order, which the processor foresees by itself: what a
// single token waits for is the memory.
template <class Op, int T>
NOINLINE void LinearTile(const Rows& rows, const uint8_t* x, const Steps& steps, void* sums) {
  constexpr int kParts = T == 1 ? 4 : 2;  // Chains of sums, so that none waits for another.
  typename Op::Acc all[T][kRowsPerTile];
  const uint8_t* const first = x + steps.begin * T * Op::kTokenBytes;
#pragma GCC unroll 4
  for (int r = 0; r < kRowsPerTile; ++r) {
    typename Op::Acc acc[kParts][T];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) acc[p][t] = Op::Zero();
    }
    const uint8_t* here = rows.weights[r] + steps.begin * Op::kWeightBytes;
    const uint8_t* at = first;
    int64_t s = steps.begin;
    for (; s + kParts <= steps.end; s += kParts) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const auto w = Op::LoadWeights(here + p * Op::kWeightBytes, ScaleOf<Op>(rows.scales[r], s + p));
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          acc[p][t] = Op::Step(acc[p][t], w, Op::LoadToken(at + (p * T + t) * Op::kTokenBytes));
        }
      }
      here += kParts * Op::kWeightBytes;
      at += kParts * T * Op::kTokenBytes;
    }
    for (; s < steps.end; ++s) {
      const auto w = Op::LoadWeights(here, ScaleOf<Op>(rows.scales[r], s));
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) acc[0][t] = Op::Step(acc[0][t], w, Op::LoadToken(at + t * Op::kTokenBytes));
      here += Op::kWeightBytes;
      at += T * Op::kTokenBytes;
    }
    if (steps.tail_bytes != 0) {
      const auto w = TailWeights<Op>(rows, r, steps);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) acc[0][t] = Op::Step(acc[0][t], w, Op::LoadToken(at + t * Op::kTokenBytes));
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      all[t][r] = acc[0][t];
#pragma GCC unroll 4
      for (int p = 1; p < kParts; ++p) all[t][r] = V::Add(all[t][r], acc[p][t]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    V::Reduce4(all[t][0], all[t][1], all[t][2], all[t][3], static_cast<uint8_t*>(sums) + t * 16);
  }
}

template <class Op, int T>
INLINE void TileOf(int num_tokens, const Rows& rows, const uint8_t* x, const Steps& steps, void* sums) {
  if constexpr (T >= 1) {
    if (num_tokens == T) {
      if constexpr (T <= kMaxLinearTokens) {
        LinearTile<Op, T>(rows, x, steps, sums);
      } else if (steps.prefetch_bytes != 0) {
        Tile<Op, T, true>(rows, x, steps, sums);
      } else {
        Tile<Op, T, false>(rows, x, steps, sums);
      }
    } else {
      TileOf<Op, T - 1>(num_tokens, rows, x, steps, sums);
    }
  }
}

// ---- From sums to results ----

INLINE uint16_t ToBf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float FromBf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

typedef float F4 __attribute__((vector_size(16)));
static_assert(kRowsPerTile == 4);

// Sums become results: whole tiles four at a time, since this is what is left of short products.
template <class Number>
INLINE void Store(const DotCall& call, int64_t token, int64_t row, int num_rows, const Number* sums) {
  typedef Number N4 __attribute__((vector_size(16)));
  N4 whole;
  __builtin_memcpy(&whole, sums, sizeof whole);
  if (call.token_offset != nullptr) whole -= static_cast<Number>(call.token_offset[token]);
  F4 values = __builtin_convertvector(whole, F4);
  if (call.token_scale != nullptr) values *= call.token_scale[token];
  const int64_t at = token * call.num_rows + row;
  if (call.row_scale != nullptr) {
    F4 scales = {};
    __builtin_memcpy(&scales, call.row_scale + row, num_rows == kRowsPerTile ? sizeof scales : num_rows * 4);
    values *= scales;
  }
  if (call.is_out_bf16) {
    uint16_t* out = static_cast<uint16_t*>(call.out) + at;
    for (int r = 0; r < num_rows; ++r) out[r] = ToBf16(values[r]);
  } else {
    float* out = static_cast<float*>(call.out) + at;
    __builtin_memcpy(out, &values, num_rows == kRowsPerTile ? sizeof values : num_rows * 4);
  }
}

// Adds what earlier parts of the contracted axis came to.
template <class Number>
INLINE void AddKept(Number* sums, const Number* kept, int num_rows) {
  for (int r = 0; r < num_rows; ++r) sums[r] += kept[r];
}

// ---- A block: all its tiles, the contracted axis in parts that fit the first level of cache ----

constexpr int64_t kMaxDepthBytes = 4096;   // Of a weight row or token at a time, where there are many tokens.
constexpr int64_t kNearTokenBytes = 20480;  // Tokens that stay in the first level of cache beside four weight rows.

// Rows past the block's last one are the last one again, and what they give is not stored.
INLINE Rows FindRows(const DotCall& call, const DotBlock& block, int64_t row) {
  Rows rows;
  for (int r = 0; r < kRowsPerTile; ++r) {
    const int64_t index = row + r < block.row_end ? row + r : block.row_end - 1;
    rows.weights[r] = call.weights + index * call.weight_row_bytes;
    rows.scales[r] = block.scales == nullptr ? nullptr : block.scales + (index - block.row_begin) * block.scales_stride;
  }
  return rows;
}

template <class Op, int kMaxTokens>
void Run(const DotCall& call, const DotBlock& block) {
  using Number = decltype(V::NumberOf(Op::Zero()));
  const int64_t num_steps = (call.depth + Op::kDepth - 1) / Op::kDepth;
  const int64_t whole_steps = call.weight_row_bytes / Op::kWeightBytes;
  const int64_t num_small_groups = (call.depth + 31) / 32;
  const int64_t first_token = call.TileBegin(block.tile_begin), num_rows = block.row_end - block.row_begin;
  const int64_t num_tokens = call.TileBegin(block.tile_end) - first_token;
  const bool is_one_tile = block.tile_end - block.tile_begin == 1;
  const int64_t widest = Op::kTokenBytes > Op::kWeightBytes ? Op::kTokenBytes : Op::kWeightBytes;
  int64_t num_parts = is_one_tile ? 1 : (num_steps * widest + kMaxDepthBytes - 1) / kMaxDepthBytes;
  const bool are_tokens_near = num_tokens * call.token_bytes <= kNearTokenBytes * num_parts;

  for (int64_t part = 0; part < num_parts; ++part) {
    const bool is_first = part == 0, is_last = part == num_parts - 1;
    Steps steps;
    steps.begin = part * num_steps / num_parts;
    const int64_t end = (part + 1) * num_steps / num_parts;
    steps.end = end < whole_steps ? end : whole_steps;
    steps.tail_bytes = end > whole_steps ? call.weight_row_bytes - whole_steps * Op::kWeightBytes : 0;
    steps.tail_groups = 0;
    if constexpr (Op::kGroupsPerStep > 0) steps.tail_groups = num_small_groups - whole_steps * Op::kGroupsPerStep;
    if constexpr (Op::kGroupsPerStep < 0) steps.tail_groups = 1;

    auto one = [&](int64_t tile, int64_t row) {
      const int64_t begin = call.TileBegin(tile);
      const int size = static_cast<int>(call.TileBegin(tile + 1) - begin);
      steps.prefetch_bytes = tile == block.tile_begin ? kRowsPerTile * call.weight_row_bytes : 0;
      const Rows rows = FindRows(call, block, row);
      alignas(64) Number sums[kMaxTokens * kRowsPerTile];
      TileOf<Op, kMaxTokens>(size, rows, call.tokens + begin * call.token_bytes, steps, sums);
      const int here = row + kRowsPerTile <= block.row_end ? kRowsPerTile : static_cast<int>(block.row_end - row);
      auto* partial = reinterpret_cast<Number*>(block.partial) + (begin - first_token) * num_rows;
      for (int t = 0; t < size; ++t) {
        Number* sum = sums + t * kRowsPerTile;
        Number* kept = partial + t * num_rows + (row - block.row_begin);
        if (!is_first) AddKept(sum, kept, here);
        if (is_last) {
          Store(call, begin + t, row, here, sum);
        } else {
          for (int r = 0; r < here; ++r) kept[r] = sum[r];
        }
      }
    };
    if (are_tokens_near) {
      for (int64_t row = block.row_begin; row < block.row_end; row += kRowsPerTile) {
        for (int64_t tile = block.tile_begin; tile < block.tile_end; ++tile) one(tile, row);
      }
    } else {
      for (int64_t tile = block.tile_begin; tile < block.tile_end; ++tile) {
        for (int64_t row = block.row_begin; row < block.row_end; row += kRowsPerTile) one(tile, row);
      }
    }
  }
}

template <class Op, int kMaxTokens>
constexpr DotKernel MakeKernel(void (*prepare)(const DotCall&, int64_t, int64_t)) {
  return {kMaxTokens, Op::kDepth, Op::kTokenBytes, Op::kWeightBytes, prepare, Run<Op, kMaxTokens>};
}

// The kernels that every variant has, with so many tokens a tile; those of four bits need more registers a token.
template <int kTokens, int kTokensOfInt4>
constexpr DotKernels CommonKernels() {
  return {{
      MakeKernel<Int8Int8, kTokens>(PrepareInt8),
      MakeKernel<Int4Int8, kTokensOfInt4>(PrepareInt4),
      MakeKernel<F32F32, kTokens>(PrepareF32),
      MakeKernel<Bf16F32, kTokens>(PrepareF32),
      MakeKernel<Int8F32, kTokens>(PrepareF32),
      MakeKernel<Int4F32, kTokensOfInt4>(PrepareEvenOddF32),
      {},
  }};
}

// A few rows of queries (all heads of a KV head, of a token or two) against blocks of keys. After attention_rows.h.
//
// The one idea: the rows lie side by side in a register, 16 / rows dimensions of each, and a key's numbers are repeated
// along them straight from where they lie, so that no key is moved or transposed for the few products it enters. J keys
// share a register of scores then; `kLane<J>` says which lane is whose.

namespace fastgpt {
namespace {

// Eight rows are a register of half the width, which some processors fill with one number sooner than a whole one with
// pairs (Zen 4: 10.5 against 12.7 ns for 64 numbers); two such halves make one.
template <int J>
constexpr bool kHalves = J == 2 && kWidth >= 8;

// The lane of row r and key j of J.
template <int J>
constexpr int kLane(int r, int j) {
  return kHalves<J> ? j * 8 + r : r * J + j;
}

// Sums of J neighbouring lanes of each of kCount registers; J registers become one.
template <int J, int kBit, int kCount>
FASTGPT_INLINE void Fold(V* v) {
  if constexpr (kBit < J) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      const V a = v[2 * i], b = v[2 * i + 1];
      v[i] = Select(kLanesWith<kBit>, b, a) + Swap<kBit>(Select(kLanesWith<kBit>, a, b));
    }
    Fold<J, 2 * kBit, kCount / 2>(v);
  }
}

#if FASTGPT_WIDTH > 4
// Scores of eight rows, `query` being [H, 8].
void EightScores(const float* query, int64_t H, const float* const* rows, Ahead& ahead, int num_keys, float* scores) {
  for (int i0 = 0; i0 < num_keys; i0 += 8) {
    __m256 sums[8];
    const float* row[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      sums[i] = _mm256_setzero_ps();
      row[i] = rows[i0 + i];
    }
#pragma GCC unroll 2
    for (int64_t d = 0; d < H; ++d) {
      const __m256 q = _mm256_loadu_ps(query + d * 8);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sums[i] = _mm256_fmadd_ps(_mm256_set1_ps(row[i][d]), q, sums[i]);
    }
    ahead.Fetch();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(scores + (i0 + i) * 8, sums[i]);
  }
}
#endif

template <int J>
void FewScores(const float* query, int64_t H, const float* const* rows, Ahead& ahead, int num_keys,
               float* scores) {
#if FASTGPT_WIDTH > 4
  if constexpr (kHalves<J>) return EightScores(query, H, rows, ahead, num_keys, scores);
#endif
  constexpr int kKeys = J > 8 ? J : 8;
  for (int i0 = 0; i0 < num_keys; i0 += kKeys) {
    V sums[kKeys];
    const float* row[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      sums[i] = Set(0);
      row[i] = rows[i0 + i];
    }
    for (int64_t d = 0; d < H; d += J) {
      const V q = Load(query + d * (16 / J));
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) sums[i] = MulAdd(Repeat<J>(row[i] + d), q, sums[i]);
    }
    for (int i = 0; i < kKeys; i += 8) ahead.Fetch();
    Fold<J, 1, kKeys>(sums);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys / J; ++i) Store(scores + (i0 / J + i) * 16, sums[i]);
  }
}

// sum[r] += weights of row r times values, for kRows rows from `row` on and kVectors * 16 numbers of each.
template <int J, int kRows, int kVectors, bool kFetches>
void FewMix(const float* weights, const float* const* values, int64_t e, Ahead& ahead, int num_keys, float* sum,
            int64_t Ep) {
  V sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) sums[r][n] = Load(sum + r * Ep + n * 16);
  }
  for (int i = 0; i < num_keys; i += J) {
    const float* w = weights + i * (16 / J);
    if (kFetches && (J >= 8 || i % 8 == 0)) {
      for (int j = 0; j < J; j += 8) ahead.Fetch();
    }
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      const float* row = values[i + j] + e;
      V v[kVectors];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) v[n] = Load(row + n * 16);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V weight = Set(w[kLane<J>(r, j)]);
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sums[r][n] = MulAdd(weight, v[n], sums[r][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) Store(sum + r * Ep + n * 16, sums[r][n]);
  }
}

template <int J, int kRows>
void FewMixAll(const float* weights, const float* const* values, Ahead& ahead, int num_keys, float* sum,
               int64_t Ep) {
  constexpr int kVectors = kWidth < 16 ? 1 : kRows > 4 ? 2 : 4;
  int64_t e = 0;
  if (Ep >= kVectors * 16) {
    FewMix<J, kRows, kVectors, true>(weights, values, 0, ahead, num_keys, sum, Ep);
    e = kVectors * 16;
  }
  for (; e + kVectors * 16 <= Ep; e += kVectors * 16) {
    FewMix<J, kRows, kVectors, false>(weights, values, e, ahead, num_keys, sum + e, Ep);
  }
  for (; e < Ep; e += 16) FewMix<J, kRows, 1, false>(weights, values, e, ahead, num_keys, sum + e, Ep);
}

template <int J, int kFirst, int kRows>
void FewMixOf(int rows, const float* weights, const float* const* values, Ahead& ahead, int num_keys, float* sum,
              int64_t Ep) {
  if constexpr (kRows >= 1) {
    if (rows != kRows) return FewMixOf<J, kFirst, kRows - 1>(rows, weights, values, ahead, num_keys, sum, Ep);
    FewMixAll<J, kRows>(weights + kLane<J>(kFirst, 0), values, ahead, num_keys, sum + kFirst * Ep, Ep);
  }
}

#if FASTGPT_BF16
typedef int32_t TwoBf16 __attribute__((aligned(2), may_alias));

FASTGPT_INLINE __m256bh RepeatPair(const char* from) {
  return (__m256bh)_mm256_set1_epi32(*reinterpret_cast<const TwoBf16*>(from));
}

// Row r of eight rows of queries, `[width / 2, 8, 2]`.
FASTGPT_INLINE void PackPairs(const float* row, int64_t width, int r, uint16_t* to) {
  for (int64_t d = 0; d < width; ++d) to[d / 2 * 16 + r * 2 + d % 2] = ToBf16(row[d]);
}

void EightScoresOfPairs(const float* query, int64_t H, const char* const* rows, Ahead& ahead, int num_keys,
                        float* scores) {
  for (int i0 = 0; i0 < num_keys; i0 += 8) {
    __m256 sums[8];
    const char* row[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      sums[i] = _mm256_setzero_ps();
      row[i] = rows[i0 + i];
    }
#pragma GCC unroll 2
    for (int64_t d = 0; d < H / 2; ++d) {
      const __m256bh q = (__m256bh)_mm256_loadu_ps(query + d * 8);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sums[i] = _mm256_dpbf16_ps(sums[i], q, RepeatPair(row[i] + d * 4));
    }
    ahead.Fetch();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(scores + (i0 + i) * 8, sums[i]);
  }
}

// Weights of two keys, as bfloat16 beside each other: `[num_keys / 2, 8]` pairs.
void PairWeights(const float* weights, int num_keys, int32_t* pairs) {
  const __m256i order = _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  for (int i = 0; i < num_keys; i += 2) {
    const auto both = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights + i * 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + i * 4), _mm256_permutexvar_epi16(order, both));
  }
}

// As FewMix, of values whose rows are put together by twos. Of each 32 numbers of `sum`, the first and the second half of
// each 8 lie apart: `SortPairs` ends that, once a task.
template <int kRows>
void EightMixPairs(const int32_t* pairs, const char* const* values, int64_t e, Ahead& ahead, int num_keys, float* sum,
                   int64_t Ep) {
  __m512 sums[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = _mm512_loadu_ps(sum + r * Ep);
    sums[r][1] = _mm512_loadu_ps(sum + r * Ep + 16);
  }
  for (int i = 0; i < num_keys; i += 2) {
    if (e == 0 && i % 8 == 0) ahead.Fetch();
    const __m512i a = _mm512_loadu_si512(values[i] + e * 2), b = _mm512_loadu_si512(values[i + 1] + e * 2);
    const auto low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto weight = (__m512bh)_mm512_set1_epi32(pairs[i * 4 + r]);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], weight, low);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], weight, high);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(sum + r * Ep, sums[r][0]);
    _mm512_storeu_ps(sum + r * Ep + 16, sums[r][1]);
  }
}

template <int kRows>
void EightMixPairsOf(int rows, const int32_t* pairs, const char* const* values, Ahead& ahead, int num_keys, float* sum,
                     int64_t Ep) {
  if constexpr (kRows >= 1) {
    if (rows != kRows) return EightMixPairsOf<kRows - 1>(rows, pairs, values, ahead, num_keys, sum, Ep);
    for (int64_t e = 0; e < Ep; e += 32) EightMixPairs<kRows>(pairs, values, e, ahead, num_keys, sum + e, Ep);
  }
}

FASTGPT_INLINE void SortPairs(float* sum, int64_t Ep) {
  for (int64_t e = 0; e < Ep; e += 32) {
    const __m512 low = _mm512_loadu_ps(sum + e), high = _mm512_loadu_ps(sum + e + 16);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    _mm512_storeu_ps(sum + e, _mm512_permutex2var_ps(low, first, high));
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _mm512_storeu_ps(sum + e + 16, _mm512_permutex2var_ps(low, second, high));
  }
}
#endif

struct FewState {
  V top, total;  // Of the row of each lane; `total` is spread over the lanes of the row.
};

// Scores times `factor`, which is positive, become weights: powers of 2 below the greatest so far. Returns by what earlier
// sums shrink.
template <int J>
V FewWeights(float* scores, int num_vectors, V factor, FewState& state) {
  V top = Load(scores);
  for (int z = 1; z < num_vectors; ++z) top = Max(top, Load(scores + z * 16));
  if constexpr (kHalves<J>) {
    top = Max(top, Swap<8>(top));
  } else {
    if constexpr (J > 1) top = Max(top, Swap<1>(top));
    if constexpr (J > 2) top = Max(top, Swap<2>(top));
    if constexpr (J > 4) top = Max(top, Swap<4>(top));
    if constexpr (J > 8) top = Max(top, Swap<8>(top));
  }
  top = top * factor;
  top = Max(top, state.top);
  const V finite = Max(top, Set(-3.0e38f));  // Where nothing is seen yet.
  const V shrink = Exp2(state.top - finite), negative = Set(0) - finite;
  V total = Set(0);
  for (int z = 0; z < num_vectors; ++z) {
    const V weight = Exp2(MulAdd(Load(scores + z * 16), factor, negative));
    total = total + weight;
    Store(scores + z * 16, weight);
  }
  state.top = top;
  state.total = MulAdd(state.total, shrink, total);
  return shrink;
}

// What a lane stands for, and numbers of it.
struct FewLanes {
  int rows, heads;             // heads of the group; row r is query r / heads.
  float slope[16], query[16];  // Of alibi.
  uint32_t lanes[16];          // Of query i, for key j = 0 of J.
};

// Soft-cap, slopes and bias; returns what scores still are to be multiplied by.
template <int J>
V FewAdjust(const AttentionCall& call, const AttentionTask& task, const Block& block, int64_t kv,
            const FewLanes& lanes, float* scores) {
  const int num_vectors = block.num_keys / J;
  const bool is_plain = call.soft_cap == 0 && call.slopes == nullptr && call.bias == nullptr && call.scale > 0;
  if (!is_plain) {
    float key[16] = {};
    for (int r = 0; r < 16 / J; ++r) {
      for (int j = 0; j < J; ++j) key[kLane<J>(r, j)] = static_cast<float>(block.first + j);
    }
    for (int z = 0; z < num_vectors; ++z) {
      V x = Capped(call, Load(scores + z * 16));
      if (call.slopes != nullptr) {
        const V distance = Abs(Load(lanes.query) - (Load(key) + Set(static_cast<float>(z * J))));
        x = x - Load(lanes.slope) * distance;
      }
      if (call.bias != nullptr) {
        float bias[16] = {};
        for (int row = 0; row < lanes.rows; ++row) {
          for (int j = 0; j < J; ++j) {
            bias[kLane<J>(row, j)] = BiasOf(call, task.first + row / lanes.heads, kv * lanes.heads + row % lanes.heads,
                                            block.first + z * J + j);
          }
        }
        x = x + Load(bias);
      }
      Store(scores + z * 16, x);
    }
  }
  if (!block.is_full) {
    for (int z = 0; z < num_vectors; ++z) {
      uint32_t seen = 0;
      for (int64_t i = 0; i < task.num_queries; ++i) {
        const uint32_t keys = static_cast<uint32_t>(block.bits[i] >> (z * J)) & ((1u << J) - 1);
        seen |= (kHalves<J> ? (keys | keys << 7) & 0x101 : keys) * lanes.lanes[i];
      }
      Store(scores + z * 16, Select(seen, Load(scores + z * 16), Set(kNever)));
    }
  }
  return Set((is_plain ? call.scale : 1.0f) * kLog2E);
}

// `kPairs`: queries, keys and values are bfloat16, and meet two numbers at a time.
template <int J, bool kPairs = false>
void RunFew(const AttentionCall& call, const AttentionTask& task, const AttentionPart& part, float* scratch) {
  constexpr int P = 16 / J;
  const int64_t group = call.N / call.K, Hp = call.Hp(), Ep = call.Ep(), num_kv = task.kv1 - task.kv0;
  const int rows = static_cast<int>(task.num_queries * group);
  const bool is_f32 = call.pool_type == Number::kF32;
  const bool k_in_place = is_f32 && call.H % J == 0, v_in_place = is_f32 && call.E % 16 == 0;
  const int64_t H = k_in_place ? call.H : Hp;

  float* zeros = scratch;
  float* query = zeros + (Hp > Ep ? Hp : Ep);
  float* scores = query + num_kv * Hp * P;
  float* staged_k = scores + kBlock * P;
  float* staged_v = staged_k + kBlock * Hp;
  float* states = staged_v + kBlock * Ep;
  float* row = states + num_kv * 32;
  __builtin_memset(zeros, 0, (query - zeros) * sizeof(float));
  __builtin_memset(query, 0, num_kv * Hp * P * sizeof(float));
  __builtin_memset(part.sum, 0, num_kv * part.rows * Ep * sizeof(float));

  FewLanes lanes{rows, static_cast<int>(group), {}, {}, {}};
  for (int r = 0; r < rows; ++r) lanes.lanes[r / group] |= 1u << kLane<J>(r, 0);
  for (int64_t kv = 0; kv < num_kv; ++kv) {
    Store(states + kv * 32, Set(kNever));
    Store(states + kv * 32 + 16, Set(0));
    for (int r = 0; r < rows; ++r) {
      LoadQuery(call, (task.first + r / group) * call.N + (task.kv0 + kv) * group + r % group, row);
#if FASTGPT_BF16
      if constexpr (kPairs) {
        PackPairs(row, Hp, r, reinterpret_cast<uint16_t*>(query + kv * Hp * P));
        continue;
      }
#endif
      for (int64_t d = 0; d < Hp; ++d) {
        const int64_t at = kHalves<J> ? d * P + r : d / J * 16 + r * J + d % J;
        query[kv * Hp * P + at] = row[d];
      }
    }
  }

  Block blocks[2];
  Rows lie;
  const float *keys[kBlock], *values[kBlock];
  Ahead keys_ahead, values_ahead;
  int now = 0;
  bool is_more = NextBlock(call, task, task.begin / kBlock * kBlock, blocks[now]);
  while (is_more) {
    const Block &block = blocks[now], &next = blocks[now ^ 1];
    is_more = NextBlock(call, task, block.first + kBlock, blocks[now ^ 1]);
    keys_ahead.Stop();
    values_ahead.Stop();
    if (is_more) {
      const int64_t num_calls = num_kv * block.num_keys / 8;
      keys_ahead.Start(call, next, call.pool_k, call.H, num_calls);
      values_ahead.Start(call, next, call.pool_v, call.E, num_calls);
    }
    for (int64_t kv = 0; kv < num_kv; ++kv) {
      const int64_t head = task.kv0 + kv;
      FindRows(call, block, call.pool_k, head, call.H, zeros, lie);
#if FASTGPT_BF16
      if constexpr (kPairs) {
        EightScoresOfPairs(query + kv * Hp * P, call.H, lie.at, keys_ahead, block.num_keys, scores);
      } else
#endif
      {
        AsFloats(call, block, lie, call.scale_k, head, call.H, Hp, k_in_place, staged_k, keys);
        FewScores<J>(query + kv * Hp * P, H, keys, keys_ahead, block.num_keys, scores);
      }
      if (call.slopes != nullptr) {
        for (int r = 0; r < rows; ++r) {
          const int64_t at = task.first + r / group;
          for (int j = 0; j < J; ++j) {
            lanes.slope[kLane<J>(r, j)] = SlopeOf(call, at, head * group + r % group);
            lanes.query[kLane<J>(r, j)] = static_cast<float>(at % call.T + call.shift);
          }
        }
      }
      const V factor = FewAdjust<J>(call, task, block, head, lanes, scores);
      FewState state{Load(states + kv * 32), Load(states + kv * 32 + 16)};
      const V shrink = FewWeights<J>(scores, block.num_keys / J, factor, state);
      Store(states + kv * 32, state.top);
      Store(states + kv * 32 + 16, state.total);
      float shrinks[16];
      Store(shrinks, shrink);
      float* sum = part.sum + kv * part.rows * Ep;
      for (int r = 0; r < rows; ++r) {
        if (shrinks[kLane<J>(r, 0)] == 1) continue;
        for (int64_t e = 0; e < Ep; e += 16) Store(sum + r * Ep + e, Load(sum + r * Ep + e) * Set(shrinks[kLane<J>(r, 0)]));
      }
      FindRows(call, block, call.pool_v, head, call.E, zeros, lie);
#if FASTGPT_BF16
      if constexpr (kPairs) {
        auto* pairs = reinterpret_cast<int32_t*>(staged_k);
        PairWeights(scores, block.num_keys, pairs);
        EightMixPairsOf<8>(rows, pairs, lie.at, values_ahead, block.num_keys, sum, Ep);
        continue;
      }
#endif
      AsFloats(call, block, lie, call.scale_v, head, call.E, Ep, v_in_place, staged_v, values);
      constexpr int kMost = P < 8 ? P : 8;
      FewMixOf<J, 0, kMost>(rows < 8 ? rows : 8, scores, values, values_ahead, block.num_keys, sum, Ep);
      if constexpr (P > 8) FewMixOf<J, 8, 8>(rows - 8, scores, values, values_ahead, block.num_keys, sum, Ep);
    }
    now ^= 1;
  }
  for (int64_t kv = 0; kv < num_kv; ++kv) {
    for (int r = 0; r < rows; ++r) {
#if FASTGPT_BF16
      if constexpr (kPairs) SortPairs(part.sum + (kv * part.rows + r) * Ep, Ep);
#endif
      float total = 0;
      for (int j = 0; j < J; ++j) total += states[kv * 32 + 16 + kLane<J>(r, j)];
      part.top[kv * part.rows + r] = states[kv * 32 + kLane<J>(r, 0)];
      part.total[kv * part.rows + r] = total;
    }
  }
}

FASTGPT_INLINE int64_t FewFloats(const AttentionCall& call, const AttentionTask& task) {
  const int64_t num_kv = task.kv1 - task.kv0, Hp = call.Hp(), Ep = call.Ep();
  return (Hp > Ep ? Hp : Ep) + num_kv * Hp * 16 + kBlock * (16 + Hp + Ep) + num_kv * 32 + Hp;
}

void RunFewRows(const AttentionCall& call, const AttentionTask& task, const AttentionPart& part, float* scratch) {
  const int64_t rows = task.num_queries * (call.N / call.K);
#if FASTGPT_BF16
  const bool is_bf16 = call.pool_type == Number::kBf16 && call.query_type == Number::kBf16;
  if (is_bf16 && rows <= 8 && call.H % 2 == 0 && call.E % 32 == 0) return RunFew<2, true>(call, task, part, scratch);
#endif
  if (rows == 1) return RunFew<16>(call, task, part, scratch);
  if (rows == 2) return RunFew<8>(call, task, part, scratch);
  if (rows <= 4) return RunFew<4>(call, task, part, scratch);
  if (rows <= 8) return RunFew<2>(call, task, part, scratch);
  return RunFew<1>(call, task, part, scratch);
}

}  // namespace
}  // namespace fastgpt

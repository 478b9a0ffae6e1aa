// Many rows of queries (heads of a KV head times tokens of a chunk) against blocks of keys. After attention_rows.h.
//
// The one idea: a block of 64 keys is transposed once for all rows of the tile, so that both products are those of small
// matrices whose sums stay in registers: scores have keys along lanes, outputs numbers of the values.

namespace fastgpt {
namespace {

// Rows and vectors of sums that registers hold beside their operands.
constexpr int kTileHeight = kWidth >= 8 ? 6 : 3;
constexpr int kTileVectors = kWidth == 16 ? 4 : 1;

FASTGPT_INLINE int64_t TileRows(const AttentionCall& call, const AttentionTask& task) {
  const int64_t rows = task.num_queries * (call.N / call.K);
  return (rows + kTileHeight - 1) / kTileHeight * kTileHeight;
}

template <int kBit>
FASTGPT_INLINE void TransposeStep(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & kBit) continue;
    const V a = v[i], b = v[i + kBit];
    v[i] = Select(kLanesWith<kBit>, Swap<kBit>(b), a);
    v[i + kBit] = Select(kLanesWith<kBit>, b, Swap<kBit>(a));
  }
}

// `[width, 64]` of rows of `width` numbers, a multiple of 16.
void TransposeKeys(const float* const* rows, int num_keys, int64_t width, float* to) {
  for (int i = 0; i < num_keys; i += 16) {
    for (int64_t d = 0; d < width; d += 16) {
      V v[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) v[j] = Load(rows[i + j] + d);
      TransposeStep<1>(v);
      TransposeStep<2>(v);
      TransposeStep<4>(v);
      TransposeStep<8>(v);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) Store(to + (d + j) * kBlock + i, v[j]);
    }
  }
}

// scores[r, 64] of rows of queries `[rows, width]`, for keys from `i` on.
template <int kVectors>
void TileScores(const float* query, int64_t rows, int64_t width, const float* keys, int i, float* scores) {
  for (int64_t row = 0; row < rows; row += kTileHeight) {
    const float* q = query + row * width;
    V sums[kTileHeight][kVectors] = {};
    for (int64_t d = 0; d < width; ++d) {
      V k[kVectors];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) k[n] = Load(keys + d * kBlock + i + n * 16);
#pragma GCC unroll 6
      for (int r = 0; r < kTileHeight; ++r) {
        const V x = Set(q[r * width + d]);
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sums[r][n] = MulAdd(x, k[n], sums[r][n]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileHeight; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) Store(scores + (row + r) * kBlock + i + n * 16, sums[r][n]);
    }
  }
}

// sum[r] = shrink[r] * sum[r] + weights of row r times values, for kVectors * 16 numbers of each.
template <int kVectors>
void TileMix(const float* weights, int64_t rows, const float* shrinks, const float* const* values, int64_t e,
             int num_keys, float* sum, int64_t Ep) {
  for (int64_t row = 0; row < rows; row += kTileHeight) {
    V sums[kTileHeight][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kTileHeight; ++r) {
      const V shrink = Set(shrinks[row + r]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[r][n] = Load(sum + (row + r) * Ep + n * 16) * shrink;
    }
    const float* w = weights + row * kBlock;
    for (int i = 0; i < num_keys; ++i) {
      const float* from = values[i] + e;
      V v[kVectors];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) v[n] = Load(from + n * 16);
#pragma GCC unroll 6
      for (int r = 0; r < kTileHeight; ++r) {
        const V x = Set(w[r * kBlock + i]);
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sums[r][n] = MulAdd(x, v[n], sums[r][n]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileHeight; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) Store(sum + (row + r) * Ep + n * 16, sums[r][n]);
    }
  }
}

FASTGPT_INLINE V TileScore(const AttentionCall& call, V x, int64_t query, int64_t n, int64_t k) {
  x = Capped(call, x);
  if (call.slopes != nullptr || call.bias != nullptr) {
    float lanes[16] = {};
    if (call.slopes != nullptr) {
      for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(query % call.T + call.shift - (k + i));
      x = x - Abs(Load(lanes)) * Set(SlopeOf(call, query, n));
    }
    if (call.bias != nullptr) {
      for (int i = 0; i < 16; ++i) lanes[i] = BiasOf(call, query, n, k + i);
      x = x + Load(lanes);
    }
  }
  return x * Set(kLog2E);
}

// Scores of one row become weights; see FewWeights. `num_keys` is a multiple of 16.
FASTGPT_INLINE float TileWeights(const AttentionCall& call, const Block& block, int64_t query, uint64_t bits, int64_t n,
                                 bool is_plain, float* scores, float& top, float& total) {
  V best = Set(top);
  const V factor = Set(call.scale * kLog2E);
  for (int i = 0; i < block.num_keys; i += 16) {
    V x = Load(scores + i);
    x = is_plain ? x * factor : TileScore(call, x, query, n, block.first + i);
    x = Select(static_cast<uint32_t>(bits >> i) & 0xffff, x, Set(kNever));
    Store(scores + i, x);
    best = Max(best, x);
  }
  const float new_top = Greatest(best);
  const float finite = new_top > -3.0e38f ? new_top : -3.0e38f;
  const V base = Set(finite);
  V sum = Set(0);
  for (int i = 0; i < block.num_keys; i += 16) {
    const V weight = Exp2(Load(scores + i) - base);
    sum = sum + weight;
    Store(scores + i, weight);
  }
  float shrink = 1;
  if (new_top != top) {
    float lanes[16];
    Store(lanes, Exp2(Set(top - finite)));
    shrink = lanes[0];
  }
  top = new_top;
  total = total * shrink + Sum(sum);
  return shrink;
}

FASTGPT_INLINE int64_t TileFloats(const AttentionCall& call, const AttentionTask& task) {
  const int64_t rows = TileRows(call, task), Hp = call.Hp(), Ep = call.Ep();
  return (Hp > Ep ? Hp : Ep) + rows * (Hp + kBlock + 1) + kBlock * (2 * Hp + Ep);
}

void RunTile(const AttentionCall& call, const AttentionTask& task, const AttentionPart& part, float* scratch) {
  const int64_t group = call.N / call.K, Hp = call.Hp(), Ep = call.Ep();
  const int64_t rows = task.num_queries * group, padded = TileRows(call, task);
  const bool is_f32 = call.pool_type == Number::kF32;
  const bool k_in_place = is_f32 && call.H == Hp, v_in_place = is_f32 && call.E == Ep;
  const bool is_plain = call.soft_cap == 0 && call.slopes == nullptr && call.bias == nullptr;

  float* zeros = scratch;
  float* query = zeros + (Hp > Ep ? Hp : Ep);
  float* scores = query + padded * Hp;
  float* transposed = scores + padded * kBlock;
  float* staged_k = transposed + kBlock * Hp;
  float* staged_v = staged_k + kBlock * Hp;
  float* shrinks = staged_v + kBlock * Ep;
  __builtin_memset(zeros, 0, (query - zeros) * sizeof(float));

  Block block;
  Rows lie;
  const float *keys[kBlock], *values[kBlock];
  for (int64_t kv = task.kv0; kv < task.kv1; ++kv) {
    float* top = part.top + (kv - task.kv0) * part.rows;
    float* total = part.total + (kv - task.kv0) * part.rows;
    float* sum = part.sum + (kv - task.kv0) * part.rows * Ep;
    for (int64_t r = 0; r < rows; ++r) {
      LoadQuery(call, (task.first + r / group) * call.N + kv * group + r % group, query + r * Hp);
    }
    __builtin_memset(query + rows * Hp, 0, (padded - rows) * Hp * sizeof(float));
    __builtin_memset(scores, 0, padded * kBlock * sizeof(float));
    __builtin_memset(sum, 0, padded * Ep * sizeof(float));
    for (int64_t r = 0; r < padded; ++r) {
      top[r] = kNever;
      total[r] = 0;
      shrinks[r] = 1;
    }
    for (int64_t at = task.begin / kBlock * kBlock; NextBlock(call, task, at, block); at = block.first + kBlock) {
      FindRows(call, block, call.pool_k, kv, call.H, zeros, lie);
      AsFloats(call, block, lie, call.scale_k, kv, call.H, Hp, k_in_place, staged_k, keys);
      TransposeKeys(keys, block.num_keys, Hp, transposed);
      int i = 0;
      for (; i + kTileVectors * 16 <= block.num_keys; i += kTileVectors * 16) {
        TileScores<kTileVectors>(query, padded, Hp, transposed, i, scores);
      }
      for (; i < block.num_keys; i += 16) TileScores<1>(query, padded, Hp, transposed, i, scores);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t q = r / group;
        shrinks[r] = TileWeights(call, block, task.first + q, block.bits[q], kv * group + r % group, is_plain,
                                 scores + r * kBlock, top[r], total[r]);
      }
      FindRows(call, block, call.pool_v, kv, call.E, zeros, lie);
      AsFloats(call, block, lie, call.scale_v, kv, call.E, Ep, v_in_place, staged_v, values);
      int64_t e = 0;
      for (; e + kTileVectors * 16 <= Ep; e += kTileVectors * 16) {
        TileMix<kTileVectors>(scores, padded, shrinks, values, e, block.num_keys, sum + e, Ep);
      }
      for (; e < Ep; e += 16) TileMix<1>(scores, padded, shrinks, values, e, block.num_keys, sum + e, Ep);
    }
  }
}

}  // namespace
}  // namespace fastgpt

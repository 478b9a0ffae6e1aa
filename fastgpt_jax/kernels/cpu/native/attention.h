// Attention over pages: plain pointers and sizes, no run time of anybody's.
//
// Keys and values lie in pools `[P, Z, K, H]`; request r finds key s in page `pages[r, s / Z]` at `s % Z`. Contiguous
// views are pools of one page a request. `Plan` cuts a call into tasks; a variant of the kernels runs a task. A long
// request is cut along its keys, too, and whoever is last merges the parts by the logarithms of their sums.
#ifndef FASTGPT_KERNELS_CPU_ATTENTION_H_
#define FASTGPT_KERNELS_CPU_ATTENTION_H_

#include <cstddef>
#include <cstdint>

#include "mask.h"

namespace fastgpt {

enum class Number : int { kF32, kBf16, kS8 };

struct AttentionCall {
  // Queries and what is made of them.
  const void* query;  // [R, T, N, H]
  void* out;          // [R, T, N, E], in the numbers of the queries
  float* lse;         // [R, N, T], or null
  Number query_type;
  int64_t R, T, N, K, H, E;

  // Keys and values, and for kS8 their scales, bfloat16 [P, Z, K].
  const void* pool_k;
  const void* pool_v;
  const uint16_t* scale_k;
  const uint16_t* scale_v;
  Number pool_type;
  int64_t P, Z, M, S;        // Pages, tokens a page, pages a request, keys that may be read.
  const int32_t* pages;      // [R, M]
  const int32_t* positions;  // [R, T], or null; a query whose position lies outside [0, M * Z) is padding

  // Scores.
  Mask mask;
  float scale;
  float soft_cap;       // 0 for none
  const float* slopes;  // [N] of each request, or null: less slope * |t + shift - k|
  int64_t slope_stride, shift;
  const float* bias;  // Plus bias[r, t, n, k], or null
  int64_t bias_strides[4];
  const float* sinks;  // [N], or null

  int64_t Hp() const { return (H + 15) / 16 * 16; }
  int64_t Ep() const { return (E + 15) / 16 * 16; }
};

// Some queries of one request, or of several that have the same pages, times the KV heads [kv0, kv1), and some keys.
struct AttentionTask {
  int64_t first, num_queries;  // Flat numbers of queries, r * T + t.
  int64_t kv0, kv1;
  int64_t begin, end;  // Keys.
};

// What a task makes: for each KV head, `rows` rows (query-major, heads of the group within) of sums not yet divided.
struct AttentionPart {
  float* top;    // [kv, rows], in powers of 2
  float* total;  // [kv, rows]
  float* sum;    // [kv, rows, Ep]
  int64_t rows;
};

// Up to so many rows of one KV head stay in registers along lanes; more are tiles of a product of matrices.
inline constexpr int64_t kFewRows = 16;
inline constexpr int64_t kTileRows = 96;
inline constexpr int64_t kBlockKeys = 64;

struct AttentionKernels {
  int64_t (*scratch_bytes)(const AttentionCall&, const AttentionTask&);
  void (*run)(const AttentionCall&, const AttentionTask&, const AttentionPart&, void* scratch);
};

extern const AttentionKernels kAttentionPortable;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
extern const AttentionKernels kAttentionAvx512Bf16;
#endif

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_ATTENTION_H_

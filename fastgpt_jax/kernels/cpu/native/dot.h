// Products of activations with the rows of a weight matrix: what a call is, and what a variant of the kernels gives.
//
// The one idea: weights stay rows, as the model stores them; the activations, which are few, are copied into the order
// in which a kernel reads them. A kernel walks four weight rows and a tile of tokens along the contracted axis, a
// vector of each a step, and adds across lanes at the end.
#ifndef FASTGPT_KERNELS_CPU_DOT_H_
#define FASTGPT_KERNELS_CPU_DOT_H_

#include <stdint.h>

#include "isa.h"

namespace fastgpt {

// How weights and activations are held while they are multiplied.
enum class DotKind {
  kInt8Int8,    // s8 weights, activations rounded to s8.
  kInt4Int8,    // Two weights a byte in groups with bf16 scales, activations rounded to s8.
  kF32F32,      // Sums of float32 products from here on.
  kBf16F32,
  kInt8F32,
  kInt4F32,
  kBf16Bf16,    // Pairs of products at a time, where the processor has them.
  kNumKinds,
};

constexpr int kRowsPerTile = 4;

struct DotCall {
  DotKind kind;
  int64_t num_tokens;
  int64_t num_rows;
  int64_t depth;  // Of the contracted axis.

  const void* x;  // [num_tokens, depth]
  bool is_x_bf16;
  const uint8_t* weights;  // [num_rows, weight_row_bytes]
  int64_t weight_row_bytes;
  const float* row_scale;       // [num_rows], or null.
  const uint16_t* group_scale;  // bf16 [num_rows, num_groups], for int4.
  int64_t num_groups;
  int64_t group_size;
  void* out;  // [num_tokens, num_rows]
  bool is_out_bf16;

  // Made by the driver.
  uint8_t* tokens;        // As the kernels read them: [tile][step][token of the tile][token_step_bytes].
  int64_t token_bytes;    // Of one token, all steps.
  int64_t num_token_tiles;
  float* token_scale;     // [num_tokens], or null.
  int32_t* token_offset;  // [num_tokens]: what to take away from integer sums, or null.

  int64_t TileBegin(int64_t tile) const { return tile * num_tokens / num_token_tiles; }
};

// Part of a call that one thread does. Both ranges are of whole tiles.
struct DotBlock {
  int64_t row_begin, row_end;
  int64_t tile_begin, tile_end;
  const uint16_t* scales;  // bf16 [rows, scales_stride], one for each 32 numbers; null where the kind has none.
  int64_t scales_stride;
  float* partial;  // [tokens, rows] of 4 bytes, for sums that are not complete yet.
};

struct DotKernel {
  int max_tile_tokens;
  int depth_per_step;
  int token_step_bytes;
  int weight_step_bytes;
  // Copies or rounds the tokens of tiles [begin, end) into `tokens`; what is past the depth becomes zero.
  void (*prepare)(const DotCall& call, int64_t tile_begin, int64_t tile_end);
  void (*run)(const DotCall& call, const DotBlock& block);
};

// The kernel of one kind for the instructions in use; a null `run` where there is none.
const DotKernel& FindDotKernel(DotKind kind);

// One table a variant; null where it is not compiled.
struct DotKernels {
  DotKernel kernels[static_cast<int>(DotKind::kNumKinds)];
};
const DotKernels* DotKernelsPortable();
const DotKernels* DotKernelsNeonDot();
const DotKernels* DotKernelsAvx2();
const DotKernels* DotKernelsAvx512Vnni();
const DotKernels* DotKernelsAvx512Bf16();

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_DOT_H_

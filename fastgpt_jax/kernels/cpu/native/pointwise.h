// Norms, rotations and gates over rows: what one variant offers, as plain pointers and sizes.
#ifndef FASTGPT_KERNELS_CPU_POINTWISE_H_
#define FASTGPT_KERNELS_CPU_POINTWISE_H_

#include <stdint.h>

namespace fastgpt {

enum class Float { kF32, kBf16 };

struct Floats {
  const void* data;
  Float type;
};

struct FloatsOut {
  void* data;
  Float type;
};

// `total = x + y` where there is a `y`, then `norm = (total - mean) / (sqrt(variance + eps) + outer_eps) * weight +
// bias`; without `has_mean` the mean counts as 0. Rows of `width` numbers; statistics in float32.
struct NormArgs {
  Floats x, y, weight, bias;  // `data` is null for what there is none of; weight and bias have one type.
  FloatsOut norm, total;
  int64_t width;
  float eps, outer_eps;
  bool has_mean;
};

enum class Activation { kSilu, kGeluTanh, kGeluErf, kRelu };

// `out = activation(gate) * up`.
struct GatedArgs {
  Floats gate, up;
  FloatsOut out;
  Activation activation;
};

// Rotates pairs of the `width` numbers of each row; row r takes the cosines and sines at `table[r] * table_width`, one
// a pair or, where `table_width` is `width`, one a number.
struct RopeArgs {
  Floats x, cos, sin;  // Cosines and sines have one type.
  FloatsOut out;
  const int64_t* table;
  int64_t width, table_width;
  bool is_interleaved;
};

struct PointwiseKernels {
  void (*norm)(const NormArgs&, int64_t begin, int64_t end);    // Rows.
  void (*gated)(const GatedArgs&, int64_t begin, int64_t end);  // Numbers.
  void (*rope)(const RopeArgs&, int64_t begin, int64_t end);    // Rows.
};

const PointwiseKernels& PointwisePortable();
#if defined(__x86_64__)
const PointwiseKernels& PointwiseAvx2();
const PointwiseKernels& PointwiseAvx512();
#endif

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_POINTWISE_H_

// The kernels of `pointwise.h` in Avx2 instructions.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#pragma GCC diagnostic ignored "-Wpsabi"
#include "pointwise.h"
#include "variant.h"

namespace fastgpt {
namespace {
#include "pointwise_rows.h"
}  // namespace

const PointwiseKernels& PointwiseAvx2() { return kKernels; }

}  // namespace fastgpt
#endif

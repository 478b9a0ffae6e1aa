// The kernels of `pointwise.h` in Avx512 instructions.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#pragma GCC diagnostic ignored "-Wpsabi"
#include "pointwise.h"
#include "variant.h"

namespace fastgpt {
namespace {
#include "pointwise_rows.h"
}  // namespace

const PointwiseKernels& PointwiseAvx512() { return kKernels; }

}  // namespace fastgpt
#endif

// The kernels of `pointwise.h` for any processor.
#pragma GCC diagnostic ignored "-Wpsabi"
#include "pointwise.h"
#include "variant.h"

namespace fastgpt {
namespace {
#include "pointwise_rows.h"
}  // namespace

const PointwiseKernels& PointwisePortable() { return kKernels; }

}  // namespace fastgpt

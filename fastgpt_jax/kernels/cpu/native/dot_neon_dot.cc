// The dot kernels with ARM's products of bytes.
#include "dot.h"

#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include <arm_neon.h>

#include "variant.h"

#define FASTGPT_DOT8(acc, w, x)                                                                      \
  reinterpret_cast<I>(vdotq_s32(reinterpret_cast<int32x4_t>(acc), reinterpret_cast<int8x16_t>(w), \
                                reinterpret_cast<int8x16_t>(x)))

namespace fastgpt {
namespace {

#include "vector_portable.h"
#include "dot_prepare.h"
#include "dot_tiles.h"

}  // namespace

const DotKernels* DotKernelsNeonDot() {
  static constexpr DotKernels kernels = CommonKernels<5, 3>();
  return &kernels;
}

}  // namespace fastgpt
#else
const fastgpt::DotKernels* fastgpt::DotKernelsNeonDot() { return nullptr; }
#endif

// The dot kernels with AVX2 and FMA.
#include "dot.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "variant.h"

namespace fastgpt {
namespace {

#include "vector_avx2.h"
#include "dot_prepare.h"
#include "dot_tiles.h"

}  // namespace

const DotKernels* DotKernelsAvx2() {
  static constexpr DotKernels kernels = CommonKernels<2, 2>();
  return &kernels;
}

}  // namespace fastgpt
#else
const fastgpt::DotKernels* fastgpt::DotKernelsAvx2() { return nullptr; }
#endif

// The dot kernels with AVX512 and its byte products.
#include "dot.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#include <immintrin.h>

#include "variant.h"

namespace fastgpt {
namespace {

#include "vector_avx512.h"
#include "dot_prepare.h"
#include "dot_tiles.h"

}  // namespace

const DotKernels* DotKernelsAvx512Vnni() {
  static constexpr DotKernels kernels = CommonKernels<6, 4>();
  return &kernels;
}

}  // namespace fastgpt
#else
const fastgpt::DotKernels* fastgpt::DotKernelsAvx512Vnni() { return nullptr; }
#endif

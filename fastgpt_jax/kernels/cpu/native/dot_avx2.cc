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
  static constexpr DotKernels kernels = {{
      MakeKernel<Int8Int8, 2>(PrepareInt8),
      MakeKernel<Int4Int8, 2>(PrepareInt4),
      MakeKernel<F32F32, 2>(PrepareF32),
      MakeKernel<Bf16F32, 2>(PrepareF32),
      MakeKernel<Int8F32, 2>(PrepareF32),
      MakeKernel<Int4F32, 2>(PrepareEvenOddF32),
      {},
  }};
  return &kernels;
}

}  // namespace fastgpt
#else
const fastgpt::DotKernels* fastgpt::DotKernelsAvx2() { return nullptr; }
#endif

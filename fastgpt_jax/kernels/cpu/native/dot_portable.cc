// The dot kernels for any processor.
#include "dot.h"
#include "variant.h"

namespace fastgpt {
namespace {

#include "vector_portable.h"
#include "dot_prepare.h"
#include "dot_tiles.h"

}  // namespace

const DotKernels* DotKernelsPortable() {
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

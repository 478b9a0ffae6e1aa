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
  static constexpr DotKernels kernels = CommonKernels<2, 2>();
  return &kernels;
}

}  // namespace fastgpt

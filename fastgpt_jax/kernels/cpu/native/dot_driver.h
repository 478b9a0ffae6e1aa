// Runs a product on the threads of a pool: activations first, then blocks of rows, taken by whoever is free.
#ifndef FASTGPT_KERNELS_CPU_DOT_DRIVER_H_
#define FASTGPT_KERNELS_CPU_DOT_DRIVER_H_

#include "dot.h"
#include "parallel.h"

namespace fastgpt {

// Fills in what the driver makes of `call`, and runs it. Null, or why it cannot be run.
const char* RunDot(const Pool& pool, DotCall call);

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_DOT_DRIVER_H_

// Runs an attention call on a pool of threads; see attention.h.
#ifndef FASTGPT_KERNELS_CPU_ATTENTION_PLAN_H_
#define FASTGPT_KERNELS_CPU_ATTENTION_PLAN_H_

#include "attention.h"
#include "parallel.h"

namespace fastgpt {

// New rows of keys or values, or of their scales, for a pool of slots of `slot_bytes`.
struct NewRows {
  const void* rows;  // [R, T, slot]
  void* pool;        // [P, Z, slot]
  int64_t slot_bytes;
};

// Writes rows at `call.positions`; those of positions outside the request's pages are dropped.
void WriteRows(const AttentionCall& call, const NewRows& rows, const Pool& threads);

// Attends. A query whose position lies outside its pages is padding: it gets zeros, and nothing is read for it.
void Attend(const AttentionCall& call, const AttentionKernels& kernels, const Pool& threads);

// The kernels for the instructions in use.
const AttentionKernels& CurrentAttentionKernels();

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_ATTENTION_PLAN_H_

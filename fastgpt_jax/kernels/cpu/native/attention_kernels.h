// The kernels of one instruction set; included once by its file, which sets FASTGPT_ATTENTION_KERNELS to their name.
#include "attention_simd.h"
//
#include "attention_rows.h"
//
#include "attention_few.h"
#include "attention_tile.h"

namespace fastgpt {
namespace {

bool HasFewRows(const AttentionCall& call, const AttentionTask& task) {
  return task.num_queries * (call.N / call.K) <= kFewRows;
}

int64_t ScratchBytes(const AttentionCall& call, const AttentionTask& task) {
  return (HasFewRows(call, task) ? FewFloats(call, task) : TileFloats(call, task)) * sizeof(float);
}

void RunTask(const AttentionCall& call, const AttentionTask& task, const AttentionPart& part, void* scratch) {
  (HasFewRows(call, task) ? RunFewRows : RunTile)(call, task, part, static_cast<float*>(scratch));
}

}  // namespace

extern const AttentionKernels FASTGPT_ATTENTION_KERNELS;
const AttentionKernels FASTGPT_ATTENTION_KERNELS = {ScratchBytes, RunTask};

}  // namespace fastgpt

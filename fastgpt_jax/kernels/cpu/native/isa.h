// Which instructions kernels may use: what the processor has, or less where FASTGPT_CPU_ISA says so.
#ifndef FASTGPT_KERNELS_CPU_ISA_H_
#define FASTGPT_KERNELS_CPU_ISA_H_

namespace fastgpt {

// Each contains those before it, on one architecture.
enum class Isa { kPortable, kNeonDot, kAvx2, kAvx512Vnni, kAvx512Bf16 };

// The same at every call. Where FASTGPT_CPU_ISA names what is not here, the best that is.
Isa CurrentIsa();

const char* NameOf(Isa isa);

// Why what FASTGPT_CPU_ISA asks for cannot be; null where nothing is wrong.
const char* IsaProblem();

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_ISA_H_

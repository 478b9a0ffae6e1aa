// What every file of one variant needs: such a file includes no header with inline functions of its own, because the
// linker keeps one copy of an inline function for all files, and it might be the one with the newest instructions.
#ifndef FASTGPT_KERNELS_CPU_VARIANT_H_
#define FASTGPT_KERNELS_CPU_VARIANT_H_

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

#endif  // FASTGPT_KERNELS_CPU_VARIANT_H_

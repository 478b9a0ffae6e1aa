#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#define FASTGPT_WIDTH 8
#define FASTGPT_BF16 0
#define FASTGPT_ATTENTION_KERNELS kAttentionAvx2
#include "attention_kernels.h"
#endif

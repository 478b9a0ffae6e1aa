#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // In the headers of g++ 12.
#pragma GCC diagnostic ignored "-Wuninitialized"
#define FASTGPT_WIDTH 16
#define FASTGPT_BF16 1
#define FASTGPT_ATTENTION_KERNELS kAttentionAvx512Bf16
#include "attention_kernels.h"
#endif

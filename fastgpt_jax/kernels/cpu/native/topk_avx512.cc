#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FASTGPT_NEXT_ABOVE kNextAboveAvx512
#include "topk_scan.h"
#endif

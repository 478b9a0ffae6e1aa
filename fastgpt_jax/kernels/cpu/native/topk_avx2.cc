#if defined(__x86_64__)
#pragma GCC target("avx2")
#define FASTGPT_NEXT_ABOVE kNextAboveAvx2
#include "topk_scan.h"
#endif

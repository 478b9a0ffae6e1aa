#pragma GCC diagnostic ignored "-Wpsabi"
#define FASTGPT_WIDTH 4
#define FASTGPT_BF16 0
#define FASTGPT_ATTENTION_KERNELS kAttentionPortable
#include "attention_kernels.h"

#define FASTGPT_NEXT_ABOVE kNextAbovePortable
#include "topk_scan.h"

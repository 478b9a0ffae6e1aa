// The largest numbers of rows, as jax.lax.top_k orders them: by value, of equal ones the first; NaN above all else.
//
// The one idea: once k numbers are held, most blocks of a row hold none that is larger, and that is seen by one
// comparison a register. Floats are compared as integers that sort alike, so that NaN and the sign of 0 need no care.
#ifndef FASTGPT_KERNELS_CPU_TOPK_H_
#define FASTGPT_KERNELS_CPU_TOPK_H_

#include <cstdint>

#include "parallel.h"

namespace fastgpt {

// A number of a row: greater means earlier in the result. The integer that sorts as the float in the upper half, the
// place from the end in the lower.
using Ranked = int64_t;

// How a number ranks, as an integer; its own inverse.
inline int32_t SortableBits(int32_t bits) { return bits ^ (static_cast<int32_t>(bits >> 31) & 0x7fffffff); }

// The first number at `begin` or later, below `end`, that is above `bound` as an integer, or `end`.
using NextAbove = int64_t (*)(const int32_t* bits, int64_t begin, int64_t end, int32_t bound);

extern const NextAbove kNextAbovePortable;
#if defined(__x86_64__)
extern const NextAbove kNextAboveAvx2;
extern const NextAbove kNextAboveAvx512;
#endif

// values[r, i] and indices[r, i] for i < k, of rows [R, V]; 1 <= k <= V < 2^31.
void TopK(const float* rows, int64_t R, int64_t V, int64_t k, float* values, int32_t* indices, NextAbove next_above,
          const Pool& threads);

NextAbove CurrentNextAbove();

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_TOPK_H_

// Which keys a query sees, as the mask algebra of passes/masks.py says it: a small program in postfix order.
//
// The one idea: asked about one query and 64 keys, every rule answers in one word, so that connectives are single
// instructions and a block that nothing sees is a word of zeros. About longer ranges of keys the program answers in
// three values (some may be seen, all are), to pass over what lies far from anything visible.
#ifndef FASTGPT_KERNELS_CPU_MASK_H_
#define FASTGPT_KERNELS_CPU_MASK_H_

#include <cstdint>

namespace fastgpt {

// Words of a program: an operation and its numbers. kNoBound stands for a bound that is not there.
enum MaskOp : int64_t {
  kAll = 0,
  kNothing = 1,
  kOffset = 2,      // lo, hi: lo <= q - k <= hi
  kKeyRange = 3,    // lo, hi: lo <= k < hi
  kQueryRange = 4,  // lo, hi: lo <= q < hi
  kSegment = 5,     // query leaf, key leaf
  kKeyLength = 6,   // leaf of a number a request
  kKeyFlag = 7,     // leaf of keys
  kBlockTable = 8,  // leaf, queries a block, keys a block
  kTree = 9,        // leaf of words a query, leaf of starts, words
  kShift = 10,      // leaf of a number a request: what follows takes queries to stand this much later
  kUnshift = 11,    // leaf
  kAnd = 12,        // of how many
  kOr = 13,         // of how many
  kNot = 14,
};
inline constexpr int64_t kNoBound = INT64_MIN;

// A run-time array `[1 or requests, *sizes]`.
struct MaskLeaf {
  const int32_t* data;
  int64_t request_stride;  // 0 where all requests share it.
  int64_t sizes[2];
};

struct Mask {
  static constexpr int kMaxDepth = 32;

  const int64_t* words;
  int64_t num_words;
  const MaskLeaf* leaves;
  int64_t num_leaves;

  // Why the program cannot be run for so many queries and keys; null where it can.
  const char* Problem(int64_t num_queries, int64_t num_keys) const;

  // Bit i: whether query t of a request sees key `first + i`. Keys of `num_keys` or more are seen by nobody.
  uint64_t Bits(int64_t request, int64_t t, int64_t first, int64_t num_keys) const;

  struct Range {
    int64_t begin, end;
  };
  // Keys outside are not seen by the query.
  Range Hull(int64_t request, int64_t t, int64_t num_keys) const;

  // Whether the query may see any key of a range that is not empty.
  bool MaySee(int64_t request, int64_t t, int64_t begin, int64_t end) const;
};

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_MASK_H_

#include "mask.h"

#include <algorithm>

namespace fastgpt {
namespace {

constexpr uint64_t kEvery = ~uint64_t{0};
constexpr int64_t kFar = INT64_MAX / 4;

int NumOperands(int64_t op) {
  switch (op) {
    case kOffset: case kKeyRange: case kQueryRange: case kSegment: return 2;
    case kBlockTable: case kTree: return 3;
    case kKeyLength: case kKeyFlag: case kShift: case kUnshift: case kAnd: case kOr: return 1;
    default: return 0;
  }
}

// Bits [begin, end) of a word, whatever the bounds are.
uint64_t Ones(int64_t begin, int64_t end) {
  begin = std::clamp<int64_t>(begin, 0, 64);
  end = std::clamp<int64_t>(end, 0, 64);
  if (begin >= end) return 0;
  return (end == 64 ? kEvery : (uint64_t{1} << end) - 1) & (kEvery << begin);
}

int64_t Lower(int64_t bound) { return bound == kNoBound ? -kFar : bound; }
int64_t Upper(int64_t bound) { return bound == kNoBound ? kFar : bound; }

// Keys k with lo <= q - k <= hi.
Mask::Range OffsetRange(int64_t q, int64_t lo, int64_t hi) { return {q - Upper(hi), q - Lower(lo) + 1}; }

const int32_t* Of(const MaskLeaf& leaf, int64_t request) { return leaf.data + request * leaf.request_stride; }

// Runs a program: `atom(op, operands, q)` answers rules, with q the shifted position, the others combine answers.
template <typename Answer, typename Atom, typename AndOf, typename OrOf, typename NotOf>
Answer Run(const Mask& mask, int64_t request, int64_t t, Atom&& atom, AndOf&& and_of, OrOf&& or_of, NotOf&& not_of) {
  Answer stack[Mask::kMaxDepth];
  int depth = 0;
  int64_t q = t;
  for (int64_t i = 0; i < mask.num_words;) {
    const int64_t op = mask.words[i];
    const int64_t* operands = mask.words + i + 1;
    i += 1 + NumOperands(op);
    switch (op) {
      case kShift: q += *Of(mask.leaves[operands[0]], request); break;
      case kUnshift: q -= *Of(mask.leaves[operands[0]], request); break;
      case kAnd:
        for (int64_t n = operands[0]; n > 1; --n, --depth) stack[depth - 2] = and_of(stack[depth - 2], stack[depth - 1]);
        break;
      case kOr:
        for (int64_t n = operands[0]; n > 1; --n, --depth) stack[depth - 2] = or_of(stack[depth - 2], stack[depth - 1]);
        break;
      case kNot: stack[depth - 1] = not_of(stack[depth - 1]); break;
      default: stack[depth++] = atom(op, operands, q);
    }
  }
  return stack[0];
}

uint64_t EqualBits(const int32_t* numbers, int64_t count, int32_t wanted) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= uint64_t{numbers[i] == wanted} << i;
  return bits;
}

uint64_t TableBits(const int32_t* row, int64_t num_blocks, int64_t block_k, int64_t first) {
  uint64_t bits = 0;
  for (int64_t j = first / block_k; j < num_blocks && j * block_k < first + 64; ++j) {
    if (row[j] != 0) bits |= Ones(j * block_k - first, (j + 1) * block_k - first);
  }
  return bits;
}

// Node `start + j` of the draft is key j's bit in the words.
uint64_t TreeBits(const int32_t* words, int64_t num_words, int64_t start, int64_t first) {
  uint64_t bits = 0;
  for (int64_t w = 0; w < num_words; ++w) {
    const int64_t at = start + 32 * w - first;
    const uint64_t nodes = static_cast<uint32_t>(words[w]);
    if (at >= 0 && at < 64) bits |= nodes << at;
    if (at < 0 && at > -32) bits |= nodes >> -at;
  }
  return bits;
}

}  // namespace

const char* Mask::Problem(int64_t num_queries, int64_t num_keys) const {
  int depth = 0;
  for (int64_t i = 0; i < num_words;) {
    const int64_t op = words[i];
    const int64_t* operands = words + i + 1;
    if (op < kAll || op > kNot) return "the mask holds an unknown operation";
    i += 1 + NumOperands(op);
    if (i > num_words) return "the mask ends within an operation";
    auto fits = [&](int64_t leaf, int64_t size, int64_t width) {
      return leaf >= 0 && leaf < num_leaves && leaves[leaf].sizes[0] >= size && leaves[leaf].sizes[1] >= width;
    };
    bool known = true;
    switch (op) {
      case kSegment: known = fits(operands[0], num_queries, 1) && fits(operands[1], num_keys, 1); break;
      case kKeyLength: case kShift: case kUnshift: known = fits(operands[0], 1, 1); break;
      case kKeyFlag: known = fits(operands[0], num_keys, 1); break;
      case kBlockTable:
        known = operands[1] > 0 && operands[2] > 0 &&
                fits(operands[0], (num_queries - 1) / operands[1] + 1, (num_keys - 1) / operands[2] + 1);
        break;
      case kTree: known = operands[2] > 0 && fits(operands[0], num_queries, operands[2]) && fits(operands[1], 1, 1); break;
      case kAnd: case kOr:
        if (operands[0] < 1 || operands[0] > depth) return "the mask combines more rules than it holds";
        depth -= static_cast<int>(operands[0]) - 1;
        break;
      case kNot:
        if (depth < 1) return "the mask inverts a rule that it does not hold";
        break;
      default: break;
    }
    if (!known) return "a leaf of the mask is not there or too small";
    if (op != kShift && op != kUnshift && op < kAnd && ++depth > kMaxDepth) return "the mask is too deep";
  }
  return depth == 1 ? nullptr : "the mask must be one rule";
}

uint64_t Mask::Bits(int64_t request, int64_t t, int64_t first, int64_t num_keys) const {
  const int64_t count = std::min<int64_t>(64, num_keys - first);
  if (count <= 0) return 0;
  auto atom = [&](int64_t op, const int64_t* o, int64_t q) -> uint64_t {
    switch (op) {
      case kAll: return kEvery;
      case kOffset: {
        const Range keys = OffsetRange(q, o[0], o[1]);
        return Ones(keys.begin - first, keys.end - first);
      }
      case kKeyRange: return Ones(Lower(o[0]) - first, Upper(o[1]) - first);
      case kQueryRange: return q >= Lower(o[0]) && q < Upper(o[1]) ? kEvery : 0;
      case kSegment: return EqualBits(Of(leaves[o[1]], request) + first, count, Of(leaves[o[0]], request)[t]);
      case kKeyLength: return Ones(0, *Of(leaves[o[0]], request) - first);
      case kKeyFlag: return ~EqualBits(Of(leaves[o[0]], request) + first, count, 0);
      case kBlockTable: {
        const MaskLeaf& leaf = leaves[o[0]];
        return TableBits(Of(leaf, request) + t / o[1] * leaf.sizes[1], leaf.sizes[1], o[2], first);
      }
      case kTree: {
        const MaskLeaf& leaf = leaves[o[0]];
        return TreeBits(Of(leaf, request) + t * leaf.sizes[1], o[2], *Of(leaves[o[1]], request), first);
      }
      default: return 0;
    }
  };
  return Ones(0, count) & Run<uint64_t>(
                              *this, request, t, atom, [](uint64_t a, uint64_t b) { return a & b; },
                              [](uint64_t a, uint64_t b) { return a | b; }, [](uint64_t a) { return ~a; });
}

Mask::Range Mask::Hull(int64_t request, int64_t t, int64_t num_keys) const {
  auto atom = [&](int64_t op, const int64_t* o, int64_t q) -> Range {
    switch (op) {
      case kNothing: return {0, 0};
      case kOffset: return OffsetRange(q, o[0], o[1]);
      case kKeyRange: return {Lower(o[0]), Upper(o[1])};
      case kQueryRange: return q >= Lower(o[0]) && q < Upper(o[1]) ? Range{-kFar, kFar} : Range{0, 0};
      case kKeyLength: return {-kFar, *Of(leaves[o[0]], request)};
      case kTree: {
        const int64_t start = *Of(leaves[o[1]], request);
        return {start, start + 32 * o[2]};
      }
      default: return {-kFar, kFar};
    }
  };
  const Range hull = Run<Range>(
      *this, request, t, atom,
      [](Range a, Range b) { return Range{std::max(a.begin, b.begin), std::min(a.end, b.end)}; },
      [](Range a, Range b) {
        if (a.begin >= a.end) return b;
        if (b.begin >= b.end) return a;
        return Range{std::min(a.begin, b.begin), std::max(a.end, b.end)};
      },
      [](Range) { return Range{-kFar, kFar}; });
  const Range kept{std::max<int64_t>(hull.begin, 0), std::min(hull.end, num_keys)};
  return kept.begin < kept.end ? kept : Range{0, 0};
}

bool Mask::MaySee(int64_t request, int64_t t, int64_t begin, int64_t end) const {
  struct Answer {
    bool possible, certain;
  };
  auto of_range = [&](Range keys) -> Answer {
    return {keys.begin < end && keys.end > begin && keys.begin < keys.end, keys.begin <= begin && keys.end >= end};
  };
  auto atom = [&](int64_t op, const int64_t* o, int64_t q) -> Answer {
    switch (op) {
      case kAll: return {true, true};
      case kNothing: return {false, false};
      case kOffset: return of_range(OffsetRange(q, o[0], o[1]));
      case kKeyRange: return of_range({Lower(o[0]), Upper(o[1])});
      case kQueryRange: {
        const bool seen = q >= Lower(o[0]) && q < Upper(o[1]);
        return {seen, seen};
      }
      case kKeyLength: return of_range({-kFar, *Of(leaves[o[0]], request)});
      case kBlockTable: {
        const MaskLeaf& leaf = leaves[o[0]];
        const int32_t* row = Of(leaf, request) + t / o[1] * leaf.sizes[1];
        Answer found{false, true};
        for (int64_t j = begin / o[2]; j <= (end - 1) / o[2]; ++j) {
          const bool chosen = j < leaf.sizes[1] && row[j] != 0;
          found = {found.possible || chosen, found.certain && chosen};
        }
        return found;
      }
      case kTree: {
        const int64_t start = *Of(leaves[o[1]], request);
        return {end > start && begin < start + 32 * o[2], false};
      }
      default: return {true, false};
    }
  };
  return Run<Answer>(
             *this, request, t, atom,
             [](Answer a, Answer b) { return Answer{a.possible && b.possible, a.certain && b.certain}; },
             [](Answer a, Answer b) { return Answer{a.possible || b.possible, a.certain || b.certain}; },
             [](Answer a) { return Answer{!a.certain, !a.possible}; })
      .possible;
}

}  // namespace fastgpt

#include "topk.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kMinChunk = 16384;  // Numbers; fewer are found before a second thread has woken up.

Ranked Rank(int32_t bits, int64_t place) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(SortableBits(bits))) << 32 |
                              static_cast<uint32_t>(~place));
}

int32_t BitsOf(Ranked ranked) { return SortableBits(static_cast<int32_t>(ranked >> 32)); }

int32_t PlaceOf(Ranked ranked) { return static_cast<int32_t>(~static_cast<uint32_t>(ranked)); }

// Collects the k largest; holds more for a while, so that the rest is thrown out in batches.
class Best {
 public:
  explicit Best(int64_t k) : k_(k) { held_.reserve(2 * k + 64); }

  void Add(Ranked ranked) {
    held_.push_back(ranked);
    if (static_cast<int64_t>(held_.size()) == 2 * k_ + 64) Shrink();
  }

  // What a later number must be above, as an integer, to be among them. Equal ones come too late.
  int32_t Bound() {
    if (static_cast<int64_t>(held_.size()) >= k_ && !has_bound_) Shrink();
    return has_bound_ ? bound_ : std::numeric_limits<int32_t>::min();
  }
  bool HasBound() const { return has_bound_; }

  // The k largest, or all, the largest first.
  std::vector<Ranked>& Sorted() {
    if (static_cast<int64_t>(held_.size()) > k_) Shrink();
    std::sort(held_.begin(), held_.end(), std::greater<>());
    return held_;
  }

 private:
  void Shrink() {
    std::nth_element(held_.begin(), held_.begin() + (k_ - 1), held_.end(), std::greater<>());
    held_.resize(k_);
    bound_ = static_cast<int32_t>(held_[k_ - 1] >> 32);
    has_bound_ = true;
  }

  const int64_t k_;
  std::vector<Ranked> held_;
  int32_t bound_ = 0;
  bool has_bound_ = false;
};

void Collect(const int32_t* bits, int64_t begin, int64_t end, int64_t k, NextAbove next_above, Best& best) {
  int64_t i = begin;
  for (; i < std::min(end, begin + k); ++i) best.Add(Rank(bits[i], i));
  while (i < end) {
    const int32_t bound = best.Bound();
    i = next_above(bits, i, end, bound);
    // Neighbours of what is found are looked at one by one: the first numbers of a row are found in crowds.
    for (const int64_t stop = std::min(end, i + 64); i < stop; ++i) {
      if (SortableBits(bits[i]) > bound) best.Add(Rank(bits[i], i));
    }
  }
}

void WriteBest(const std::vector<Ranked>& sorted, int64_t k, float* values, int32_t* indices) {
  for (int64_t i = 0; i < k; ++i) {
    const int32_t bits = BitsOf(sorted[i]);
    std::memcpy(values + i, &bits, sizeof bits);
    indices[i] = PlaceOf(sorted[i]);
  }
}

}  // namespace

void TopK(const float* rows, int64_t R, int64_t V, int64_t k, float* values, int32_t* indices, NextAbove next_above,
          const Pool& threads) {
  const auto* bits = reinterpret_cast<const int32_t*>(rows);
  int64_t chunks = 1;
  if (R < threads.num_threads) {
    chunks = std::clamp<int64_t>(V / std::max(kMinChunk, 4 * k), 1, 2 * ((threads.num_threads + R - 1) / R));
  }
  std::vector<std::vector<Ranked>> found(chunks > 1 ? R * chunks : 0);
  ParallelFor(threads, R * chunks, [&](int64_t i) {
    const int64_t r = i / chunks, chunk = i % chunks;
    Best best(k);
    Collect(bits + r * V, V * chunk / chunks, V * (chunk + 1) / chunks, k, next_above, best);
    if (chunks == 1) {
      WriteBest(best.Sorted(), k, values + r * k, indices + r * k);
    } else {
      found[i] = std::move(best.Sorted());
    }
  });
  if (chunks == 1) return;
  for (int64_t r = 0; r < R; ++r) {
    Best best(k);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (const Ranked ranked : found[r * chunks + chunk]) best.Add(ranked);
    }
    WriteBest(best.Sorted(), k, values + r * k, indices + r * k);
  }
}

NextAbove CurrentNextAbove() {
#if defined(__x86_64__)
  if (CurrentIsa() >= Isa::kAvx512Vnni) return kNextAboveAvx512;
  if (CurrentIsa() >= Isa::kAvx2) return kNextAboveAvx2;
#endif
  return kNextAbovePortable;
}

}  // namespace fastgpt

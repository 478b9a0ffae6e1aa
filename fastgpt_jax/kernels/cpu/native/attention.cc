#include "attention_plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "isa.h"
#include "scratch.h"

namespace fastgpt {
namespace {

constexpr int64_t kMinSplitKeys = 256;  // Fewer cost more to merge and to hand out than they save.
constexpr int64_t kTasksAThread = 8;
constexpr float kLn2 = 0.693147181f;

thread_local Scratch scratch_buffer;
thread_local Scratch part_buffer;

// Queries [first, first + num_queries), all KV heads or one, and the parts that their keys are cut into.
struct Tile {
  AttentionTask all;  // With all keys.
  int64_t rows;       // Of a part.
  int64_t num_parts;
  int64_t part_at;  // Where its parts lie, in floats; unused for a single part.
  std::atomic<int64_t> left{0};

  int64_t num_kv() const { return all.kv1 - all.kv0; }
};

struct Plan {
  std::unique_ptr<Tile[]> tiles;
  int64_t num_tiles = 0;
  struct Task {
    int64_t tile, part;
  };
  std::vector<Task> tasks;
  std::unique_ptr<float[]> parts;
};

bool IsPadding(const AttentionCall& call, int64_t query) {
  if (call.positions == nullptr) return false;
  const int64_t position = call.positions[query];
  return position < 0 || position >= call.M * call.Z;
}

bool SharePages(const AttentionCall& call, int64_t r, int64_t other) {
  return r == other || std::memcmp(call.pages + r * call.M, call.pages + other * call.M, call.M * sizeof(int32_t)) == 0;
}

int64_t PartFloats(const AttentionCall& call, const Tile& tile) {
  return tile.num_kv() * tile.rows * (call.Ep() + 2);
}

AttentionPart PartAt(const AttentionCall& call, const Tile& tile, float* at) {
  const int64_t numbers = tile.num_kv() * tile.rows;
  // Sums come first: they are the ones that want to be aligned.
  return {at + numbers * call.Ep(), at + numbers * (call.Ep() + 1), at, tile.rows};
}

struct Stretch {
  int64_t first, num_queries, begin, end;
};

// Runs of queries that read the same pages, cut to tiles, with the keys that each may see.
std::vector<Stretch> Stretches(const AttentionCall& call) {
  const int64_t group = call.N / call.K, num_queries = call.R * call.T;
  const int64_t most = std::max<int64_t>(1, kTileRows / group);
  std::vector<Stretch> found;
  for (int64_t query = 0; query < num_queries; ++query) {
    if (IsPadding(call, query)) continue;
    const Mask::Range keys = call.mask.Hull(query / call.T, query % call.T, call.S);
    if (!found.empty()) {
      Stretch& last = found.back();
      if (last.first + last.num_queries == query && last.num_queries < most &&
          SharePages(call, last.first / call.T, query / call.T)) {
        ++last.num_queries;
        if (keys.begin < keys.end) {
          const bool was_empty = last.begin >= last.end;
          last.begin = was_empty ? keys.begin : std::min(last.begin, keys.begin);
          last.end = was_empty ? keys.end : std::max(last.end, keys.end);
        }
        continue;
      }
    }
    found.push_back({query, 1, keys.begin, keys.end});
  }
  return found;
}

Plan MakePlan(const AttentionCall& call, int64_t num_threads) {
  const int64_t group = call.N / call.K;
  const std::vector<Stretch> stretches = Stretches(call);
  int64_t cost = 0;
  for (const Stretch& s : stretches) cost += (s.end - s.begin) * s.num_queries * call.K;
  const int64_t share = num_threads > 1 ? cost / (num_threads * kTasksAThread) + 1 : std::numeric_limits<int64_t>::max();

  Plan plan;
  plan.tiles = std::make_unique<Tile[]>(stretches.size() * call.K);
  int64_t floats = 0;
  auto add = [&](const Stretch& s, int64_t kv0, int64_t kv1, int64_t rows) {
    Tile& tile = plan.tiles[plan.num_tiles];
    const int64_t begin = s.begin / kBlockKeys * kBlockKeys;
    tile.all = {s.first, s.num_queries, kv0, kv1, begin, s.end};
    tile.rows = rows;
    const int64_t keys = std::max<int64_t>(s.end - begin, 1);
    const int64_t keys_a_part = std::max(kMinSplitKeys, share / (s.num_queries * (kv1 - kv0)));
    tile.num_parts = std::max<int64_t>(1, keys / keys_a_part);
    tile.left = tile.num_parts;
    tile.part_at = floats;
    if (tile.num_parts > 1) floats += tile.num_parts * ((PartFloats(call, tile) + 15) / 16 * 16);
    for (int64_t part = 0; part < tile.num_parts; ++part) plan.tasks.push_back({plan.num_tiles, part});
    ++plan.num_tiles;
  };
  for (const Stretch& s : stretches) {
    const int64_t rows = s.num_queries * group;
    if (rows <= kFewRows) {
      // All heads at once, so that pages are read from one end to the other.
      add(s, 0, call.K, kFewRows);
    } else {
      for (int64_t kv = 0; kv < call.K; ++kv) add(s, kv, kv + 1, (rows + 15) / 16 * 16 + 16);
    }
  }
  if (floats > 0) plan.parts.reset(new float[floats]);
  auto keys_of = [&](const Plan::Task& task) {
    const Tile& tile = plan.tiles[task.tile];
    return (tile.all.end - tile.all.begin) * tile.all.num_queries * tile.num_kv() / tile.num_parts;
  };
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                   [&](const Plan::Task& a, const Plan::Task& b) { return keys_of(a) > keys_of(b); });
  return plan;
}

AttentionTask TaskOf(const Tile& tile, int64_t part) {
  AttentionTask task = tile.all;
  const int64_t blocks = (task.end - task.begin + kBlockKeys - 1) / kBlockKeys;
  auto key = [&](int64_t i) { return std::min(tile.all.end, tile.all.begin + blocks * i / tile.num_parts * kBlockKeys); };
  task.begin = key(part);
  task.end = key(part + 1);
  return task;
}

void WriteOut(const AttentionCall& call, int64_t row, const float* sum, float factor) {
  if (call.query_type == Number::kF32) {
    float* out = static_cast<float*>(call.out) + row * call.E;
    for (int64_t e = 0; e < call.E; ++e) out[e] = sum[e] * factor;
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(call.out) + row * call.E;
  for (int64_t e = 0; e < call.E; ++e) {
    const float x = sum[e] * factor;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    out[e] = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

void WriteLse(const AttentionCall& call, int64_t query, int64_t n, float top, float total) {
  if (call.lse == nullptr) return;
  const float lse = total > 0 ? (top + std::log2(total)) * kLn2 : -std::numeric_limits<float>::infinity();
  call.lse[(query / call.T * call.N + n) * call.T + query % call.T] = lse;
}

// Merges the parts of a tile and divides by the sums of weights.
void Finish(const AttentionCall& call, const Tile& tile, float* parts) {
  const int64_t group = call.N / call.K, Ep = call.Ep();
  const int64_t stride = (PartFloats(call, tile) + 15) / 16 * 16;
  for (int64_t kv = 0; kv < tile.num_kv(); ++kv) {
    for (int64_t r = 0; r < tile.all.num_queries * group; ++r) {
      const int64_t at = kv * tile.rows + r, query = tile.all.first + r / group;
      const int64_t n = (tile.all.kv0 + kv) * group + r % group;
      float top = call.sinks != nullptr ? call.sinks[n] / kLn2 : -std::numeric_limits<float>::infinity();
      const float sink = top;
      for (int64_t p = 0; p < tile.num_parts; ++p) top = std::max(top, PartAt(call, tile, parts + p * stride).top[at]);
      if (top == -std::numeric_limits<float>::infinity()) top = 0;
      float total = std::exp2(sink - top);
      float* sum = PartAt(call, tile, parts).sum + at * Ep;
      for (int64_t p = 0; p < tile.num_parts; ++p) {
        const AttentionPart part = PartAt(call, tile, parts + p * stride);
        const float weight = std::exp2(part.top[at] - top);
        total += part.total[at] * weight;
        const float* more = part.sum + at * Ep;
        if (p == 0) {
          for (int64_t e = 0; e < Ep; ++e) sum[e] *= weight;
        } else {
          for (int64_t e = 0; e < Ep; ++e) sum[e] += more[e] * weight;
        }
      }
      WriteOut(call, query * call.N + n, sum, total > 0 ? 1 / total : 0);
      WriteLse(call, query, n, top, total);
    }
  }
}

void ClearPadding(const AttentionCall& call) {
  if (call.positions == nullptr) return;
  const int64_t bytes = call.N * call.E * (call.query_type == Number::kF32 ? 4 : 2);
  for (int64_t query = 0; query < call.R * call.T; ++query) {
    if (!IsPadding(call, query)) continue;
    std::memset(static_cast<char*>(call.out) + query * bytes, 0, bytes);
    for (int64_t n = 0; n < call.N; ++n) WriteLse(call, query, n, 0, 0);
  }
}

}  // namespace

void WriteRows(const AttentionCall& call, const NewRows& rows, const Pool& threads) {
  constexpr int64_t kChunkBytes = 1 << 18;
  const int64_t num_rows = call.R * call.T, chunk = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, rows.slot_bytes));
  ParallelFor(threads, (num_rows + chunk - 1) / chunk, [&](int64_t i) {
    for (int64_t row = i * chunk; row < std::min(num_rows, (i + 1) * chunk); ++row) {
      if (IsPadding(call, row)) continue;
      const int64_t position = call.positions[row];
      const int64_t page = call.pages[row / call.T * call.M + position / call.Z];
      if (page < 0 || page >= call.P) continue;
      std::memcpy(static_cast<char*>(rows.pool) + (page * call.Z + position % call.Z) * rows.slot_bytes,
                  static_cast<const char*>(rows.rows) + row * rows.slot_bytes, rows.slot_bytes);
    }
  });
}

void Attend(const AttentionCall& call, const AttentionKernels& kernels, const Pool& threads) {
  ClearPadding(call);
  Plan plan = MakePlan(call, threads.num_threads);
  ParallelFor(threads, static_cast<int64_t>(plan.tasks.size()), [&](int64_t i) {
    const Plan::Task& task = plan.tasks[i];
    Tile& tile = plan.tiles[task.tile];
    const AttentionTask keys = TaskOf(tile, task.part);
    const int64_t floats = (PartFloats(call, tile) + 15) / 16 * 16;
    float* parts = tile.num_parts > 1 ? plan.parts.get() + tile.part_at
                                      : reinterpret_cast<float*>(part_buffer.Get(floats * sizeof(float)));
    void* scratch = scratch_buffer.Get(kernels.scratch_bytes(call, keys));
    kernels.run(call, keys, PartAt(call, tile, parts + task.part * floats), scratch);
    if (tile.left.fetch_sub(1, std::memory_order_acq_rel) == 1) Finish(call, tile, parts);
  });
}

const AttentionKernels& CurrentAttentionKernels() {
#if defined(__x86_64__)
  if (CurrentIsa() >= Isa::kAvx512Bf16) return kAttentionAvx512Bf16;
  if (CurrentIsa() >= Isa::kAvx512Vnni) return kAttentionAvx512;
  if (CurrentIsa() >= Isa::kAvx2) return kAttentionAvx2;
#endif
  return kAttentionPortable;
}

}  // namespace fastgpt

#include "dot_driver.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"

namespace fastgpt {
namespace {

constexpr int64_t kLine = 64;
// Weights of a block where they are read once: small, so that threads end together.
constexpr int64_t kStreamedBlockBytes = 96 << 10;
// Rows of a block where they are read once for each tile of tokens: they stay in the second level of cache.
constexpr int64_t kCachedBlockBytes = 192 << 10;
constexpr int64_t kMaxTokensPerBlock = 512;
// Below this many numbers the activations are prepared by the caller alone.
constexpr int64_t kPreparedAlone = 16 << 10;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

const DotKernels* KernelsOf(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return DotKernelsAvx512Bf16();
    case Isa::kAvx512Vnni: return DotKernelsAvx512Vnni();
    case Isa::kAvx2: return DotKernelsAvx2();
    case Isa::kNeonDot: return DotKernelsNeonDot();
    case Isa::kPortable: break;
  }
  return DotKernelsPortable();
}

// Scales of groups of any size, written out for each 32 numbers.
void ExpandScales(const DotCall& call, int64_t row_begin, int64_t row_end, int64_t stride, uint16_t* to) {
  const int64_t repeats = call.group_size / 32;
  for (int64_t row = row_begin; row < row_end; ++row, to += stride) {
    const uint16_t* from = call.group_scale + row * call.num_groups;
    uint16_t* at = to;
    for (int64_t g = 0; g < call.num_groups; ++g) {
      for (int64_t i = 0; i < repeats && at < to + stride; ++i) *at++ = from[g];
    }
  }
}

}  // namespace

const DotKernel& FindDotKernel(DotKind kind) { return KernelsOf(CurrentIsa())->kernels[static_cast<int>(kind)]; }

const char* RunDot(const Pool& pool, DotCall call) {
  const DotKernel& kernel = FindDotKernel(call.kind);
  if (kernel.run == nullptr) return "no kernel for this kind of product on this processor";
  if (call.num_tokens == 0 || call.num_rows == 0) return nullptr;

  call.token_bytes = CeilDiv(call.depth, kernel.depth_per_step) * kernel.token_step_bytes;
  call.num_token_tiles = CeilDiv(call.num_tokens, kernel.max_tile_tokens);
  thread_local Scratch shared;
  const int64_t tokens_bytes = RoundUp(call.num_tokens * call.token_bytes, kLine);
  const int64_t numbers_bytes = RoundUp(call.num_tokens * 4, kLine);
  uint8_t* memory = shared.Get(tokens_bytes + 2 * numbers_bytes);
  call.tokens = memory;
  const bool is_rounded = call.kind == DotKind::kInt8Int8 || call.kind == DotKind::kInt4Int8;
  call.token_scale = is_rounded ? reinterpret_cast<float*>(memory + tokens_bytes) : nullptr;
  call.token_offset =
      call.kind == DotKind::kInt8Int8 ? reinterpret_cast<int32_t*>(memory + tokens_bytes + numbers_bytes) : nullptr;

  const int64_t num_numbers = call.num_tokens * call.depth;
  const int64_t parts = std::min(call.num_token_tiles, num_numbers / kPreparedAlone + 1);
  ParallelFor(pool, parts, [&](int64_t part) {
    kernel.prepare(call, part * call.num_token_tiles / parts, (part + 1) * call.num_token_tiles / parts);
  });

  const bool is_streamed = call.num_token_tiles <= 2;
  const int64_t wanted = (is_streamed ? kStreamedBlockBytes : kCachedBlockBytes) / std::max<int64_t>(1, call.weight_row_bytes);
  const int64_t fair = CeilDiv(call.num_rows, 4 * pool.num_threads);  // Four blocks a thread at least.
  const int64_t rows = RoundUp(std::clamp<int64_t>(std::min(wanted, fair), 1, 256), 4 * kRowsPerTile);
  const int64_t row_blocks = CeilDiv(call.num_rows, rows);
  const int64_t token_blocks = CeilDiv(call.num_tokens, kMaxTokensPerBlock);
  const int64_t widest_block = CeilDiv(call.num_token_tiles, token_blocks) * kernel.max_tile_tokens;
  const int64_t scales_stride = CeilDiv(call.depth, 32);
  const bool are_scales_expanded = call.group_scale != nullptr && call.group_size != 32;
  ParallelFor(pool, row_blocks * token_blocks, [&](int64_t index) {
    thread_local Scratch own;
    DotBlock block;
    const int64_t row_block = index / token_blocks, token_block = index % token_blocks;
    block.row_begin = row_block * rows;
    block.row_end = std::min(call.num_rows, block.row_begin + rows);
    block.tile_begin = token_block * call.num_token_tiles / token_blocks;
    block.tile_end = (token_block + 1) * call.num_token_tiles / token_blocks;
    const int64_t partial_bytes = RoundUp(widest_block * rows * 4, kLine);
    uint8_t* memory = own.Get(partial_bytes + (are_scales_expanded ? rows * scales_stride * 2 : 0));
    block.partial = reinterpret_cast<float*>(memory);
    block.scales = nullptr;
    block.scales_stride = scales_stride;
    if (are_scales_expanded) {
      auto* scales = reinterpret_cast<uint16_t*>(memory + partial_bytes);
      ExpandScales(call, block.row_begin, block.row_end, scales_stride, scales);
      block.scales = scales;
    } else if (call.group_scale != nullptr) {
      block.scales = call.group_scale + block.row_begin * call.num_groups;
    }
    kernel.run(call, block);
  });
  return nullptr;
}

}  // namespace fastgpt

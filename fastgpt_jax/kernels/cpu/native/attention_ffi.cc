// Attention as targets of XLA: operands and attributes to an AttentionCall, after checks of every size it relies on.
#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "attention_plan.h"
#include "target.h"

namespace fastgpt {
namespace {

constexpr int64_t kMaxHead = 1024;

bool NumberOf(ffi::DataType type, Number* number) {
  if (type == ffi::F32) *number = Number::kF32;
  else if (type == ffi::BF16) *number = Number::kBf16;
  else if (type == ffi::S8) *number = Number::kS8;
  else return false;
  return true;
}

int64_t BytesOf(Number number) { return number == Number::kF32 ? 4 : number == Number::kBf16 ? 2 : 1; }

template <typename Buffer>
bool Is(const Buffer& buffer, ffi::DataType type, const std::vector<int64_t>& sizes) {
  const auto dims = buffer.dimensions();
  return buffer.element_type() == type && std::equal(dims.begin(), dims.end(), sizes.begin(), sizes.end());
}

// Operands of varying number, in order.
class Rest {
 public:
  explicit Rest(const ffi::RemainingArgs& args) : args_(args) {}

  ffi::AnyBuffer Next() {
    auto found = next_ < args_.size() ? args_.get<ffi::AnyBuffer>(next_) : args_.get<ffi::AnyBuffer>(args_.size());
    ++next_;
    return *found;
  }
  bool Has(size_t count) const { return next_ + count <= args_.size(); }
  bool IsEmpty() const { return next_ == args_.size(); }

 private:
  const ffi::RemainingArgs& args_;
  size_t next_ = 0;
};

struct Attributes {
  ffi::Span<const int64_t> program;
  float scale, soft_cap;
  int64_t num_leaves;
  bool has_slopes;
  int64_t shift;
  bool has_bias, has_sinks;
};

// Leaves, slopes, bias and sinks: what the mask and the scores read. Returns why they do not fit, or null.
const char* ReadScores(const Attributes& attributes, Rest& rest, AttentionCall* call, std::vector<MaskLeaf>* leaves) {
  const size_t count = attributes.num_leaves + attributes.has_slopes + attributes.has_bias + attributes.has_sinks;
  if (!rest.Has(count)) return "operands are missing";
  for (int64_t i = 0; i < attributes.num_leaves; ++i) {
    const ffi::AnyBuffer leaf = rest.Next();
    const auto dims = leaf.dimensions();
    if (leaf.element_type() != ffi::S32 || dims.size() < 1 || dims.size() > 3) return "a leaf must be int32 with 1 to 3 axes";
    if (dims[0] != 1 && dims[0] != call->R) return "a leaf must have an axis of 1 or all requests first";
    const int64_t rows = dims.size() > 1 ? dims[1] : 1, columns = dims.size() > 2 ? dims[2] : 1;
    leaves->push_back({leaf.typed_data<int32_t>(), dims[0] == 1 ? 0 : rows * columns, {rows, columns}});
  }
  call->mask = {attributes.program.begin(), static_cast<int64_t>(attributes.program.size()), leaves->data(),
                attributes.num_leaves};
  if (const char* problem = call->mask.Problem(call->T, call->S)) return problem;
  call->scale = attributes.scale;
  call->soft_cap = attributes.soft_cap;
  call->shift = attributes.shift;
  if (attributes.has_slopes) {
    const ffi::AnyBuffer slopes = rest.Next();
    const auto dims = slopes.dimensions();
    if (slopes.element_type() != ffi::F32 || dims.size() != 2 || dims[1] != call->N || (dims[0] != 1 && dims[0] != call->R)) {
      return "slopes must be float32 [1 or R, N]";
    }
    call->slopes = slopes.typed_data<float>();
    call->slope_stride = dims[0] == 1 ? 0 : call->N;
  }
  if (attributes.has_bias) {
    const ffi::AnyBuffer bias = rest.Next();
    const auto dims = bias.dimensions();
    const int64_t sizes[4] = {call->R, call->T, call->N, call->S};
    if (bias.element_type() != ffi::F32 || dims.size() != 4) return "the bias must be float32 with 4 axes";
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
      if (dims[i] != 1 && dims[i] != sizes[i]) return "the bias must be [1 or R, 1 or T, 1 or N, 1 or S]";
      call->bias_strides[i] = dims[i] == 1 ? 0 : stride;
      stride *= dims[i];
    }
    call->bias = bias.typed_data<float>();
  }
  if (attributes.has_sinks) {
    const ffi::AnyBuffer sinks = rest.Next();
    if (!Is(sinks, ffi::F32, {call->N})) return "sinks must be float32 [N]";
    call->sinks = sinks.typed_data<float>();
  }
  return rest.IsEmpty() ? nullptr : "there are operands that nothing reads";
}

const char* ReadQuery(const ffi::AnyBuffer& query, AttentionCall* call) {
  const auto dims = query.dimensions();
  if (dims.size() != 4) return "queries must be [R, T, N, H]";
  if (!NumberOf(query.element_type(), &call->query_type) || call->query_type == Number::kS8) {
    return "queries must be float32 or bfloat16";
  }
  call->query = query.untyped_data();
  call->R = dims[0], call->T = dims[1], call->N = dims[2], call->H = dims[3];
  return nullptr;
}

const char* CheckHeads(const AttentionCall& call) {
  if (std::min({call.R, call.T, call.N, call.K, call.H, call.E, call.Z, call.M, call.P, call.S}) < 1) return "a size is 0";
  if (call.N % call.K != 0) return "query heads must be a multiple of KV heads";
  if (call.N / call.K > kTileRows) return "more query heads than 96 read one KV head";
  if (call.H > kMaxHead || call.E > kMaxHead) return "heads are wider than 1024";
  return nullptr;
}

ffi::Error PagedAttention(ffi::ThreadPool threads, ffi::AnyBuffer query, ffi::AnyBuffer rows_k, ffi::AnyBuffer rows_v,
                          ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> pages, ffi::AnyBuffer pool_k,
                          ffi::AnyBuffer pool_v, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out,
                          ffi::Result<ffi::AnyBuffer> new_k, ffi::Result<ffi::AnyBuffer> new_v,
                          ffi::RemainingRets rets, ffi::Span<const int64_t> program, float scale, float soft_cap,
                          int64_t num_keys, int64_t num_layers, int64_t num_leaves, bool has_slopes, int64_t shift,
                          bool has_bias, bool has_sinks) {
  constexpr const char* kOp = "paged_attention";
  AttentionCall call{};
  if (const char* problem = ReadQuery(query, &call)) return Refuse(kOp, problem);
  const auto k_dims = pool_k.dimensions(), page_dims = pages.dimensions();
  const auto rows_k_dims = rows_k.dimensions(), rows_v_dims = rows_v.dimensions();
  if (rows_k_dims.size() != 4 || rows_v_dims.size() != 4) return Refuse(kOp, "rows must be [R, T, K, H] and [R, T, K, E]");
  call.K = rows_k_dims[2], call.E = rows_v_dims[3];
  if (num_layers < 0 || static_cast<int64_t>(k_dims.size()) < num_layers + 2) {
    return Refuse(kOp, "pools must be [*L, P, Z, *row]");
  }
  const size_t num_leading = num_layers + 2;
  // Whether a pool has slots of so many numbers, as many as the pool of keys: a row may be cut into axes in any way.
  auto fits = [&](const ffi::AnyBuffer& pool, int64_t slot) {
    const auto dims = pool.dimensions();
    return dims.size() >= num_leading && std::equal(k_dims.begin(), k_dims.begin() + num_leading, dims.begin()) &&
           std::accumulate(dims.begin() + num_leading, dims.end(), int64_t{1}, std::multiplies<>()) == slot;
  };
  if (!fits(pool_k, call.K * call.H) || !fits(pool_v, call.K * call.E)) {
    return Refuse(kOp, "pools must be [*L, P, Z, *row] with rows of K H and K E numbers");
  }
  if (!NumberOf(pool_k.element_type(), &call.pool_type) || pool_v.element_type() != pool_k.element_type()) {
    return Refuse(kOp, "pools must both be float32, bfloat16 or int8");
  }
  call.P = k_dims[num_layers], call.Z = k_dims[num_layers + 1];
  if (page_dims.size() != 2 || page_dims[0] != call.R) return Refuse(kOp, "pages must be [R, M]");
  call.M = page_dims[1], call.S = num_keys;
  call.pages = pages.typed_data();
  call.positions = positions.typed_data();
  if (const char* problem = CheckHeads(call)) return Refuse(kOp, problem);
  if (call.S > call.M * call.Z) return Refuse(kOp, "more keys are read than pages hold");
  if (!Is(positions, ffi::S32, {call.R, call.T})) return Refuse(kOp, "positions must be [R, T]");
  if (!Is(rows_k, pool_k.element_type(), {call.R, call.T, call.K, call.H}) ||
      !Is(rows_v, pool_k.element_type(), {call.R, call.T, call.K, call.E})) {
    return Refuse(kOp, "rows must be [R, T, K, H] and [R, T, K, E] in the pools' numbers");
  }
  if (!Is(*out, query.element_type(), {call.R, call.T, call.N, call.E})) return Refuse(kOp, "the result must be [R, T, N, E]");

  Rest rest(args);
  const bool has_scales = call.pool_type == Number::kS8;
  if (!rest.Has((has_scales ? 4 : 0) + num_layers)) return Refuse(kOp, "operands are missing");
  if (rets.size() != (has_scales ? 2 : 0)) return Refuse(kOp, "results of scales come with int8 pools");
  struct Pair {
    ffi::AnyBuffer rows, pool, result;
    int64_t slot;  // Numbers of a slot.
  };
  std::vector<Pair> pairs = {{rows_k, pool_k, *new_k, call.K * call.H}, {rows_v, pool_v, *new_v, call.K * call.E}};
  if (has_scales) {
    const ffi::AnyBuffer rows[] = {rest.Next(), rest.Next()};
    for (int i = 0; i < 2; ++i) {
      auto result = rets.get<ffi::AnyBuffer>(i);
      pairs.push_back({rows[i], rest.Next(), **result, call.K});
      if (!Is(pairs.back().rows, ffi::BF16, {call.R, call.T, call.K}) || !fits(pairs.back().pool, call.K) ||
          pairs.back().pool.element_type() != ffi::BF16) {
        return Refuse(kOp, "scales must be bfloat16, [R, T, K] of rows and [*L, P, Z, *] of pools, one a KV head");
      }
    }
  }
  int64_t layer = 0;
  for (int64_t i = 0; i < num_layers; ++i) {
    const ffi::AnyBuffer index = rest.Next();
    if (index.element_type() != ffi::S32 || index.element_count() != 1) return Refuse(kOp, "layers must be int32 scalars");
    const int64_t last = k_dims[i] - 1;
    layer = layer * k_dims[i] + std::clamp<int64_t>(*index.typed_data<int32_t>(), 0, last);
  }
  std::vector<MaskLeaf> leaves;
  const Attributes attributes{program, scale, soft_cap, num_leaves, has_slopes, shift, has_bias, has_sinks};
  if (const char* problem = ReadScores(attributes, rest, &call, &leaves)) return Refuse(kOp, problem);

  const Pool pool = MakePool(threads);
  void* at[4] = {};
  for (size_t i = 0; i < pairs.size(); ++i) {
    Pair& pair = pairs[i];
    const auto dims = pair.pool.dimensions();
    if (!Is(pair.result, pair.pool.element_type(), std::vector<int64_t>(dims.begin(), dims.end()))) {
      return Refuse(kOp, "pools come out as they went in");
    }
    if (pair.result.untyped_data() != pair.pool.untyped_data()) {
      std::memcpy(pair.result.untyped_data(), pair.pool.untyped_data(), pair.pool.size_bytes());
    }
    const int64_t slot_bytes = pair.slot * (i < 2 ? BytesOf(call.pool_type) : 2);
    at[i] = static_cast<char*>(pair.result.untyped_data()) + layer * call.P * call.Z * slot_bytes;
    WriteRows(call, {pair.rows.untyped_data(), at[i], slot_bytes}, pool);
  }
  call.pool_k = at[0], call.pool_v = at[1];
  call.scale_k = static_cast<const uint16_t*>(at[2]), call.scale_v = static_cast<const uint16_t*>(at[3]);
  call.out = out->untyped_data();
  Attend(call, CurrentAttentionKernels(), pool);
  return ffi::Error::Success();
}

ffi::Error ViewAttention(ffi::ThreadPool threads, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                         ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out,
                         ffi::Result<ffi::Buffer<ffi::F32>> lse, ffi::Span<const int64_t> program, float scale,
                         float soft_cap, int64_t num_leaves, bool has_slopes, int64_t shift, bool has_bias,
                         bool has_sinks) {
  constexpr const char* kOp = "attention";
  AttentionCall call{};
  if (const char* problem = ReadQuery(query, &call)) return Refuse(kOp, problem);
  const auto k_dims = key.dimensions(), v_dims = value.dimensions();
  if (k_dims.size() != 4 || v_dims.size() != 4 || k_dims[0] != call.R || k_dims[3] != call.H ||
      !std::equal(k_dims.begin(), k_dims.end() - 1, v_dims.begin())) {
    return Refuse(kOp, "keys and values must be [B, S, K, H] and [B, S, K, E]");
  }
  if (!NumberOf(key.element_type(), &call.pool_type) || call.pool_type == Number::kS8 ||
      value.element_type() != key.element_type()) {
    return Refuse(kOp, "keys and values must both be float32 or bfloat16");
  }
  call.P = call.R, call.Z = call.S = k_dims[1], call.K = k_dims[2], call.E = v_dims[3], call.M = 1;
  if (const char* problem = CheckHeads(call)) return Refuse(kOp, problem);
  if (!Is(*out, query.element_type(), {call.R, call.T, call.N, call.E}) || !Is(*lse, ffi::F32, {call.R, call.N, call.T})) {
    return Refuse(kOp, "the results must be [B, T, N, E] and [B, N, T]");
  }
  std::vector<int32_t> pages(call.R);
  for (int64_t r = 0; r < call.R; ++r) pages[r] = static_cast<int32_t>(r);
  call.pages = pages.data();
  call.pool_k = key.untyped_data(), call.pool_v = value.untyped_data();
  call.out = out->untyped_data(), call.lse = lse->typed_data();
  Rest rest(args);
  std::vector<MaskLeaf> leaves;
  const Attributes attributes{program, scale, soft_cap, num_leaves, has_slopes, shift, has_bias, has_sinks};
  if (const char* problem = ReadScores(attributes, rest, &call, &leaves)) return Refuse(kOp, problem);
  Attend(call, CurrentAttentionKernels(), MakePool(threads));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fastgpt

FASTGPT_TARGET(paged_attention, ::fastgpt::PagedAttention,
               ::xla::ffi::Ffi::Bind()
                   .Ctx<::xla::ffi::ThreadPool>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::Buffer<::xla::ffi::S32>>()
                   .Arg<::xla::ffi::Buffer<::xla::ffi::S32>>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .RemainingArgs()
                   .Ret<::xla::ffi::AnyBuffer>()
                   .Ret<::xla::ffi::AnyBuffer>()
                   .Ret<::xla::ffi::AnyBuffer>()
                   .RemainingRets()
                   .Attr<::xla::ffi::Span<const int64_t>>("program")
                   .Attr<float>("scale")
                   .Attr<float>("soft_cap")
                   .Attr<int64_t>("num_keys")
                   .Attr<int64_t>("num_layers")
                   .Attr<int64_t>("num_leaves")
                   .Attr<bool>("has_slopes")
                   .Attr<int64_t>("shift")
                   .Attr<bool>("has_bias")
                   .Attr<bool>("has_sinks"))

FASTGPT_TARGET(attention, ::fastgpt::ViewAttention,
               ::xla::ffi::Ffi::Bind()
                   .Ctx<::xla::ffi::ThreadPool>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .RemainingArgs()
                   .Ret<::xla::ffi::AnyBuffer>()
                   .Ret<::xla::ffi::Buffer<::xla::ffi::F32>>()
                   .Attr<::xla::ffi::Span<const int64_t>>("program")
                   .Attr<float>("scale")
                   .Attr<float>("soft_cap")
                   .Attr<int64_t>("num_leaves")
                   .Attr<bool>("has_slopes")
                   .Attr<int64_t>("shift")
                   .Attr<bool>("has_bias")
                   .Attr<bool>("has_sinks"))

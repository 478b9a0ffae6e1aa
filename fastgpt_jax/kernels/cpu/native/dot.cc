// The targets `weight_dot`, `int8_dot` and `int4_dot`: what XLA hands over is checked here, and nothing wrong goes on.
#include <exception>
#include <string>

#include "dot_driver.h"
#include "target.h"

namespace fastgpt {
namespace {

std::string ShapeOf(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (int64_t size : buffer.dimensions()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

bool IsFloat(ffi::DataType dtype) { return dtype == ffi::DataType::F32 || dtype == ffi::DataType::BF16; }

// What is common to all: x [..., K], weights [O, stored], out [..., O]. An empty text says that all is well.
std::string Describe(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weights, const ffi::AnyBuffer& out,
                     int64_t depth, DotCall* call) {
  const auto sizes = x.dimensions(), rows = weights.dimensions(), results = out.dimensions();
  if (sizes.size() < 1 || rows.size() != 2) {
    return "x [..., K] and weights [O, K] are needed, got " + ShapeOf(x) + " and " + ShapeOf(weights);
  }
  if (sizes.back() != depth) return "x [..., " + std::to_string(depth) + "] is needed, got " + ShapeOf(x);
  if (!IsFloat(x.element_type()) || !IsFloat(out.element_type())) {
    return "x and the result must be float32 or bfloat16";
  }
  call->num_tokens = 1;
  bool fits = results.size() == sizes.size() && results.back() == rows[0];
  for (size_t i = 0; fits && i + 1 < sizes.size(); ++i) {
    call->num_tokens *= sizes[i];
    fits = results[i] == sizes[i];
  }
  if (!fits) return "the result must be x's shape with " + std::to_string(rows[0]) + " last, got " + ShapeOf(out);
  call->num_rows = rows[0];
  call->depth = depth;
  call->x = x.untyped_data();
  call->is_x_bf16 = x.element_type() == ffi::DataType::BF16;
  call->weights = static_cast<const uint8_t*>(weights.untyped_data());
  call->out = out.untyped_data();
  call->is_out_bf16 = out.element_type() == ffi::DataType::BF16;
  return "";
}

ffi::Error Finish(const char* op, ffi::ThreadPool& threads, const DotCall& call) {
  try {
    const char* problem = RunDot(MakePool(threads), call);
    return problem == nullptr ? ffi::Error::Success() : Refuse(op, problem);
  } catch (const std::exception& error) {  // Out of memory, say; XLA knows no exceptions.
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("fastgpt_") + op + ": " + error.what());
  }
}

ffi::Error WeightDot(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                     ffi::Result<ffi::AnyBuffer> out) {
  DotCall call{};
  const int64_t depth = weights.dimensions().size() == 2 ? weights.dimensions()[1] : -1;
  if (auto problem = Describe(x, weights, *out, depth, &call); !problem.empty()) return Refuse("weight_dot", problem);
  if (!IsFloat(weights.element_type())) return Refuse("weight_dot", "weights must be float32 or bfloat16");
  const bool is_bf16 = weights.element_type() == ffi::DataType::BF16;
  call.kind = is_bf16 ? DotKind::kBf16F32 : DotKind::kF32F32;
  if (is_bf16 && call.is_x_bf16 && FindDotKernel(DotKind::kBf16Bf16).run != nullptr) call.kind = DotKind::kBf16Bf16;
  call.weight_row_bytes = depth * (is_bf16 ? 2 : 4);
  return Finish("weight_dot", threads, call);
}

ffi::Error Int8Dot(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer scale,
                   ffi::Result<ffi::AnyBuffer> out, bool is_activation_rounded) {
  DotCall call{};
  const int64_t depth = weights.dimensions().size() == 2 ? weights.dimensions()[1] : -1;
  if (auto problem = Describe(x, weights, *out, depth, &call); !problem.empty()) return Refuse("int8_dot", problem);
  if (weights.element_type() != ffi::DataType::S8) return Refuse("int8_dot", "weights must be int8");
  if (scale.element_type() != ffi::DataType::F32 || static_cast<int64_t>(scale.element_count()) != call.num_rows) {
    return Refuse("int8_dot", "a float32 scale for each of " + std::to_string(call.num_rows) + " rows is needed, got " +
                                  ShapeOf(scale));
  }
  call.kind = is_activation_rounded ? DotKind::kInt8Int8 : DotKind::kInt8F32;
  call.weight_row_bytes = depth;
  call.row_scale = static_cast<const float*>(scale.untyped_data());
  return Finish("int8_dot", threads, call);
}

ffi::Error Int4Dot(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer scale,
                   ffi::Result<ffi::AnyBuffer> out, int64_t group_size, bool is_activation_rounded) {
  DotCall call{};
  const int64_t depth = x.dimensions().size() >= 1 ? x.dimensions().back() : -1;
  if (auto problem = Describe(x, weights, *out, depth, &call); !problem.empty()) return Refuse("int4_dot", problem);
  if (weights.element_type() != ffi::DataType::U8 || weights.dimensions()[1] != (depth + 1) / 2) {
    return Refuse("int4_dot",
                  "weights must be uint8 [O, " + std::to_string((depth + 1) / 2) + "], got " + ShapeOf(weights));
  }
  if (group_size < 32 || group_size % 32 != 0) {
    return Refuse("int4_dot", "group_size must be a multiple of 32, got " + std::to_string(group_size));
  }
  const auto sizes = scale.dimensions();
  const int64_t num_groups = (depth + group_size - 1) / group_size;
  if (scale.element_type() != ffi::DataType::BF16 || sizes.size() != 2 || sizes[0] != call.num_rows ||
      sizes[1] != num_groups) {
    return Refuse("int4_dot", "bfloat16 scales [" + std::to_string(call.num_rows) + ", " + std::to_string(num_groups) +
                                  "] are needed, got " + ShapeOf(scale));
  }
  call.kind = is_activation_rounded ? DotKind::kInt4Int8 : DotKind::kInt4F32;
  call.weight_row_bytes = (depth + 1) / 2;
  call.group_scale = static_cast<const uint16_t*>(scale.untyped_data());
  call.num_groups = num_groups;
  call.group_size = group_size;
  return Finish("int4_dot", threads, call);
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>(); }

}  // namespace
}  // namespace fastgpt

FASTGPT_TARGET(weight_dot, ::fastgpt::WeightDot, ::fastgpt::Bind().Ret<::fastgpt::ffi::AnyBuffer>())
FASTGPT_TARGET(int8_dot, ::fastgpt::Int8Dot,
               ::fastgpt::Bind().Arg<::fastgpt::ffi::AnyBuffer>().Ret<::fastgpt::ffi::AnyBuffer>().Attr<bool>(
                   "is_activation_rounded"))
FASTGPT_TARGET(int4_dot, ::fastgpt::Int4Dot,
               ::fastgpt::Bind()
                   .Arg<::fastgpt::ffi::AnyBuffer>()
                   .Ret<::fastgpt::ffi::AnyBuffer>()
                   .Attr<int64_t>("group_size")
                   .Attr<bool>("is_activation_rounded"))

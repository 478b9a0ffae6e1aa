// The kernels of `pointwise.h` as targets: shapes and types are checked here, and rows shared among threads.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "isa.h"
#include "pointwise.h"
#include "target.h"

namespace fastgpt {
namespace {

constexpr int64_t kChunkNumbers = 1 << 14;  // Fewer are done sooner than a thread wakes up.

const PointwiseKernels& Kernels() {
#if defined(__x86_64__)
  if (CurrentIsa() >= Isa::kAvx512Vnni) return PointwiseAvx512();
  if (CurrentIsa() >= Isa::kAvx2) return PointwiseAvx2();
#endif
  return PointwisePortable();
}

std::optional<Float> TypeOf(ffi::DataType type) {
  if (type == ffi::F32) return Float::kF32;
  if (type == ffi::BF16) return Float::kBf16;
  return std::nullopt;
}

bool AreFloats(std::initializer_list<ffi::DataType> types) {
  return std::all_of(types.begin(), types.end(), [](ffi::DataType type) { return TypeOf(type).has_value(); });
}

Floats In(const ffi::AnyBuffer& x) { return {x.untyped_data(), *TypeOf(x.element_type())}; }
FloatsOut Out(ffi::Result<ffi::AnyBuffer> x) { return {x->untyped_data(), *TypeOf(x->element_type())}; }

template <typename Body>
void OverChunks(ffi::ThreadPool& threads, int64_t count, int64_t chunk, Body&& body) {
  ParallelFor(MakePool(threads), (count + chunk - 1) / chunk,
              [&](int64_t i) { body(i * chunk, std::min(count, (i + 1) * chunk)); });
}

constexpr char kWantsFloats[] = "numbers must be float32 or bfloat16";

// `x`, then `y` where `has_y`, then the weight and the bias of `width` numbers that there are; out come the norm, and
// the sum where `has_y`.
ffi::Error Norm(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets results, float eps,
                float outer_eps, bool has_mean, bool has_y, bool has_weight, bool has_bias) {
  const size_t num_args = 1 + has_y + has_weight + has_bias;
  if (args.size() != num_args || results.size() != 1u + has_y) {
    return Refuse("norm", "it takes x, y, weight and bias as its attributes say, and gives the norm and the sum");
  }
  std::vector<ffi::AnyBuffer> given;
  for (size_t i = 0; i < num_args; ++i) {
    given.push_back(*args.get<ffi::AnyBuffer>(i));
    if (!AreFloats({given[i].element_type()})) return Refuse("norm", kWantsFloats);
  }
  auto norm = *results.get<ffi::AnyBuffer>(0);
  if (!AreFloats({norm->element_type()})) return Refuse("norm", kWantsFloats);
  const auto dims = given[0].dimensions();
  if (dims.size() < 1 || dims.back() < 1) return Refuse("norm", "x must have rows of one number at least");
  NormArgs a{};
  a.width = dims.back();
  a.x = In(given[0]);
  a.norm = Out(norm);
  a.eps = eps;
  a.outer_eps = outer_eps;
  a.has_mean = has_mean;
  if (norm->element_count() != given[0].element_count()) return Refuse("norm", "the norm must have the shape of x");
  if (has_y) {
    auto total = *results.get<ffi::AnyBuffer>(1);
    const bool is_alike = given[1].element_type() == given[0].element_type() &&
                          total->element_type() == given[0].element_type() &&
                          given[1].element_count() == given[0].element_count() &&
                          total->element_count() == given[0].element_count();
    if (!is_alike) return Refuse("norm", "x, y and their sum must be of one shape and type");
    a.y = In(given[1]);
    a.total = Out(total);
  }
  for (size_t i = 1 + has_y; i < num_args; ++i) {
    if (given[i].element_count() != static_cast<size_t>(a.width) ||
        given[i].element_type() != given[num_args - 1].element_type()) {
      return Refuse("norm", "weight and bias must be of one type, with as many numbers as a row");
    }
  }
  if (has_weight) a.weight = In(given[1 + has_y]);
  if (has_bias) a.bias = In(given[num_args - 1]);
  const int64_t rows = given[0].element_count() / a.width;
  OverChunks(threads, rows, std::max<int64_t>(1, kChunkNumbers / a.width),
             [&](int64_t begin, int64_t end) { Kernels().norm(a, begin, end); });
  return ffi::Error::Success();
}

ffi::Error Gated(ffi::ThreadPool threads, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::Result<ffi::AnyBuffer> out,
                 std::string_view activation) {
  if (!AreFloats({gate.element_type(), up.element_type(), out->element_type()})) return Refuse("gated", kWantsFloats);
  if (gate.element_count() != up.element_count() || gate.element_count() != out->element_count()) {
    return Refuse("gated", "gate, up and the result must be of one shape");
  }
  GatedArgs a{In(gate), In(up), Out(out), Activation::kSilu};
  if (activation == "gelu_tanh") {
    a.activation = Activation::kGeluTanh;
  } else if (activation == "gelu_erf") {
    a.activation = Activation::kGeluErf;
  } else if (activation == "relu") {
    a.activation = Activation::kRelu;
  } else if (activation != "silu") {
    return Refuse("gated", "the activation must be silu, gelu_tanh, gelu_erf or relu, got " + std::string(activation));
  }
  OverChunks(threads, gate.element_count(), kChunkNumbers,
             [&](int64_t begin, int64_t end) { Kernels().gated(a, begin, end); });
  return ffi::Error::Success();
}

ffi::Error Rope(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                ffi::Result<ffi::AnyBuffer> out, bool is_interleaved) {
  if (!AreFloats({x.element_type(), cos.element_type(), out->element_type()}) ||
      cos.element_type() != sin.element_type()) {
    return Refuse("rope", "numbers must be float32 or bfloat16, and cosines and sines of one type");
  }
  const auto dims = x.dimensions(), table_dims = cos.dimensions();
  const size_t rank = dims.size();
  bool fits = rank >= 1 && table_dims.size() == rank && out->element_count() == x.element_count() &&
              std::equal(table_dims.begin(), table_dims.end(), sin.dimensions().begin(), sin.dimensions().end());
  for (size_t d = 0; fits && d + 1 < rank; ++d) fits = table_dims[d] == 1 || table_dims[d] == dims[d];
  fits = fits && dims.back() % 2 == 0 && dims.back() > 0 &&
         (table_dims.back() == dims.back() || table_dims.back() * 2 == dims.back());
  if (!fits) {
    return Refuse("rope", "x [..., H] needs cosines and sines of H or H / 2 numbers, the other axes as in x or of 1");
  }
  const int64_t rows = x.element_count() / dims.back();
  std::vector<int64_t> table(rows);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t rest = row, place = 0, stride = 1;
    for (size_t d = rank - 1; d-- > 0;) {
      if (table_dims[d] != 1) place += rest % dims[d] * stride;
      stride *= table_dims[d];
      rest /= dims[d];
    }
    table[row] = place;
  }
  const RopeArgs a{In(x), In(cos), In(sin), Out(out), table.data(), dims.back(), table_dims.back(), is_interleaved};
  OverChunks(threads, rows, std::max<int64_t>(1, kChunkNumbers / dims.back()),
             [&](int64_t begin, int64_t end) { Kernels().rope(a, begin, end); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fastgpt

FASTGPT_TARGET(norm, ::fastgpt::Norm,
               ::xla::ffi::Ffi::Bind()
                   .Ctx<::xla::ffi::ThreadPool>()
                   .RemainingArgs()
                   .RemainingRets()
                   .Attr<float>("eps")
                   .Attr<float>("outer_eps")
                   .Attr<bool>("has_mean")
                   .Attr<bool>("has_y")
                   .Attr<bool>("has_weight")
                   .Attr<bool>("has_bias"))

FASTGPT_TARGET(gated, ::fastgpt::Gated,
               ::xla::ffi::Ffi::Bind()
                   .Ctx<::xla::ffi::ThreadPool>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Ret<::xla::ffi::AnyBuffer>()
                   .Attr<std::string_view>("activation"))

FASTGPT_TARGET(rope, ::fastgpt::Rope,
               ::xla::ffi::Ffi::Bind()
                   .Ctx<::xla::ffi::ThreadPool>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Ret<::xla::ffi::AnyBuffer>()
                   .Attr<bool>("is_interleaved"))

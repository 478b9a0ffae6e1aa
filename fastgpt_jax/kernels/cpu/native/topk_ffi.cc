// The largest numbers of rows as a target of XLA.
#include "target.h"
#include "topk.h"

namespace fastgpt {
namespace {

ffi::Error TopKTarget(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> rows, ffi::Result<ffi::Buffer<ffi::F32>> values,
                      ffi::Result<ffi::Buffer<ffi::S32>> indices) {
  const auto in = rows.dimensions(), out = values->dimensions(), places = indices->dimensions();
  if (in.size() != 2 || out.size() != 2 || places.size() != 2 || out[0] != in[0] || places[0] != in[0] ||
      out[1] != places[1]) {
    return Refuse("topk", "rows must be [R, V], and the results both [R, k]");
  }
  if (out[1] < 1 || out[1] > in[1] || in[1] > INT32_MAX) return Refuse("topk", "k must be at least 1 and at most V");
  TopK(rows.typed_data(), in[0], in[1], out[1], values->typed_data(), indices->typed_data(), CurrentNextAbove(),
       MakePool(threads));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace fastgpt

FASTGPT_TARGET(topk, ::fastgpt::TopKTarget,
               ::xla::ffi::Ffi::Bind()
                   .Ctx<::xla::ffi::ThreadPool>()
                   .Arg<::xla::ffi::Buffer<::xla::ffi::F32>>()
                   .Ret<::xla::ffi::Buffer<::xla::ffi::F32>>()
                   .Ret<::xla::ffi::Buffer<::xla::ffi::S32>>())

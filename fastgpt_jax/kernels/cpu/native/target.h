// How a handler becomes a target that Python registers with XLA: `FASTGPT_TARGET(op, function, binding)`.
//
// The one idea: the library lists its own targets (`fastgpt_target`), so that a new file of kernels is a new file only.
// A handler tells XLA which version of the interface it was compiled with, and XLA refuses minor versions newer than its
// own. Nothing here uses what minor versions added, and what they add comes last in structures, so we claim the older
// of the two.
#ifndef FASTGPT_KERNELS_CPU_TARGET_H_
#define FASTGPT_KERNELS_CPU_TARGET_H_

#include <string>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace fastgpt {

namespace ffi = ::xla::ffi;

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);

struct Target {
  Target(const char* name, Handler* handler);

  const char* const name;  // As XLA knows it.
  Handler* const handler;
  const Target* const next;
};

// XLA's own threads, for as long as a call lasts.
inline Pool MakePool(ffi::ThreadPool& threads) {
  auto schedule = [](void* owner, void (*task)(void*), void* data) {
    static_cast<ffi::ThreadPool*>(owner)->Schedule([=] { task(data); });
  };
  return {+schedule, &threads, threads.num_threads()};
}

inline XLA_FFI_Error* CallAsOlder(const ffi::Ffi& handler, XLA_FFI_CallFrame* frame) {
  XLA_FFI_Error* error = handler.Call(frame);
  if (error != nullptr || frame->extension_start == nullptr) return error;
  if (frame->extension_start->type != XLA_FFI_Extension_Metadata) return error;
  auto* version = &reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata->api_version;
  const auto& theirs = frame->api->api_version;
  if (theirs.major_version == version->major_version && theirs.minor_version < version->minor_version) {
    version->minor_version = theirs.minor_version;
  }
  return error;
}

inline ffi::Error Refuse(const char* op, const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("fastgpt_") + op + ": " + what);
}

}  // namespace fastgpt

// The binding comes last because it holds commas.
#define FASTGPT_TARGET(op, function, ...)                                \
  namespace {                                                            \
  XLA_FFI_Error* op##_handler(XLA_FFI_CallFrame* frame) {                \
    static const auto* const handler = (__VA_ARGS__).To(function).release(); \
    return ::fastgpt::CallAsOlder(*handler, frame);                      \
  }                                                                      \
  const ::fastgpt::Target op##_target("fastgpt_" #op, op##_handler);     \
  }

#endif  // FASTGPT_KERNELS_CPU_TARGET_H_

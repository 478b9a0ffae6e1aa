// What Python sees of the library: its targets, the instructions they use, and a measure of the machine.
#include <cstdint>

#include "isa.h"
#include "target.h"

namespace fastgpt {
namespace {

const Target*& First() {
  static const Target* first = nullptr;
  return first;
}

// Reads every byte once, on all threads: the speed that nothing which reads its operands once can beat.
ffi::Error ReadSum(ffi::ThreadPool threads, ffi::AnyBuffer data, ffi::ResultBuffer<ffi::U32> sum) {
  constexpr int64_t kChunkWords = 1 << 16;
  if (sum->element_count() != 1) return Refuse("read_sum", "the result must be one number");
  const auto* words = static_cast<const uint32_t*>(data.untyped_data());
  const int64_t num_words = data.size_bytes() / sizeof(uint32_t);
  std::atomic<uint32_t> total{0};
  ParallelFor(MakePool(threads), (num_words + kChunkWords - 1) / kChunkWords, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunkWords;
    const int64_t end = begin + kChunkWords < num_words ? begin + kChunkWords : num_words;
    uint32_t partial = 0;
    for (int64_t i = begin; i < end; ++i) partial += words[i];
    total.fetch_add(partial, std::memory_order_relaxed);
  });
  *sum->typed_data() = total.load();
  return ffi::Error::Success();
}

}  // namespace

Target::Target(const char* name, Handler* handler) : name(name), handler(handler), next(First()) { First() = this; }

}  // namespace fastgpt

FASTGPT_TARGET(read_sum, ::fastgpt::ReadSum,
               ::xla::ffi::Ffi::Bind()
                   .Ctx<::xla::ffi::ThreadPool>()
                   .Arg<::xla::ffi::AnyBuffer>()
                   .Ret<::xla::ffi::Buffer<::xla::ffi::U32>>())

extern "C" {

#define FASTGPT_EXPORT __attribute__((visibility("default")))

// The targets, as a list: pass null for the first, and each for the next.
FASTGPT_EXPORT const void* fastgpt_next_target(const void* target) {
  return target == nullptr ? ::fastgpt::First() : static_cast<const ::fastgpt::Target*>(target)->next;
}

FASTGPT_EXPORT const char* fastgpt_target_name(const void* target) {
  return static_cast<const ::fastgpt::Target*>(target)->name;
}

FASTGPT_EXPORT void* fastgpt_target_handler(const void* target) {
  return reinterpret_cast<void*>(static_cast<const ::fastgpt::Target*>(target)->handler);
}

FASTGPT_EXPORT const char* fastgpt_isa() { return ::fastgpt::NameOf(::fastgpt::CurrentIsa()); }

FASTGPT_EXPORT const char* fastgpt_isa_problem() { return ::fastgpt::IsaProblem(); }

FASTGPT_EXPORT int fastgpt_ffi_api_major() { return XLA_FFI_API_MAJOR; }
}

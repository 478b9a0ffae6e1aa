// Work shared among the threads of a pool that is not ours.
//
// The one idea: chunks are taken from a counter, and the caller takes chunks too, so that a call waits for chunks that
// somebody runs and never for a thread that has not woken up. A helper that comes late finds no chunk left and looks
// at nothing of the call but the counter, which it owns a share of.
#ifndef FASTGPT_KERNELS_CPU_PARALLEL_H_
#define FASTGPT_KERNELS_CPU_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>

namespace fastgpt {

// Threads that somebody else keeps. `schedule` may run the task at once, later, or in the caller.
struct Pool {
  void (*schedule)(void* owner, void (*task)(void*), void* data);
  void* owner;
  int64_t num_threads;  // The caller counts as one of them.
};

namespace parallel_internal {

struct Shared {
  Shared(int64_t num_chunks, void (*run)(void*, int64_t), void* body)
      : num_chunks(num_chunks), run(run), body(body) {}

  const int64_t num_chunks;
  void (*const run)(void*, int64_t);
  void* const body;  // Lives in the caller's frame: only who holds a chunk may look at it.
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};

  void Work() {
    int64_t finished = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_chunks; ++finished) run(body, i);
    if (finished > 0) done.fetch_add(finished, std::memory_order_release);
  }
};

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace parallel_internal

// Calls `body(i)` for i = 0 ... num_chunks - 1, in any order, on any of the threads; returns when all have returned.
template <typename Body>
void ParallelFor(const Pool& pool, int64_t num_chunks, Body&& body) {
  using parallel_internal::Shared;
  using Plain = std::remove_reference_t<Body>;
  if (num_chunks <= 1 || pool.num_threads <= 1) {
    for (int64_t i = 0; i < num_chunks; ++i) body(i);
    return;
  }
  auto run = [](void* data, int64_t i) { (*static_cast<Plain*>(data))(i); };
  auto shared = std::make_shared<Shared>(num_chunks, +run, const_cast<std::remove_const_t<Plain>*>(&body));
  const int64_t num_helpers = (pool.num_threads < num_chunks ? pool.num_threads : num_chunks) - 1;
  for (int64_t i = 0; i < num_helpers; ++i) {
    auto task = [](void* data) {
      auto* held = static_cast<std::shared_ptr<Shared>*>(data);
      (*held)->Work();
      delete held;
    };
    pool.schedule(pool.owner, +task, new std::shared_ptr<Shared>(shared));
  }
  shared->Work();
  // What is left runs elsewhere; its thread may have lost its core to a neighbour, so give ours away after a while.
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < num_chunks; ++spins) {
    if (spins < 2000) {
      parallel_internal::Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_PARALLEL_H_

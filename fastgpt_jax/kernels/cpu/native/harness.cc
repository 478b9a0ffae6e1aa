// Runs the dot kernels without XLA, against sums in double: for sanitizers, and for processors that are emulated.
//
//   harness            exit status 0 and "ok" where all products are right
//
// Every buffer has exactly the size that the kernels may read or write, so that AddressSanitizer sees one byte more.
// FASTGPT_CPU_ISA chooses the variant. Not part of the library.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "dot_driver.h"

namespace fastgpt {
namespace {

// Two threads and the caller.
class Threads {
 public:
  Threads() {
    for (int i = 0; i < 2; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_over_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Pool AsPool() {
    auto schedule = [](void* owner, void (*task)(void*), void* data) {
      auto* self = static_cast<Threads*>(owner);
      {
        std::lock_guard<std::mutex> lock(self->mutex_);
        self->tasks_.push_back([=] { task(data); });
      }
      self->wake_.notify_one();
    };
    return {+schedule, this, 3};
  }

 private:
  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return is_over_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  bool is_over_ = false;
};

struct Shape {
  int64_t tokens, depth, rows;
};

constexpr Shape kShapes[] = {{1, 1, 1},   {1, 64, 1},    {1, 256, 21},  {3, 172, 64},  {5, 333, 19}, {7, 31, 5},
                             {8, 512, 9}, {13, 160, 34}, {19, 6500, 6}, {530, 70, 13}, {2, 64, 600}};

float Bf16ToFloat(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t CutToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

struct Case {
  const char* name;
  DotKind kind;
  int weight_bits;
  bool is_x_bf16;
  int64_t group_size;
};

constexpr Case kCases[] = {
    {"int8 x int8", DotKind::kInt8Int8, 8, false, 0},      {"int8 x int8 of bf16", DotKind::kInt8Int8, 8, true, 0},
    {"int4 x int8", DotKind::kInt4Int8, 4, false, 32},     {"int4 x int8, groups of 96", DotKind::kInt4Int8, 4, true, 96},
    {"f32 x f32", DotKind::kF32F32, 32, false, 0},         {"bf16 x f32", DotKind::kBf16F32, 16, false, 0},
    {"int8 x f32", DotKind::kInt8F32, 8, true, 0},         {"int4 x f32", DotKind::kInt4F32, 4, false, 32},
    {"int4 x f32, groups of 64", DotKind::kInt4F32, 4, true, 64}, {"bf16 x bf16", DotKind::kBf16Bf16, 16, true, 0},
};

// The largest error of a product, as a share of the size of its terms.
double ErrorOf(const Case& what, const Shape& shape, const Pool& pool) {
  std::mt19937 random(shape.depth);
  std::normal_distribution<float> normal;
  const int64_t num_groups = what.group_size == 0 ? 0 : (shape.depth + what.group_size - 1) / what.group_size;
  const int64_t row_bytes = (shape.depth * what.weight_bits + 7) / 8;
  std::vector<uint8_t> weights(shape.rows * row_bytes);
  std::vector<uint16_t> group_scale(shape.rows * num_groups), x_bf16;
  std::vector<float> x(shape.tokens * shape.depth), row_scale, out(shape.tokens * shape.rows, NAN);
  for (float& number : x) number = Bf16ToFloat(CutToBf16(normal(random)));
  if (what.is_x_bf16) {
    for (float number : x) x_bf16.push_back(CutToBf16(number));
  }
  for (uint16_t& scale : group_scale) scale = CutToBf16(std::fabs(normal(random)) + 0.5f);
  if (what.weight_bits == 8) row_scale.assign(shape.rows, 0.25f);

  std::vector<double> w(shape.rows * shape.depth);
  for (int64_t row = 0; row < shape.rows; ++row) {
    uint8_t* bytes = weights.data() + row * row_bytes;
    for (int64_t k = 0; k < shape.depth; ++k) {
      double& value = w[row * shape.depth + k];
      if (what.weight_bits == 32) {
        const float number = normal(random);
        std::memcpy(bytes + 4 * k, &number, 4);
        value = number;
      } else if (what.weight_bits == 16) {
        const uint16_t number = CutToBf16(normal(random));
        std::memcpy(bytes + 2 * k, &number, 2);
        value = Bf16ToFloat(number);
      } else if (what.weight_bits == 8) {
        const int number = static_cast<int>(random() % 256) - 128;
        bytes[k] = static_cast<uint8_t>(number);
        value = number * 0.25;
      } else {
        const int number = static_cast<int>(random() % 16) - 8;
        bytes[k / 2] |= static_cast<uint8_t>((number & 15) << (k % 2 * 4));
        value = number * static_cast<double>(Bf16ToFloat(group_scale[row * num_groups + k / what.group_size]));
      }
    }
  }

  DotCall call{};
  call.kind = what.kind;
  call.num_tokens = shape.tokens;
  call.num_rows = shape.rows;
  call.depth = shape.depth;
  call.x = what.is_x_bf16 ? static_cast<const void*>(x_bf16.data()) : x.data();
  call.is_x_bf16 = what.is_x_bf16;
  call.weights = weights.data();
  call.weight_row_bytes = row_bytes;
  call.row_scale = row_scale.empty() ? nullptr : row_scale.data();
  call.group_scale = num_groups == 0 ? nullptr : group_scale.data();
  call.num_groups = num_groups;
  call.group_size = what.group_size;
  call.out = out.data();
  if (const char* problem = RunDot(pool, call)) {
    std::printf("%s: %s\n", what.name, problem);
    return INFINITY;
  }

  const bool is_rounded = what.kind == DotKind::kInt8Int8 || what.kind == DotKind::kInt4Int8;
  double worst = 0;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const float* token = x.data() + t * shape.depth;
    float largest = 0;
    for (int64_t k = 0; k < shape.depth; ++k) largest = std::fmax(largest, std::fabs(token[k]));
    const float scale = largest > 0 ? largest * (1.0f / 127.0f) : 1.0f, reciprocal = 1.0f / scale;
    std::vector<double> numbers(token, token + shape.depth);
    for (double& number : numbers) {
      // The product rounds to float32 before it rounds to an integer.
      volatile float quotient = static_cast<float>(number) * reciprocal;
      if (is_rounded) number = std::nearbyint(quotient) * static_cast<double>(scale);
    }
    for (int64_t row = 0; row < shape.rows; ++row) {
      double sum = 0, size = 1e-30;
      for (int64_t k = 0; k < shape.depth; ++k) {
        const double term = numbers[k] * w[row * shape.depth + k];
        sum += term;
        size += std::fabs(term);
      }
      const double error = std::fabs(out[t * shape.rows + row] - sum) / size;
      worst = error <= worst ? worst : error;  // NaN is an error too.
      if (std::isnan(error)) return INFINITY;
    }
  }
  return worst;
}

int Main() {
  if (const char* problem = IsaProblem()) {
    std::printf("%s\n", problem);
    return 2;
  }
  Threads threads;
  int failures = 0;
  for (const Case& what : kCases) {
    if (FindDotKernel(what.kind).run == nullptr) continue;
    for (const Shape& shape : kShapes) {
      const double error = ErrorOf(what, shape, threads.AsPool());
      if (error < 2e-6) continue;
      ++failures;
      std::printf("%s, [%ld, %ld] x [%ld, %ld]: off by %g\n", what.name, static_cast<long>(shape.tokens),
                  static_cast<long>(shape.depth), static_cast<long>(shape.rows), static_cast<long>(shape.depth), error);
    }
  }
  std::printf("%s: %s\n", NameOf(CurrentIsa()), failures == 0 ? "ok" : "wrong");
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastgpt

int main() { return fastgpt::Main(); }

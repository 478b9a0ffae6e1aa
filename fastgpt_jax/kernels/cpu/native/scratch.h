// Memory that a thread keeps from one call to the next.
#ifndef FASTGPT_KERNELS_CPU_SCRATCH_H_
#define FASTGPT_KERNELS_CPU_SCRATCH_H_

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastgpt {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `size` bytes, at a multiple of 64; what an earlier call got is gone.
  uint8_t* Get(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = (size + size / 4 + 63) / 64 * 64;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, size_));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace fastgpt

#endif  // FASTGPT_KERNELS_CPU_SCRATCH_H_

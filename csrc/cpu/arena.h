// Scratch memory comes from one block that Python allocated. A plan takes its buffers from an Arena; run on an arena
// without memory, the same code measures how much to allocate.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ff {

class Arena {
 public:
  explicit Arena(void *memory = nullptr) : base_(static_cast<char *>(memory)) {}

  // `count` elements of T, aligned to 64 bytes and followed by at least 128 readable bytes, so that kernels may load
  // whole vectors past the end.
  template <class T>
  T *take(int64_t count) {
    const size_t start = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 128 + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T *>(base_ + start);
  }

  int64_t bytes() const { return static_cast<int64_t>(used_); }

 private:
  char *base_;
  size_t used_ = 0;
};

}  // namespace ff

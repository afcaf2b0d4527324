// Large buffers that outlive their tensors. A training step allocates the same buffers every time; given back to the
// system, their pages would be faulted in and zeroed anew in every step. Buffers of a megabyte and more are made of
// huge pages where the system grants them. What is kept never exceeds half as much again as was ever in use at once.
#pragma once
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>

namespace ff {

class Buffers {
 public:
  // At least `bytes` bytes, aligned to a page; `size` receives how many, which give() needs.
  void *take(size_t bytes, size_t &size) {
    const size_t unit = bytes < kHuge / 2 ? kSmall : kHuge;
    size = (bytes + unit - 1) / unit * unit;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto fits = kept_.lower_bound(size);
    if (fits != kept_.end() && fits->first <= size + size / 4) {
      const auto newest = std::prev(kept_.upper_bound(fits->first));  // the likeliest to lie in a cache
      void *memory = newest->second;
      size = newest->first;
      kept_.erase(newest);
      kept_bytes_ -= size;
      count(size);
      return memory;
    }
    const size_t used = used_ + size, most = std::max(most_used_, used) + std::max(most_used_, used) / 2;
    release(most - std::min(most, used));
    void *memory = map(size);
    if (memory == nullptr) release(0), memory = map(size);
    if (memory == nullptr) throw std::bad_alloc();  // and what there is not does not count
    count(size);
    return memory;
  }

  void give(void *memory, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= size;
    kept_bytes_ += size;
    kept_.emplace(size, memory);
  }

  // Returns all that is not in use to the system.
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    release(0);
    most_used_ = used_;
  }

  size_t used() const { return used_; }
  size_t kept() const { return kept_bytes_; }

  // Never destroyed: tensors may outlive static objects.
  static Buffers &instance() {
    static Buffers *const buffers = new Buffers;
    return *buffers;
  }

 private:
  static constexpr size_t kSmall = size_t(1) << 16, kHuge = size_t(1) << 21;

  void count(size_t size) { most_used_ = std::max(most_used_, used_ += size); }

  // Keeps at most `bytes` of what is not in use.
  void release(size_t bytes) {
    while (kept_bytes_ > bytes) {
      const auto largest = std::prev(kept_.end());
      munmap(largest->second, largest->first);
      kept_bytes_ -= largest->first;
      kept_.erase(largest);
    }
  }

  static void *map(size_t size) {
    const size_t slack = size % kHuge == 0 ? kHuge : 0;
    void *const mapped = mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    if (slack == 0) return mapped;
    char *const first = static_cast<char *>(mapped);
    const size_t before = (kHuge - reinterpret_cast<uintptr_t>(first) % kHuge) % kHuge;
    if (before > 0) munmap(first, before);
    if (before < slack) munmap(first + before + size, slack - before);
#ifdef MADV_HUGEPAGE
    madvise(first + before, size, MADV_HUGEPAGE);
#endif
    return first + before;
  }

  std::mutex mutex_;
  std::multimap<size_t, void *> kept_;
  size_t used_ = 0, kept_bytes_ = 0, most_used_ = 0;
};

// The structures of DLPack (https://dmlc.github.io/dlpack), by which PyTorch takes over memory with a deleter.
struct DLTensor {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void *context;
  void (*deleter)(DLManagedTensor *);
};

// A 4-dimensional tensor in a buffer of its own.
struct BufferTensor {
  static constexpr int kDimensions = 4;
  DLManagedTensor managed;
  int64_t shape[kDimensions], strides[kDimensions];
  void *memory;
  size_t size;

  static void free(DLManagedTensor *managed) {
    BufferTensor *const self = static_cast<BufferTensor *>(managed->context);
    Buffers::instance().give(self->memory, self->size);
    delete self;
  }
};

// (batch, channels, height, width) floating point numbers in NHWC order, as a DLPack capsule.
inline pybind11::capsule buffer_nhwc(int64_t batch, int64_t channels, int64_t height, int64_t width, int itemsize) {
  auto *const self = new BufferTensor{
      {}, {batch, channels, height, width}, {height * width * channels, 1, width * channels, channels}, nullptr, 0};
  try {
    self->memory =
        Buffers::instance().take(static_cast<size_t>(batch * channels * height * width * itemsize), self->size);
  } catch (...) {
    delete self;
    throw;
  }
  constexpr int32_t kCpu = 1;
  constexpr uint8_t kFloat = 2;
  self->managed.tensor = {
      self->memory, kCpu,          0, BufferTensor::kDimensions, kFloat, static_cast<uint8_t>(8 * itemsize), 1,
      self->shape,  self->strides, 0};
  self->managed.context = self;
  self->managed.deleter = BufferTensor::free;
  return pybind11::capsule(&self->managed, "dltensor", [](PyObject *capsule) {
    // Whoever took the tensor over has renamed the capsule.
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    BufferTensor::free(static_cast<DLManagedTensor *>(PyCapsule_GetPointer(capsule, "dltensor")));
  });
}

}  // namespace ff

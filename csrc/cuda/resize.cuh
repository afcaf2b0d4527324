// Bilinear resizing along one axis.
#ifndef FF_CUDA_RESIZE_CUH
#define FF_CUDA_RESIZE_CUH

#include <cuda_runtime.h>

#include <cstdint>

namespace ff {

// Taps of the triangle filter around output i, widened by the reduction unless `antialias` is false. The centre is kept
// as a whole pixel and a fraction, so that float32 weights are exact to their last bits at any image size.
struct Taps {
  int base, first, last;
  float offset, support, total;

  __device__ Taps(int i, int source, int target, bool antialias = true) {
    const int64_t numerator = (2 * int64_t(i) + 1) * source, denominator = 2 * int64_t(target);
    base = static_cast<int>(numerator / denominator);
    offset = static_cast<float>(numerator % denominator) / static_cast<float>(denominator);
    support = antialias && source > target ? static_cast<float>(source) / static_cast<float>(target) : 1.0f;
    first = max(0, base + static_cast<int>(floorf(offset - support - 0.5f)));
    last = min(source - 1, base + static_cast<int>(ceilf(offset + support - 0.5f)));
    total = 0;
    for (int k = first; k <= last; ++k) total += weight(k);
  }

  __device__ float weight(int k) const {
    const float distance = fabsf(static_cast<float>(k - base) + 0.5f - offset);
    return distance < support ? 1.0f - distance / support : 0.0f;
  }
};

}  // namespace ff

#endif

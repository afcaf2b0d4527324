// Between the predictors' maps of one level, (batch, pixels, anchors * 16) with boxes, classes and landmarks one after
// the other, and rows of boxes, classes and landmarks. One thread moves one number, in the order of the maps.
#include "channels.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 65536;

struct Level {
  int64_t pixels, first_row, rows, values;
  int anchors;
  bool softmax;
};

// Which output a number of the maps belongs to, by its values per anchor, and its place there.
struct Target {
  int per_anchor;  // 4: box, 2: class, 10: landmarks
  int64_t place;

  __device__ Target(const Level &level, int64_t i) {
    const int channels = level.anchors * 16;
    int c = static_cast<int>(i % channels);
    const int64_t pixel = i / channels % level.pixels, image = i / channels / level.pixels;
    per_anchor = c < level.anchors * 4 ? 4 : c < level.anchors * 6 ? 2 : 10;
    c -= per_anchor == 4 ? 0 : level.anchors * (per_anchor == 2 ? 4 : 6);
    place = (image * level.rows + level.first_row + pixel * level.anchors) * per_anchor + c;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) scatter_kernel(Level level, const T *__restrict__ z, T *__restrict__ bbox,
                                                           T *__restrict__ cls, T *__restrict__ landmarks) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < level.values; i += int64_t(gridDim.x) * kThreads) {
    const Target at(level, i);
    T *out = at.per_anchor == 4 ? bbox : at.per_anchor == 2 ? cls : landmarks;
    if (at.per_anchor == 2 && level.softmax)
      // The classes of an anchor are neighbours, and begin at an even place.
      out[at.place] = ff::from_float<T>(1 / (1 + expf(ff::to_float(z[i ^ 1]) - ff::to_float(z[i]))));
    else
      out[at.place] = z[i];
  }
}

// Gradients; those of outputs that nothing used are null. probabilities: cls of a softmax, else null.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Level level, const T *__restrict__ bbox, const T *__restrict__ cls, const T *__restrict__ landmarks,
                  const T *__restrict__ probabilities, T *__restrict__ z) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < level.values; i += int64_t(gridDim.x) * kThreads) {
    const Target at(level, i);
    const T *from = at.per_anchor == 4 ? bbox : at.per_anchor == 2 ? cls : landmarks;
    float g = from == nullptr ? 0.0f : ff::to_float(from[at.place]);
    if (at.per_anchor == 2 && probabilities != nullptr && from != nullptr) {
      const float other = ff::to_float(from[at.place ^ 1]);
      g = (g - other) * ff::to_float(probabilities[at.place]) * ff::to_float(probabilities[at.place ^ 1]);
    }
    z[i] = ff::from_float<T>(g);
  }
}

}  // namespace

extern "C" int ff_cuda_multi_head_scatter(const void *z, int64_t batch, int64_t pixels, int64_t anchors, int softmax,
                                          void *bbox, void *cls, void *landmarks, int64_t first_row, int64_t rows,
                                          int dtype, void *stream) {
  const Level level{pixels, first_row, rows, batch * pixels * anchors * 16, int(anchors), softmax != 0};
  if (level.values == 0) return FF_OK;
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    scatter_kernel<T>
        <<<ff::blocks_for(level.values, kThreads, kMostBlocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            level, static_cast<const T *>(z), static_cast<T *>(bbox), static_cast<T *>(cls),
            static_cast<T *>(landmarks));
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_multi_head_gather(const void *bbox, const void *cls, const void *landmarks,
                                         const void *probabilities, int64_t batch, int64_t pixels, int64_t anchors,
                                         void *z, int64_t first_row, int64_t rows, int dtype, void *stream) {
  const Level level{pixels, first_row, rows, batch * pixels * anchors * 16, int(anchors), probabilities != nullptr};
  if (level.values == 0) return FF_OK;
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    gather_kernel<T>
        <<<ff::blocks_for(level.values, kThreads, kMostBlocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            level, static_cast<const T *>(bbox), static_cast<const T *>(cls), static_cast<const T *>(landmarks),
            static_cast<const T *>(probabilities), static_cast<T *>(z));
    return cudaGetLastError();
  });
}

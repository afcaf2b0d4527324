// The seams between convolutions whose outputs are concatenated and shuffled, on NHWC tensors: up to three raw outputs
// become one, normalised and activated, and the gradient of that one becomes those of the normalised outputs.
#include "channels.cuh"

namespace {

constexpr int kThreads = 256, kBranches = 3;
constexpr int64_t kMostBlocks = 65536;

// A raw output (pixels, norm.channels), or its gradient. Channel c of the concatenation is channel c - first of it.
struct Branch {
  const void *z;
  void *grad;
  ff::Norm norm;
  int first;
};

struct Seam {
  Branch branches[kBranches];
  int channels, groups;

  // Channel of the shuffled output where channel c of the concatenation goes, and back.
  __device__ __forceinline__ int shuffled(int c) const {
    return c % (channels / groups) * groups + c / (channels / groups);
  }
  __device__ __forceinline__ int source(int o) const { return o % groups * (channels / groups) + o / groups; }
  __device__ __forceinline__ const Branch &branch(int c) const {
    return branches[c < branches[1].first ? 0 : c < branches[2].first ? 1 : 2];
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) join_kernel(Seam seam, T *__restrict__ y, int64_t packs) {
  const int per_pixel = seam.channels / V;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < packs; i += int64_t(gridDim.x) * kThreads) {
    const int64_t pixel = i / per_pixel;
    ff::Pack<T, V> values;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int c = seam.source(static_cast<int>(i % per_pixel) * V + j);
      const Branch &from = seam.branch(c);
      const float v = ff::to_float(static_cast<const T *>(from.z)[pixel * from.norm.channels + c - from.first]);
      values.v[j] = ff::from_float<T>(ff::finish(from.norm, v, c - from.first));
    }
    reinterpret_cast<ff::Pack<T, V> *>(y)[i] = values;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) split_kernel(Seam seam, const T *__restrict__ grad, int64_t packs) {
  using Pack = ff::Pack<T, V>;
  const int per_pixel = seam.channels / V;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < packs; i += int64_t(gridDim.x) * kThreads) {
    const int64_t pixel = i / per_pixel;
    const int c = static_cast<int>(i % per_pixel) * V;
    const Branch &to = seam.branch(c);
    const int64_t at = pixel * to.norm.channels + c - to.first;
    Pack values = *reinterpret_cast<const Pack *>(static_cast<const T *>(to.z) + at);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float g = ff::to_float(grad[pixel * seam.channels + seam.shuffled(c + j)]);
      values.v[j] = ff::from_float<T>(ff::finish_gradient(to.norm, g, ff::to_float(values.v[j]), c + j - to.first));
    }
    *reinterpret_cast<Pack *>(static_cast<T *>(to.grad) + at) = values;
  }
}

Seam make_seam(const void *z0, int64_t channels0, const void *stats0, const void *z1, int64_t channels1,
               const void *stats1, const void *z2, int64_t channels2, const void *stats2, int activation,
               int64_t groups) {
  return Seam{{{z0, nullptr, ff::make_norm(stats0, channels0, activation, 0), 0},
               {z1, nullptr, ff::make_norm(stats1, channels1, activation, 0), int(channels0)},
               {z2, nullptr, ff::make_norm(stats2, channels2, activation, 0), int(channels0 + channels1)}},
              int(channels0 + channels1 + channels2),
              int(groups)};
}

}  // namespace

extern "C" int ff_cuda_seam_join(const void *z0, int64_t channels0, const void *stats0, const void *z1,
                                 int64_t channels1, const void *stats1, const void *z2, int64_t channels2,
                                 const void *stats2, int activation, int64_t pixels, int64_t groups, void *y, int dtype,
                                 void *stream) {
  const Seam seam = make_seam(z0, channels0, stats0, z1, channels1, stats1, z2, channels2, stats2, activation, groups);
  if (groups < 1 || seam.channels % groups != 0) return FF_BAD_ARGUMENT;
  return ff::dispatch_packs(dtype, seam.channels, {y}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const int64_t packs = pixels * seam.channels / V;
    join_kernel<T, V><<<ff::blocks_for(packs, kThreads, kMostBlocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        seam, static_cast<T *>(y), packs);
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_seam_split(const void *grad, const void *z0, int64_t channels0, const void *stats0,
                                  const void *z1, int64_t channels1, const void *stats1, const void *z2,
                                  int64_t channels2, const void *stats2, int activation, int64_t pixels, int64_t groups,
                                  void *g0, void *g1, void *g2, int dtype, void *stream) {
  Seam seam = make_seam(z0, channels0, stats0, z1, channels1, stats1, z2, channels2, stats2, activation, groups);
  if (groups < 1 || seam.channels % groups != 0) return FF_BAD_ARGUMENT;
  seam.branches[0].grad = g0;
  seam.branches[1].grad = g1;
  seam.branches[2].grad = g2;
  // 2^k lanes divide all three counts where they divide this.
  const int64_t counts = channels0 | channels1 | channels2;
  return ff::dispatch_packs(dtype, counts, {z0, z1, z2, g0, g1, g2}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const int64_t packs = pixels * seam.channels / V;
    split_kernel<T, V>
        <<<ff::blocks_for(packs, kThreads, kMostBlocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            seam, static_cast<const T *>(grad), packs);
    return cudaGetLastError();
  });
}

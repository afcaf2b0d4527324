// Batch normalisation around convolutions, tensors in NHWC: statistics of a batch, their application, and the sums and
// the elementwise part of the backward pass. Reductions are in two stages of fixed order, so results are reproducible.
#include "channels.cuh"

namespace {

constexpr int kLanes = 32, kRows = 8, kThreads = 256;
constexpr int64_t kMostBlocks = 512, kMostPackBlocks = 65536;

int64_t slices_for(int64_t pixels) { return ff::blocks_for(pixels, 16 * kRows, kMostBlocks); }

// A reduction's lanes: `span` neighbouring channels of kLanes / span neighbouring pixels.
int span_of(int64_t channels) {
  int span = 1;
  while (span < channels && span < kLanes) span *= 2;
  return span;
}

struct Walk {
  int c, step;
  int64_t first;
  int64_t stride;

  __device__ explicit Walk(int span)
      : c(blockIdx.y * span + threadIdx.x % span),
        step(kLanes / span),
        first((int64_t(blockIdx.x) * kRows + threadIdx.y) * step + threadIdx.x / span),
        stride(int64_t(gridDim.x) * kRows * step) {}
};

__device__ __forceinline__ void write_coefficients(float *stats, int channels, int c, float mean, float variance,
                                                   float weight, float bias, float eps) {
  stats[c] = mean;
  stats[channels + c] = variance;
  stats[2 * channels + c] = weight / sqrtf(variance + eps);
  stats[3 * channels + c] = bias;
}

// Batch normalisations whose coefficients one launch computes.
constexpr int kMostLayers = 32, kFields = 7;
struct Layers {
  const void *mean[kMostLayers], *variance[kMostLayers], *weight[kMostLayers], *bias[kMostLayers];
  float *stats[kMostLayers];
  float eps[kMostLayers];
  int channels[kMostLayers], dtype[kMostLayers];
};

// grid: (blocks of channels, layers).
__global__ void coefficients_kernel(Layers layers) {
  const int layer = blockIdx.y, channels = layers.channels[layer], c = blockIdx.x * kThreads + threadIdx.x;
  if (c >= channels) return;
  const auto value = [&](const void *const(&tensors)[kMostLayers], float absent) {
    return ff::Numbers{tensors[layer], layers.dtype[layer]}.at(c, absent);
  };
  write_coefficients(layers.stats[layer], channels, c, value(layers.mean, 0), value(layers.variance, 0),
                     value(layers.weight, 1), value(layers.bias, 0), layers.eps[layer]);
}

// Count, mean and sum of squared deviations of values; combined as in Chan, Golub and LeVeque (1983).
struct Moments {
  double count, mean, squares;

  __device__ __forceinline__ void add(const Moments &other) {
    if (other.count == 0) return;
    const double total = count + other.count, difference = other.mean - mean;
    mean += difference * (other.count / total);
    squares += other.squares + difference * difference * (count * (other.count / total));
    count = total;
  }
};

// z: (pixels, channels) -> partial: (slices, channels). A block takes `span` channels and one slice of the pixels.
template <class T>
__global__ void __launch_bounds__(kLanes *kRows)
    moments_kernel(const T *__restrict__ z, int64_t pixels, int channels, int span, Moments *__restrict__ partial) {
  __shared__ Moments rows[kRows][kLanes];
  const Walk walk(span);
  Moments sum{0, 0, 0};
  if (walk.c < channels && walk.first < pixels) {
    // Deviations from the first value: the mean of 1e4 +- 1e-2 is as exact as that of +- 1e-2.
    const float pivot = ff::to_float(z[walk.first * channels + walk.c]);
    double deviations = 0, squares = 0;
#pragma unroll 4
    for (int64_t p = walk.first; p < pixels; p += walk.stride) {
      const double d = ff::to_float(z[p * channels + walk.c]) - pivot;
      deviations += d;
      squares += d * d;
    }
    sum.count = static_cast<double>((pixels - walk.first + walk.stride - 1) / walk.stride);
    sum.mean = pivot + deviations / sum.count;
    sum.squares = squares - deviations * (deviations / sum.count);
  }
  rows[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || threadIdx.x >= span || walk.c >= channels) return;
  for (int row = 0; row < kRows; ++row)
    for (int lane = threadIdx.x; lane < kLanes; lane += span)
      if (row != 0 || lane != threadIdx.x) sum.add(rows[row][lane]);
  partial[int64_t(blockIdx.x) * channels + walk.c] = sum;
}

// Every row of a block adds every kRows-th slice.
__global__ void __launch_bounds__(kLanes *kRows)
    statistics_kernel(const Moments *__restrict__ partial, int slices, int channels, ff::Numbers weight,
                      ff::Numbers bias, float eps, float *__restrict__ stats) {
  __shared__ Moments rows[kRows][kLanes];
  const int c = blockIdx.x * kLanes + threadIdx.x;
  Moments all{0, 0, 0};
  if (c < channels)
    for (int slice = threadIdx.y; slice < slices; slice += kRows) all.add(partial[int64_t(slice) * channels + c]);
  rows[threadIdx.y][threadIdx.x] = all;
  __syncthreads();
  if (threadIdx.y != 0 || c >= channels) return;
  for (int row = 1; row < kRows; ++row) all.add(rows[row][threadIdx.x]);
  write_coefficients(stats, channels, c, static_cast<float>(all.mean), static_cast<float>(all.squares / all.count),
                     weight.at(c, 1), bias.at(c, 0), eps);
}

// Calls function(pack, first channel, whether that is another one than before) for a thread's packs of V channels.
template <int V, class F>
__device__ __forceinline__ void each_pack(int channels, int64_t packs, F function) {
  const int per_pixel = channels / V;
  const int64_t first = blockIdx.x * int64_t(kThreads) + threadIdx.x, stride = int64_t(gridDim.x) * kThreads;
  const int step = static_cast<int>(stride % per_pixel);
  int place = static_cast<int>(first % per_pixel);
  bool other = true;
  for (int64_t i = first; i < packs; i += stride) {
    function(i, place * V, other);
    place += step;
    if (place >= per_pixel) place -= per_pixel;
    other = step != 0;
  }
}

// y = activation((z - mean) * scale + shift); y may be z.
template <class T, int V>
__global__ void apply_kernel(const T *z, ff::Norm norm, T *y, int64_t packs) {
  using Pack = ff::Pack<T, V>;
  ff::NormPack<V> apply(norm, 0);
  each_pack<V>(norm.channels, packs, [&](int64_t i, int c, bool other) {
    if (other) apply = ff::NormPack<V>(norm, c);
    Pack values = reinterpret_cast<const Pack *>(z)[i];
    apply.apply(values);
    reinterpret_cast<Pack *>(y)[i] = values;
  });
}

// partial: (slices, 2, channels), sums of g and of g * (z - mean), g the gradient of the normalisation's output.
template <class T>
__global__ void __launch_bounds__(kLanes *kRows)
    reduce_kernel(const T *__restrict__ grad, const T *__restrict__ z, ff::Norm norm, int64_t pixels, int span,
                  double *__restrict__ partial) {
  __shared__ double rows[kRows][2][kLanes];
  const int channels = norm.channels;
  const Walk walk(span);
  double sum = 0, product = 0;
  if (walk.c < channels) {
    const ff::NormPack<1> at(norm, walk.c);
#pragma unroll 4
    for (int64_t p = walk.first; p < pixels; p += walk.stride) {
      float v[1] = {ff::to_float(z[p * channels + walk.c])}, g[1] = {ff::to_float(grad[p * channels + walk.c])};
      const float deviation = v[0] - at.mean[0];
      at.gradient(g, v);
      sum += g[0];
      product += double(g[0]) * deviation;
    }
  }
  rows[threadIdx.y][0][threadIdx.x] = sum;
  rows[threadIdx.y][1][threadIdx.x] = product;
  __syncthreads();
  if (threadIdx.y > 1 || threadIdx.x >= span || walk.c >= channels) return;
  double total = 0;
  for (int row = 0; row < kRows; ++row)
    for (int lane = threadIdx.x; lane < kLanes; lane += span) total += rows[row][threadIdx.y][lane];
  partial[(int64_t(blockIdx.x) * 2 + threadIdx.y) * channels + walk.c] = total;
}

__global__ void __launch_bounds__(kLanes *kRows)
    sum_slices_kernel(const double *__restrict__ partial, int slices, int values, double *__restrict__ sums) {
  __shared__ double rows[kRows][kLanes];
  const int i = blockIdx.x * kLanes + threadIdx.x;
  double total = 0;
  if (i < values)
    for (int slice = threadIdx.y; slice < slices; slice += kRows) total += partial[int64_t(slice) * values + i];
  rows[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || i >= values) return;
  for (int row = 1; row < kRows; ++row) total += rows[row][threadIdx.x];
  sums[i] = total;
}

// The gradient of z. sums (2, channels): as above, where the statistics were the batch's own; null where they were
// given.
template <class T, int V>
__global__ void backward_kernel(const T *grad, const T *z, ff::Norm norm, const double *__restrict__ sums, double eps,
                                double inverse_count, T *out, int64_t packs) {
  using Pack = ff::Pack<T, V>;
  ff::NormPack<V> at(norm, 0);
  double mean_gradient[V] = {}, slope[V] = {};
  each_pack<V>(norm.channels, packs, [&](int64_t i, int c, bool other) {
    if (other) {
      at = ff::NormPack<V>(norm, c);
      if (sums != nullptr)
#pragma unroll
        for (int j = 0; j < V; ++j) {
          mean_gradient[j] = sums[c + j] * inverse_count;
          slope[j] = sums[norm.channels + c + j] * inverse_count / (double(norm.variance(c + j)) + eps);
        }
    }
    Pack values = reinterpret_cast<const Pack *>(grad)[i];
    const Pack raw = reinterpret_cast<const Pack *>(z)[i];
    float g[V], v[V], deviation[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      g[j] = ff::to_float(values.v[j]);
      v[j] = ff::to_float(raw.v[j]);
      deviation[j] = v[j] - at.mean[j];
    }
    at.gradient(g, v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      // In double: weight gradients behind a normalisation are small differences of large sums of these.
      if (sums != nullptr) g[j] = static_cast<float>(g[j] - mean_gradient[j] - deviation[j] * slope[j]);
      values.v[j] = ff::from_float<T>(g[j] * at.scale[j]);
    }
    reinterpret_cast<Pack *>(out)[i] = values;
  });
}

dim3 reduction_grid(int64_t pixels, int64_t channels) {
  return dim3(static_cast<unsigned>(slices_for(pixels)),
              static_cast<unsigned>(ff::ceil_div(channels, span_of(channels))));
}

bool too_many(int64_t channels) { return channels > int64_t(65535) * kLanes; }

}  // namespace

extern "C" int ff_cuda_batch_norm_coefficients(const int64_t *layers, const double *eps, int64_t count, void *stream) {
  for (int64_t first = 0; first < count; first += kMostLayers) {
    Layers some{};
    const int number = static_cast<int>(count - first < kMostLayers ? count - first : kMostLayers);
    int64_t widest = 0;
    for (int i = 0; i < number; ++i) {
      const int64_t *f = layers + (first + i) * kFields;
      const auto tensor = [f](int field) { return reinterpret_cast<const void *>(f[field]); };
      if (f[4] < 1 || too_many(f[4])) return FF_BAD_ARGUMENT;
      if (!ff::known(static_cast<int>(f[5]))) return FF_UNSUPPORTED_DTYPE;
      some.mean[i] = tensor(0);
      some.variance[i] = tensor(1);
      some.weight[i] = tensor(2);
      some.bias[i] = tensor(3);
      some.channels[i] = static_cast<int>(f[4]);
      some.dtype[i] = static_cast<int>(f[5]);
      some.eps[i] = static_cast<float>(eps[first + i]);
      some.stats[i] = reinterpret_cast<float *>(f[6]);
      widest = f[4] > widest ? f[4] : widest;
    }
    const dim3 grid(ff::blocks_for(widest, kThreads, INT32_MAX), static_cast<unsigned>(number));
    coefficients_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(some);
    if (const int code = cudaGetLastError(); code != FF_OK) return code;
  }
  return FF_OK;
}

extern "C" int64_t ff_cuda_batch_norm_workspace(int64_t pixels, int64_t channels) {
  return slices_for(pixels) * channels * int64_t(sizeof(Moments));
}

extern "C" int ff_cuda_batch_norm_statistics(const void *z, const void *weight, const void *bias, double eps,
                                             void *stats, int64_t pixels, int64_t channels, void *workspace, int dtype,
                                             int affine_dtype, void *stream) {
  if (too_many(channels)) return FF_BAD_ARGUMENT;
  if (!ff::known(affine_dtype)) return FF_UNSUPPORTED_DTYPE;
  if (pixels == 0) return FF_OK;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  Moments *partial = static_cast<Moments *>(workspace);
  const int count = static_cast<int>(channels);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    moments_kernel<T><<<reduction_grid(pixels, channels), dim3(kLanes, kRows), 0, s>>>(
        static_cast<const T *>(z), pixels, count, span_of(channels), partial);
    statistics_kernel<<<ff::blocks_for(channels, kLanes, INT32_MAX), dim3(kLanes, kRows), 0, s>>>(
        partial, static_cast<int>(slices_for(pixels)), count, ff::Numbers{weight, affine_dtype},
        ff::Numbers{bias, affine_dtype}, static_cast<float>(eps), static_cast<float *>(stats));
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_batch_norm_apply(const void *z, const void *stats, int activation, double slope, void *y,
                                        int64_t pixels, int64_t channels, int dtype, void *stream) {
  if (too_many(channels)) return FF_BAD_ARGUMENT;
  if (pixels == 0) return FF_OK;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  const ff::Norm norm = ff::make_norm(stats, channels, activation, slope);
  return ff::dispatch_packs(dtype, channels, {z, y}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const int64_t packs = pixels * channels / V;
    apply_kernel<T, V><<<ff::blocks_for(packs, kThreads, kMostPackBlocks), kThreads, 0, s>>>(
        static_cast<const T *>(z), norm, static_cast<T *>(y), packs);
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_batch_norm_reduce(const void *grad, const void *z, const void *stats, int activation,
                                         double slope, double *sums, int64_t pixels, int64_t channels, void *workspace,
                                         int dtype, void *stream) {
  if (too_many(channels)) return FF_BAD_ARGUMENT;
  if (pixels == 0) return FF_OK;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  double *partial = static_cast<double *>(workspace);
  const ff::Norm norm = ff::make_norm(stats, channels, activation, slope);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    reduce_kernel<T><<<reduction_grid(pixels, channels), dim3(kLanes, kRows), 0, s>>>(
        static_cast<const T *>(grad), static_cast<const T *>(z), norm, pixels, span_of(channels), partial);
    sum_slices_kernel<<<ff::blocks_for(2 * channels, kLanes, INT32_MAX), dim3(kLanes, kRows), 0, s>>>(
        partial, static_cast<int>(slices_for(pixels)), static_cast<int>(2 * channels), sums);
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_batch_norm_backward(const void *grad, const void *z, const void *stats, const double *sums,
                                           int activation, double slope, double eps, void *out, int64_t pixels,
                                           int64_t channels, int dtype, void *stream) {
  if (too_many(channels)) return FF_BAD_ARGUMENT;
  if (pixels == 0) return FF_OK;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  const ff::Norm norm = ff::make_norm(stats, channels, activation, slope);
  const double inverse_count = 1.0 / static_cast<double>(pixels);
  return ff::dispatch_packs(dtype, channels, {grad, z, out}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const int64_t packs = pixels * channels / V;
    backward_kernel<T, V><<<ff::blocks_for(packs, kThreads, kMostPackBlocks), kThreads, 0, s>>>(
        static_cast<const T *>(grad), static_cast<const T *>(z), norm, sums, eps, inverse_count, static_cast<T *>(out),
        packs);
    return cudaGetLastError();
  });
}

// Modulated deformable convolution (DCNv2) of NHWC tensors, forward and backward: products of matrices in shared
// memory, of which one is sampled as it is loaded. A block takes kRows output pixels, a tap at a time.
//
// The gradient of the input scatters in an order that nobody knows. It is summed in 64-bit integers, whose sum does not
// depend on the order; the unit comes from the largest summand, which a first pass finds.
#include <climits>

#include "channels.cuh"
#include "slices.cuh"

namespace {

constexpr int kRows = 32, kDepth = 32, kThreads = 128, kWarps = kThreads / 32;
constexpr int kAcross = 16, kDown = 4;  // threads along a tile's columns, rows of a thread
constexpr int kNeighbours = 4;          // upper left, upper right, lower left, lower right
constexpr int64_t kRowsPerSlice = 1024, kMostSlices = 256;

struct Shape {
  int batch, channels, height, width, out_channels, kernel_h, kernel_w, stride, padding, out_height, out_width;

  __host__ __device__ int taps() const { return kernel_h * kernel_w; }
  __host__ __device__ int rows() const { return batch * out_height * out_width; }
  int64_t weights() const { return int64_t(out_channels) * channels * taps(); }
  int slices() const { return static_cast<int>(ff::blocks_for(rows(), kRowsPerSlice, kMostSlices)); }
};

// Where one tap of kRows pixels reads.
struct Places {
  int pixel[kNeighbours][kRows];  // of the batch, or -1 outside the image
  float below[kRows], right[kRows], factor[kRows];

  __device__ __forceinline__ float weight(int neighbour, int row) const {
    return (neighbour / 2 ? below[row] : 1 - below[row]) * (neighbour % 2 ? right[row] : 1 - right[row]);
  }
  template <class T>
  __device__ __forceinline__ float value(int neighbour, int row, const T *__restrict__ x, int channels, int c) const {
    const int at = pixel[neighbour][row];
    return at < 0 ? 0.0f : ff::to_float(x[int64_t(at) * channels + c]);
  }
};

// Rows past the last one read zeros everywhere.
template <class T>
__device__ void locate(const Shape &s, const T *__restrict__ offset, const T *__restrict__ mask, int first, int tap,
                       Places &places) {
  const int i = threadIdx.x, row = first + i;
  if (i >= kRows) return;
  float y = -2, x = -2, factor = 0;
  int image = 0;
  if (row < s.rows()) {
    const int64_t at = int64_t(row) * s.taps() + tap;
    y = ff::to_float(offset[2 * at]) +
        float(row / s.out_width % s.out_height * s.stride - s.padding + tap / s.kernel_w);
    x = ff::to_float(offset[2 * at + 1]) + float(row % s.out_width * s.stride - s.padding + tap % s.kernel_w);
    factor = ff::to_float(mask[at]);
    image = row / s.out_width / s.out_height;
  }
  const float top = floorf(y), left = floorf(x);
  places.below[i] = y - top;
  places.right[i] = x - left;
  places.factor[i] = factor;
  // A NaN fails both comparisons and is outside; its weights stay NaN.
  const int upper = top >= -1 && top < float(s.height) ? int(top) : -2;
  const int before = left >= -1 && left < float(s.width) ? int(left) : -2;
#pragma unroll
  for (int k = 0; k < kNeighbours; ++k) {
    const int r = upper + k / 2, c = before + k % 2;
    const bool inside = upper > -2 && before > -2 && r >= 0 && r < s.height && c >= 0 && c < s.width;
    places.pixel[k][i] = inside ? (image * s.height + r) * s.width + c : -1;
  }
}

using Tile = float[kDepth][kRows + 1];  // odd rows: no bank conflicts

// samples[c][row] or, Transposed, [row][c]: bilinear values times the mask of channels first, first + 1, ...; zero past
// the last channel.
template <bool Transposed, class T>
__device__ void stage_samples(const Shape &s, const T *__restrict__ x, const Places &places, int first, Tile &samples) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
    const int c = i % kDepth, row = i / kDepth;
    float v = 0;
    if (first + c < s.channels) {
#pragma unroll
      for (int k = 0; k < kNeighbours; ++k) v += places.weight(k, row) * places.value(k, row, x, s.channels, first + c);
      v *= places.factor[row];
    }
    samples[Transposed ? row : c][Transposed ? c : row] = v;
  }
}

// gradients[o][row] or, Transposed, [row][o] of output channels first_out, ...; zero past the last row and channel.
template <bool Transposed, class T>
__device__ void stage_gradients(const Shape &s, const T *__restrict__ grad, int first_row, int first_out,
                                Tile &gradients) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
    const int o = i % kDepth, row = i / kDepth;
    const bool valid = first_row + row < s.rows() && first_out + o < s.out_channels;
    gradients[Transposed ? row : o][Transposed ? o : row] =
        valid ? ff::to_float(grad[int64_t(first_row + row) * s.out_channels + first_out + o]) : 0.0f;
  }
}

// at(c, o) = the weight of a tap from input channel first + c to output channel first_out + o; zero past the last ones.
template <int N, class T, class F>
__device__ __forceinline__ void stage_weights(const Shape &s, const T *__restrict__ weight, int tap, int first,
                                              int first_out, F at) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kDepth * N; i += kThreads) {
    const int c = i % kDepth, o = i / kDepth;
    const bool valid = first + c < s.channels && first_out + o < s.out_channels;
    at(c, o) = valid ? ff::to_float(weight[(int64_t(first_out + o) * s.channels + first + c) * s.taps() + tap]) : 0.0f;
  }
}

// sum[i][j] += the product's element (kDown * (thread / kAcross) + i, thread % kAcross + kAcross * j).
template <int N>
__device__ __forceinline__ void multiply(const float (&a)[kDepth][kRows + 1], const float (&b)[kDepth][N + 1],
                                         float (&sum)[kDown][N / kAcross]) {
  const int row = threadIdx.x / kAcross * kDown, column = threadIdx.x % kAcross;
#pragma unroll 8
  for (int d = 0; d < kDepth; ++d) {
#pragma unroll
    for (int j = 0; j < N / kAcross; ++j) {
      const float factor = b[d][column + kAcross * j];
#pragma unroll
      for (int i = 0; i < kDown; ++i) sum[i][j] += a[d][row + i] * factor;
    }
  }
}

// grid: (tiles, ceil(out_channels / N)).
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    deform_kernel(Shape s, const T *__restrict__ x, const T *__restrict__ offset, const T *__restrict__ mask,
                  const T *__restrict__ weight, const T *__restrict__ bias, ff::Norm norm, T *__restrict__ z) {
  __shared__ Places places;
  __shared__ float samples[kDepth][kRows + 1];
  __shared__ float weights[kDepth][N + 1];
  const int first_row = blockIdx.x * kRows, first_out = blockIdx.y * N;
  float sum[kDown][N / kAcross] = {};
  for (int tap = 0; tap < s.taps(); ++tap) {
    __syncthreads();
    locate(s, offset, mask, first_row, tap, places);
    for (int first = 0; first < s.channels; first += kDepth) {
      __syncthreads();
      stage_samples<false>(s, x, places, first, samples);
      stage_weights<N>(s, weight, tap, first, first_out, [&](int c, int o) -> float & { return weights[c][o]; });
      __syncthreads();
      multiply<N>(samples, weights, sum);
    }
  }
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int j = 0; j < N / kAcross; ++j) {
      const int row = first_row + threadIdx.x / kAcross * kDown + i;
      const int o = first_out + threadIdx.x % kAcross + kAcross * j;
      if (row >= s.rows() || o >= s.out_channels) continue;
      const float v = bias == nullptr ? sum[i][j] : sum[i][j] + ff::to_float(bias[o]);
      z[int64_t(row) * s.out_channels + o] = ff::from_float<T>(ff::finish(norm, v, o));
    }
}

// The second launch bound: without it the compiler spills a register or two to reach a higher occupancy.
// grid: (tiles, taps). largest: the largest summand of the gradient of x, a float that is not negative, as its bits.
// Scatter: only adds the gradient of x to total (batch, height, width, channels), *scale units per 1.
template <class T, bool Scatter>
__global__ void __launch_bounds__(kThreads, 4)
    sample_gradient_kernel(Shape s, const T *__restrict__ grad, const T *__restrict__ x, const T *__restrict__ offset,
                           const T *__restrict__ mask, const T *__restrict__ weight, T *__restrict__ grad_offset,
                           T *__restrict__ grad_mask, int *__restrict__ largest, const double *__restrict__ scale,
                           unsigned long long *__restrict__ total) {
  constexpr int kOwn = kRows / kWarps;
  __shared__ Places places;
  __shared__ float gradients[kDepth][kRows + 1];
  __shared__ float weights[kDepth][kDepth + 1];
  __shared__ float values[kRows][kDepth + 1];
  const int first_row = blockIdx.x * kRows, tap = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float of_mask[kOwn] = {}, of_y[kOwn] = {}, of_x[kOwn] = {}, most = 0;
  locate(s, offset, mask, first_row, tap, places);
  for (int first = 0; first < s.channels; first += kDepth) {
    float sum[kDown][kDepth / kAcross] = {};
    for (int first_out = 0; first_out < s.out_channels; first_out += kDepth) {
      __syncthreads();
      stage_gradients<false>(s, grad, first_row, first_out, gradients);
      stage_weights<kDepth>(s, weight, tap, first, first_out, [&](int c, int o) -> float & { return weights[o][c]; });
      __syncthreads();
      multiply<kDepth>(gradients, weights, sum);
    }
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kDepth / kAcross; ++j)
        values[threadIdx.x / kAcross * kDown + i][threadIdx.x % kAcross + kAcross * j] = sum[i][j];
    __syncthreads();
    if (first + lane >= s.channels) continue;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const int row = warp + kWarps * n;
      const float g = values[row][lane];
      if constexpr (Scatter) {
#pragma unroll
        for (int k = 0; k < kNeighbours; ++k) {
          const int at = places.pixel[k][row];
          if (at < 0) continue;
          const double summand = double(g * places.factor[row] * places.weight(k, row)) * *scale;
          atomicAdd(total + int64_t(at) * s.channels + first + lane,
                    static_cast<unsigned long long>(static_cast<long long>(summand)));
        }
      } else {
        float v[kNeighbours];
#pragma unroll
        for (int k = 0; k < kNeighbours; ++k) v[k] = places.value(k, row, x, s.channels, first + lane);
        const float below = places.below[row], right = places.right[row];
        const float upper = v[0] + (v[1] - v[0]) * right, lower = v[2] + (v[3] - v[2]) * right;
        of_mask[n] += g * (upper + (lower - upper) * below);
        of_y[n] += g * (lower - upper);
        of_x[n] += g * ((v[1] - v[0]) * (1 - below) + (v[3] - v[2]) * below);
        const float size = fabsf(g * places.factor[row]);
        if (!(size <= most)) most = size == size ? size : INFINITY;
      }
    }
  }
  if constexpr (!Scatter) {
#pragma unroll
    for (int half = 16; half > 0; half /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, half));
    if (lane == 0) atomicMax(largest, __float_as_int(most));
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      float sums[3] = {of_mask[n], of_y[n], of_x[n]};
#pragma unroll
      for (int half = 16; half > 0; half /= 2)
#pragma unroll
        for (int k = 0; k < 3; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], half);
      const int row = warp + kWarps * n;
      if (lane != 0 || first_row + row >= s.rows()) continue;
      const int64_t at = int64_t(first_row + row) * s.taps() + tap;
      grad_mask[at] = ff::from_float<T>(sums[0]);
      grad_offset[2 * at] = ff::from_float<T>(sums[1] * places.factor[row]);
      grad_offset[2 * at + 1] = ff::from_float<T>(sums[2] * places.factor[row]);
    }
  }
}

// partial: (slices, out_channels, channels, taps). grid: (slices, taps * ceil(channels / kDepth), ceil(out_channels /
// kRows)).
template <class T>
__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(Shape s, const T *__restrict__ grad, const T *__restrict__ x, const T *__restrict__ offset,
                           const T *__restrict__ mask, float *__restrict__ partial) {
  __shared__ Places places;
  __shared__ float gradients[kDepth][kRows + 1];
  __shared__ float samples[kDepth][kRows + 1];
  const int tap = blockIdx.y % s.taps(), first = blockIdx.y / s.taps() * kDepth, first_out = blockIdx.z * kRows;
  float sum[kDown][kRows / kAcross] = {};
  for (int64_t start = blockIdx.x * kRows; start < s.rows(); start += gridDim.x * kRows) {
    const int row = static_cast<int>(start);
    __syncthreads();
    locate(s, offset, mask, row, tap, places);
    __syncthreads();
    stage_samples<true>(s, x, places, first, samples);
    stage_gradients<true>(s, grad, row, first_out, gradients);
    __syncthreads();
    multiply<kRows>(gradients, samples, sum);
  }
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int j = 0; j < kRows / kAcross; ++j) {
      const int o = first_out + threadIdx.x / kAcross * kDown + i;
      const int c = first + threadIdx.x % kAcross + kAcross * j;
      if (o < s.out_channels && c < s.channels)
        partial[((int64_t(blockIdx.x) * s.out_channels + o) * s.channels + c) * s.taps() + tap] = sum[i][j];
    }
}

Shape make_shape(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t out_channels, int64_t kernel_h,
                 int64_t kernel_w, int64_t stride, int64_t padding) {
  return Shape{static_cast<int>(batch),
               static_cast<int>(channels),
               static_cast<int>(height),
               static_cast<int>(width),
               static_cast<int>(out_channels),
               static_cast<int>(kernel_h),
               static_cast<int>(kernel_w),
               static_cast<int>(stride),
               static_cast<int>(padding),
               static_cast<int>((height + 2 * padding - kernel_h) / stride + 1),
               static_cast<int>((width + 2 * padding - kernel_w) / stride + 1)};
}

bool valid(const Shape &s) {
  return s.batch >= 1 && s.channels >= 1 && s.out_channels >= 1 && s.kernel_h >= 1 && s.kernel_w >= 1 &&
         s.stride >= 1 && s.padding >= 0 && s.out_height >= 1 && s.out_width >= 1 && s.height < (1 << 24) &&
         s.width < (1 << 24) && int64_t(s.batch) * s.height * s.width < INT_MAX &&
         int64_t(s.batch) * s.out_height * s.out_width < INT_MAX - kRows &&
         s.taps() * ff::ceil_div(s.channels, kDepth) <= 65535 && ff::ceil_div(s.out_channels, kRows) <= 65535;
}

template <class T, int N>
int run_forward(const Shape &s, const T *x, const T *offset, const T *mask, const T *weight, const T *bias,
                ff::Norm norm, T *z, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ff::ceil_div(s.rows(), kRows)),
                  static_cast<unsigned>(ff::ceil_div(s.out_channels, N)));
  deform_kernel<T, N><<<grid, kThreads, 0, stream>>>(s, x, offset, mask, weight, bias, norm, z);
  return cudaGetLastError();
}

}  // namespace

extern "C" int ff_cuda_deform_conv_forward(const void *x, const void *offset, const void *mask, const void *weight,
                                           const void *bias, void *z, const void *y_stats, int y_activation,
                                           double y_slope, int64_t batch, int64_t channels, int64_t height,
                                           int64_t width, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                           int64_t stride, int64_t padding, int dtype, void *stream) {
  const Shape s = make_shape(batch, channels, height, width, out_channels, kernel_h, kernel_w, stride, padding);
  if (!valid(s)) return FF_BAD_ARGUMENT;
  const ff::Norm norm = ff::make_norm(y_stats, out_channels, y_activation, y_slope);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const auto run = out_channels <= 32 ? run_forward<T, 32> : run_forward<T, 64>;
    return run(s, static_cast<const T *>(x), static_cast<const T *>(offset), static_cast<const T *>(mask),
               static_cast<const T *>(weight), static_cast<const T *>(bias), norm, static_cast<T *>(z),
               static_cast<cudaStream_t>(stream));
  });
}

extern "C" int ff_cuda_deform_conv_sample_gradient(const void *grad, const void *x, const void *offset,
                                                   const void *mask, const void *weight, void *grad_offset,
                                                   void *grad_mask, void *largest, const double *scale, void *total,
                                                   int64_t batch, int64_t channels, int64_t height, int64_t width,
                                                   int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                                   int64_t stride, int64_t padding, int dtype, void *stream) {
  const Shape s = make_shape(batch, channels, height, width, out_channels, kernel_h, kernel_w, stride, padding);
  if (!valid(s)) return FF_BAD_ARGUMENT;
  const dim3 grid(static_cast<unsigned>(ff::ceil_div(s.rows(), kRows)), static_cast<unsigned>(s.taps()));
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const auto kernel = scale == nullptr ? sample_gradient_kernel<T, false> : sample_gradient_kernel<T, true>;
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        s, static_cast<const T *>(grad), static_cast<const T *>(x), static_cast<const T *>(offset),
        static_cast<const T *>(mask), static_cast<const T *>(weight), static_cast<T *>(grad_offset),
        static_cast<T *>(grad_mask), static_cast<int *>(largest), scale, static_cast<unsigned long long *>(total));
    return cudaGetLastError();
  });
}

extern "C" int64_t ff_cuda_deform_conv_weight_workspace(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                                        int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                                        int64_t stride, int64_t padding) {
  const Shape s = make_shape(batch, channels, height, width, out_channels, kernel_h, kernel_w, stride, padding);
  return valid(s) ? s.slices() * s.weights() * int64_t(sizeof(float)) : 0;
}

extern "C" int ff_cuda_deform_conv_weight_gradient(const void *grad, const void *x, const void *offset,
                                                   const void *mask, void *grad_weight, int64_t batch, int64_t channels,
                                                   int64_t height, int64_t width, int64_t out_channels,
                                                   int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
                                                   void *workspace, int dtype, void *stream) {
  const Shape s = make_shape(batch, channels, height, width, out_channels, kernel_h, kernel_w, stride, padding);
  if (!valid(s)) return FF_BAD_ARGUMENT;
  const dim3 grid(static_cast<unsigned>(s.slices()), static_cast<unsigned>(s.taps() * ff::ceil_div(s.channels, kDepth)),
                  static_cast<unsigned>(ff::ceil_div(s.out_channels, kRows)));
  float *partial = static_cast<float *>(workspace);
  cudaStream_t stream_ = static_cast<cudaStream_t>(stream);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    weight_gradient_kernel<T><<<grid, kThreads, 0, stream_>>>(s, static_cast<const T *>(grad),
                                                              static_cast<const T *>(x), static_cast<const T *>(offset),
                                                              static_cast<const T *>(mask), partial);
    return ff::sum_slices(partial, s.slices(), s.weights(), static_cast<T *>(grad_weight), stream_);
  });
}

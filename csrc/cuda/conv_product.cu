// Dense convolutions of NHWC tensors as products of matrices, sums in float32: of half precision on tensor cores, of
// float32 by FMAs. A pass is a product of matrices,
// pixels x input channels times input channels x output channels, added up over the taps of the kernel; the gradient of
// the weights is one of output channels x pixels times pixels x input channels for every tap. The input is normalised
// and activated as it is brought to shared memory, rounded once to the tensors' precision, and normalised, activated or
// gated results are rounded as they are stored.
//
// All sums have a fixed order: the same input on the same kind of device gives the same bits.
#include <algorithm>

#include "conv.cuh"
#include "mma.cuh"

namespace {

constexpr int kMostWarps = 8, kMostThreads = 32 * kMostWarps, kLeastThreads = 64;
constexpr int kMostRows = 4 * ff::kWarpTile, kMostDepth = 64;
constexpr int kLeastChannels = 8;
constexpr int64_t kMostPixels = INT32_MAX - 1024 * 64;  // so that the first pixel behind the last tile is an int
constexpr int kSumPadding = 8;  // floats between rows of sums: no bank conflicts as warps write their tiles

// A block's tile: down x across warps.
struct Tiling {
  int down, across;
  int depth;  // input channels in shared memory at a time

  __host__ __device__ int rows() const { return down * ff::kWarpTile; }
  __host__ __device__ int columns() const { return across * ff::kWarpTile; }
  template <class T>
  __host__ __device__ int pitch() const {
    return depth + ff::kMmaPadding<T>;
  }
  __host__ __device__ int sum_pitch() const { return columns() + kSumPadding; }
  int threads() const { return 32 * down * across; }
};

// Values that a thread moves at once.
struct Packs {
  int x, weight, z;
};

template <class T, class F>
__device__ __forceinline__ void with_packs(int pack, F function) {
  if (pack == ff::kWide<T>)
    function(std::integral_constant<int, ff::kWide<T>>{});
  else if (pack == 2)
    function(std::integral_constant<int, 2>{});
  else
    function(std::integral_constant<int, 1>{});
}

// tile[row][c] = value first + c, normalised, of row row_of(row) of x: (., channels), values `step` apart. Zero past
// the last channel and where row_of is negative. A thread keeps to its channels: their coefficients stay in registers.
template <int V, class T, class F>
__device__ __forceinline__ void stage(const T *__restrict__ x, int channels, int step, int first, const ff::Norm &norm,
                                      int rows, int columns, T *tile, int pitch, F row_of) {
  using Pack = ff::Pack<T, V>;
  const int packs = columns / V, c = threadIdx.x % packs * V;
  const bool inside = first + c < channels;
  const ff::NormPack<V> apply(norm, inside ? first + c : 0);
#pragma unroll 2
  for (int row = threadIdx.x / packs; row < rows; row += blockDim.x / packs) {
    const int from = inside ? row_of(row) : -1;
    Pack values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = ff::from_float<T>(0.0f);
    if (from >= 0) {
      values = *reinterpret_cast<const Pack *>(x + (int64_t(from) * channels + first + c) * step);
      apply.apply(values);
    }
    *reinterpret_cast<Pack *>(tile + row * pitch + c) = values;
  }
}

__device__ __forceinline__ ff::Norm as_it_is() { return {nullptr, 0, FF_NONE, 0}; }

// Where the kernel's corner lies for a tile's pixels.
struct Places {
  int image[kMostRows], top[kMostRows], left[kMostRows];  // image -1: past the last pixel

  __device__ __forceinline__ void locate(const ff::Pass &p, int first, int rows) {
#pragma unroll 1
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      const int pixel = first + row, line = pixel / p.out_width;
      image[row] = pixel < p.pixels() ? line / p.out_height : -1;
      top[row] = line % p.out_height * p.stride - p.padding;
      left[row] = pixel % p.out_width * p.stride - p.padding;
    }
  }
  // The input's pixel under a tap, -1 where there is none.
  __device__ __forceinline__ int pixel(const ff::Pass &p, int row, int tap) const {
    int y = top[row] + tap / p.kernel, x = left[row] + tap % p.kernel;
    if (image[row] < 0 || y < 0 || x < 0) return -1;
    if (p.up > 1) {
      if (y % p.up != 0 || x % p.up != 0) return -1;
      y /= p.up;
      x /= p.up;
    }
    return y < p.height && x < p.width ? (image[row] * p.height + y) * p.width + x : -1;
  }
};

// z of pixels first, ... and channels first_out, ... from their sums: normalised or, with a gate, multiplied by the
// derivative of the norm's activation there.
template <int V, class T>
__device__ __forceinline__ void finish_tile(int pixels, int out_channels, int first, int first_out,
                                            const Tiling &tiling, const float *sums, const T *__restrict__ bias,
                                            const ff::Norm &norm, const T *__restrict__ gate, T *__restrict__ z) {
  using Pack = ff::Pack<T, V>;
  const int packs = tiling.columns() / V, c = threadIdx.x % packs * V, channel = first_out + c;
  if (channel >= out_channels) return;
  const ff::NormPack<V> apply(norm, channel);
  float offset[V];
#pragma unroll
  for (int j = 0; j < V; ++j) offset[j] = bias == nullptr ? 0.0f : ff::to_float(bias[channel + j]);
#pragma unroll 1
  for (int row = threadIdx.x / packs; row < tiling.rows(); row += blockDim.x / packs) {
    if (first + row >= pixels) return;
    const int64_t place = int64_t(first + row) * out_channels + channel;
    float v[V];
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = sums[row * tiling.sum_pitch() + c + j] + offset[j];
    Pack values;
    if (gate == nullptr) {
      apply.apply(v);
    } else {
      values = *reinterpret_cast<const Pack *>(gate + place);
      float at[V];
#pragma unroll
      for (int j = 0; j < V; ++j) at[j] = ff::to_float(values.v[j]);
      apply.gradient(v, at);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = ff::from_float<T>(v[j]);
    *reinterpret_cast<Pack *>(z + place) = values;
  }
}

// Which part of its block's tile a warp computes.
struct WarpPlace {
  int row, column;

  __device__ __forceinline__ explicit WarpPlace(const Tiling &tiling)
      : row(threadIdx.x / 32 % tiling.down * ff::kWarpTile), column(threadIdx.x / 32 / tiling.down * ff::kWarpTile) {}
};

template <class T>
__device__ __forceinline__ void store_sums(const ff::WarpProduct<T> &product, const WarpPlace &warp,
                                           const Tiling &tiling, float *sums) {
  product.each([&](int row, int column, float2 two) {
    *reinterpret_cast<float2 *>(sums + (warp.row + row) * tiling.sum_pitch() + warp.column + column) = two;
  });
}

// grid: (tiles of pixels, tiles of output channels). Turned: the pass is that of the input's gradient; weights are then
// (channels, out_channels, k, k), to be turned around, else (out_channels, channels, k, k).
template <class T, bool Turned>
__global__ void __launch_bounds__(kMostThreads)
    product_kernel(ff::Pass p, Tiling tiling, Packs packs, const T *__restrict__ x, ff::Norm in_norm,
                   const T *__restrict__ weight, const T *__restrict__ bias, ff::Norm norm, const T *__restrict__ gate,
                   T *__restrict__ z) {
  if constexpr (sizeof(T) == 2 && !ff::ptx::kAvailable) return;
  extern __shared__ uint4 memory[];
  __shared__ Places places;
  const int first = blockIdx.x * tiling.rows();
  const int first_out = blockIdx.y * tiling.columns(), taps = p.taps();
  T *input = reinterpret_cast<T *>(memory), *weights = input + tiling.rows() * tiling.template pitch<T>();
  const int weight_rows = Turned ? tiling.depth : tiling.columns();
  const int weight_columns = Turned ? tiling.columns() : tiling.depth;
  const int weight_pitch = weight_columns + ff::kMmaPadding<T>;
  const WarpPlace warp(tiling);
  ff::WarpProduct<T> product;
  places.locate(p, first, tiling.rows());
#pragma unroll 1
  for (int channel = 0; channel < p.channels; channel += tiling.depth)
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      __syncthreads();
      with_packs<T>(packs.x, [&](auto pack) {
        stage<decltype(pack)::value>(x, p.channels, 1, channel, in_norm, tiling.rows(), tiling.depth, input,
                                     tiling.template pitch<T>(), [&](int row) { return places.pixel(p, row, tap); });
      });
      with_packs<T>(packs.weight, [&](auto pack) {
        const int first_row = Turned ? channel : first_out, all_rows = Turned ? p.channels : p.out_channels;
        stage<decltype(pack)::value>(weight + (Turned ? taps - 1 - tap : tap), Turned ? p.out_channels : p.channels,
                                     taps, Turned ? first_out : channel, as_it_is(), weight_rows, weight_columns,
                                     weights, weight_pitch,
                                     [&](int row) { return first_row + row < all_rows ? first_row + row : -1; });
      });
      __syncthreads();
      const T *left = input + warp.row * tiling.template pitch<T>();
      if constexpr (Turned)
        product.template add<ff::Lies::kAcross, ff::Lies::kAlongDepth>(
            left, tiling.template pitch<T>(), weights + warp.column, weight_pitch, tiling.depth);
      else
        product.template add<ff::Lies::kAcross, ff::Lies::kAcross>(
            left, tiling.template pitch<T>(), weights + warp.column * weight_pitch, weight_pitch, tiling.depth);
    }
  float *sums = reinterpret_cast<float *>(memory);
  __syncthreads();
  store_sums(product, warp, tiling, sums);
  __syncthreads();
  with_packs<T>(packs.z, [&](auto pack) {
    finish_tile<decltype(pack)::value>(p.pixels(), p.out_channels, first, first_out, tiling, sums, bias, norm, gate, z);
  });
}

constexpr int kGradientWarps = 4, kGradientThreads = 32 * kGradientWarps;
constexpr int kGradientSide = 2 * ff::kWarpTile, kGradientPixels = 64;
constexpr int64_t kGradientBlocks = 1024;

// partial: (slices, out_channels, channels, taps). grid: (slices, tiles of output channels x tiles of input channels x
// taps). Of a block's two by two tiles of a warp those that have channels are multiplied; with fewer than four, several
// warps share one, each with its part of the pixels.
// The second launch bound: without it the compiler spills a register or two to reach a higher occupancy.
template <class T, int V>
__global__ void __launch_bounds__(kGradientThreads, sizeof(T) == 2 ? 5 : 4)
    weight_product_kernel(ff::Pass p, const T *__restrict__ grad, const T *__restrict__ x, ff::Norm in_norm,
                          float *__restrict__ partial) {
  if constexpr (sizeof(T) == 2 && !ff::ptx::kAvailable) return;
  constexpr int kPitch = kGradientSide + ff::kMmaPadding<T>, kSumPitch = ff::kWarpTile + 1;
  static_assert(2 * kGradientPixels * kPitch * sizeof(T) >= 3 * ff::kWarpTile * kSumPitch * sizeof(float));
  __shared__ Places places;
  __shared__ alignas(16) T gradients[2 * kGradientPixels * kPitch];
  T *inputs = gradients + kGradientPixels * kPitch;
  const int taps = p.taps(), tap = blockIdx.y % taps, tiles = (p.channels + kGradientSide - 1) / kGradientSide;
  const int first_in = blockIdx.y / taps % tiles * kGradientSide, first_out = blockIdx.y / taps / tiles * kGradientSide;
  const int ins = p.channels - first_in > ff::kWarpTile ? kGradientSide : ff::kWarpTile;
  const int outs = p.out_channels - first_out > ff::kWarpTile ? kGradientSide : ff::kWarpTile;
  const int own = ins * outs / (ff::kWarpTile * ff::kWarpTile), parts = kGradientWarps / own;
  const int warp = threadIdx.x / 32, part = warp / own, depth = kGradientPixels / parts;
  const int row = warp % own % (outs / ff::kWarpTile) * ff::kWarpTile;
  const int column = warp % own / (outs / ff::kWarpTile) * ff::kWarpTile;
  const int pixels = static_cast<int>(p.pixels());
  ff::WarpProduct<T> product;
#pragma unroll 1
  for (int first = blockIdx.x * kGradientPixels; first < pixels; first += gridDim.x * kGradientPixels) {
    __syncthreads();
    places.locate(p, first, kGradientPixels);
    __syncthreads();
    stage<V>(grad, p.out_channels, 1, first_out, as_it_is(), kGradientPixels, outs, gradients, kPitch,
             [&](int pixel) { return first + pixel < pixels ? first + pixel : -1; });
    stage<V>(x, p.channels, 1, first_in, in_norm, kGradientPixels, ins, inputs, kPitch,
             [&](int pixel) { return places.pixel(p, pixel, tap); });
    __syncthreads();
    const int from = part * depth * kPitch;
    product.template add<ff::Lies::kAlongDepth, ff::Lies::kAlongDepth>(gradients + from + row, kPitch,
                                                                       inputs + from + column, kPitch, depth);
  }
  float *sums = reinterpret_cast<float *>(gradients);
  __syncthreads();
  if (part > 0)
    product.each([&](int i, int j, float2 two) {
      float *to = sums + ((warp - own) * ff::kWarpTile + i) * kSumPitch + j;
      to[0] = two.x;
      to[1] = two.y;
    });
  __syncthreads();
  if (part > 0) return;
  const int64_t slice = int64_t(blockIdx.x) * p.out_channels;
  product.each([&](int i, int j, float2 two) {
    for (int other = warp; other + own < kGradientWarps; other += own) {
      const float *more = sums + (other * ff::kWarpTile + i) * kSumPitch + j;
      two.x += more[0];
      two.y += more[1];
    }
    const int out = first_out + row + i, in = first_in + column + j;
    if (out >= p.out_channels) return;
    const int64_t place = ((slice + out) * p.channels + in) * taps + tap;
    if (in < p.channels) partial[place] = two.x;
    if (in + 1 < p.channels) partial[place + taps] = two.y;
  });
}

// The block of MobileNetV1 in evaluation mode: a 3x3 depthwise convolution with padding 1, whose results stay in shared
// memory, and a 1x1 convolution. grid: (tiles of pixels). p is the depthwise pass.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    separable_kernel(ff::Pass p, Tiling tiling, int out_channels, const T *__restrict__ x,
                     const T *__restrict__ depthwise_weight, const T *__restrict__ depthwise_bias, ff::Norm between,
                     const T *__restrict__ weight, const T *__restrict__ bias, ff::Norm out_norm, T *__restrict__ y) {
  if constexpr (!ff::ptx::kAvailable) return;
  constexpr int V = ff::kWide<T>, kTaps = 9;
  using Pack = ff::Pack<T, V>;
  extern __shared__ uint4 memory[];
  __shared__ Places places;
  __shared__ alignas(16) float depthwise[(kTaps + 1) * kMostDepth];  // [tap][channel], then the bias
  const int first = blockIdx.x * tiling.rows();
  T *input = reinterpret_cast<T *>(memory), *weights = input + tiling.rows() * tiling.template pitch<T>();
  const WarpPlace warp(tiling);
  ff::WarpProduct<T> product;
  places.locate(p, first, tiling.rows());
#pragma unroll 1
  for (int channel = 0; channel < p.channels; channel += tiling.depth) {
    __syncthreads();
    for (int i = threadIdx.x; i < (kTaps + 1) * tiling.depth; i += blockDim.x) {
      const int c = channel + i % tiling.depth, tap = i / tiling.depth;
      float v = 0;
      if (c < p.channels && tap < kTaps) v = ff::to_float(depthwise_weight[int64_t(c) * kTaps + tap]);
      if (c < p.channels && tap == kTaps && depthwise_bias != nullptr) v = ff::to_float(depthwise_bias[c]);
      depthwise[i] = v;
    }
    stage<V>(weight, p.channels, 1, channel, as_it_is(), tiling.columns(), tiling.depth, weights,
             tiling.template pitch<T>(), [&](int row) { return row < out_channels ? row : -1; });
    __syncthreads();
    const int packs = tiling.depth / V, c = threadIdx.x % packs * V;
    const bool inside = channel + c < p.channels;
    const ff::NormPack<V> apply(between, inside ? channel + c : 0);
#pragma unroll 1
    for (int row = threadIdx.x / packs; row < tiling.rows(); row += blockDim.x / packs) {
      float v[V] = {};
      if (inside && places.image[row] >= 0) {
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = depthwise[kTaps * tiling.depth + c + j];
#pragma unroll 3
        for (int tap = 0; tap < kTaps; ++tap) {
          const int from = places.pixel(p, row, tap);
          if (from < 0) continue;
          const Pack values = *reinterpret_cast<const Pack *>(x + int64_t(from) * p.channels + channel + c);
#pragma unroll
          for (int j = 0; j < V; ++j) v[j] += depthwise[tap * tiling.depth + c + j] * ff::to_float(values.v[j]);
        }
        apply.apply(v);
      }
      Pack values;
#pragma unroll
      for (int j = 0; j < V; ++j) values.v[j] = ff::from_float<T>(v[j]);
      *reinterpret_cast<Pack *>(input + row * tiling.template pitch<T>() + c) = values;
    }
    __syncthreads();
    product.template add<ff::Lies::kAcross, ff::Lies::kAcross>(
        input + warp.row * tiling.template pitch<T>(), tiling.template pitch<T>(),
        weights + warp.column * tiling.template pitch<T>(), tiling.template pitch<T>(), tiling.depth);
  }
  float *sums = reinterpret_cast<float *>(memory);
  __syncthreads();
  store_sums(product, warp, tiling, sums);
  __syncthreads();
  finish_tile<V, T>(p.pixels(), out_channels, first, 0, tiling, sums, bias, out_norm, nullptr, y);
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// As many warps across as the output channels take, the rest down; fewer where multiprocessors would stay idle.
template <class T>
Tiling choose_tiling(int64_t pixels, int channels, int out_channels, bool split) {
  const int most_depth = sizeof(T) == 2 ? kMostDepth : kMostDepth / 2;
  Tiling t{4, 1, channels > 32 ? most_depth : channels > 16 ? 32 : 16};
  while (t.across < kMostWarps && t.columns() < out_channels) t.across *= 2;
  t.down = t.across < 2 ? 4 : kMostWarps / t.across;
  const int processors = attribute(cudaDevAttrMultiProcessorCount);
  const auto blocks = [&] { return ff::ceil_div(pixels, t.rows()) * ff::ceil_div(out_channels, t.columns()); };
  while (t.threads() > kLeastThreads && blocks() < processors && (t.down > 1 || split))
    (t.down > 1 ? t.down : t.across) /= 2;
  return t;
}

template <class T>
size_t shared_bytes(const Tiling &t, bool turned) {
  const int weights = turned ? t.depth * (t.columns() + ff::kMmaPadding<T>) : t.columns() * t.pitch<T>();
  const size_t factors = size_t(t.rows() * t.pitch<T>() + weights) * sizeof(T);
  const size_t sums = size_t(t.rows()) * t.sum_pitch() * sizeof(float);
  return factors > sums ? factors : sums;
}

template <class T>
int pack_of(int64_t channels, std::initializer_list<const void *> tensors) {
  uintptr_t bits = 0;
  for (const void *tensor : tensors) bits |= reinterpret_cast<uintptr_t>(tensor);
  if (channels % ff::kWide<T> == 0 && bits % 16 == 0) return ff::kWide<T>;
  return channels % 2 == 0 && bits % (2 * sizeof(T)) == 0 ? 2 : 1;
}

int gradient_tiles(const ff::Pass &p) {
  return static_cast<int>(p.taps() * ff::ceil_div(p.out_channels, kGradientSide) *
                          ff::ceil_div(p.channels, kGradientSide));
}

}  // namespace

namespace ff {

bool as_product(const Pass &p, int bytes) {
  return p.groups == 1 && p.channels >= kLeastChannels && p.out_channels >= kLeastChannels &&
         p.pixels() <= kMostPixels && int64_t(p.batch) * p.height * p.width <= kMostPixels &&
         gradient_tiles(p) <= 65535 && (bytes == 4 || attribute(cudaDevAttrComputeCapabilityMajor) >= 8);
}

template <class T>
int product_conv(const Pass &p, const T *x, Norm in_norm, const T *weight, const T *bias, Norm out_norm, const T *gate,
                 Norm gate_norm, T *z, cudaStream_t stream) {
  const Tiling t = choose_tiling<T>(p.pixels(), p.channels, p.out_channels, true);
  const int inner = p.transposed ? p.out_channels : p.channels;
  const Packs packs{pack_of<T>(p.channels, {x}), p.taps() == 1 ? pack_of<T>(inner, {weight}) : 1,
                    pack_of<T>(p.out_channels, {z, gate})};
  const dim3 grid(static_cast<unsigned>(ceil_div(p.pixels(), t.rows())),
                  static_cast<unsigned>(ceil_div(p.out_channels, t.columns())));
  const size_t bytes = shared_bytes<T>(t, p.transposed);
  const Norm norm = gate == nullptr ? out_norm : gate_norm;
  if (p.transposed)
    product_kernel<T, true><<<grid, t.threads(), bytes, stream>>>(p, t, packs, x, in_norm, weight, bias, norm, gate, z);
  else
    product_kernel<T, false>
        <<<grid, t.threads(), bytes, stream>>>(p, t, packs, x, in_norm, weight, bias, norm, gate, z);
  return cudaGetLastError();
}

int product_weight_slices(const Pass &p) {
  const int64_t most = kGradientBlocks / gradient_tiles(p);
  return static_cast<int>(blocks_for(p.pixels(), 4 * kGradientPixels, most < 1 ? 1 : most));
}

template <class T>
int product_weight_gradient(const Pass &p, const T *grad, const T *x, Norm in_norm, float *partial,
                            cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(product_weight_slices(p)), static_cast<unsigned>(gradient_tiles(p)));
  const int pack = std::min(pack_of<T>(p.channels, {x}), pack_of<T>(p.out_channels, {grad}));
  if (pack == kWide<T>)
    weight_product_kernel<T, kWide<T>><<<grid, kGradientThreads, 0, stream>>>(p, grad, x, in_norm, partial);
  else if (pack == 2)
    weight_product_kernel<T, 2><<<grid, kGradientThreads, 0, stream>>>(p, grad, x, in_norm, partial);
  else
    weight_product_kernel<T, 1><<<grid, kGradientThreads, 0, stream>>>(p, grad, x, in_norm, partial);
  return cudaGetLastError();
}

#define FF_INSTANTIATE(T)                                                                                    \
  template int product_conv(const Pass &, const T *, Norm, const T *, const T *, Norm, const T *, Norm, T *, \
                            cudaStream_t);                                                                   \
  template int product_weight_gradient(const Pass &, const T *, const T *, Norm, float *, cudaStream_t);
FF_INSTANTIATE(float)
FF_INSTANTIATE(__half)
FF_INSTANTIATE(__nv_bfloat16)

}  // namespace ff

extern "C" int ff_cuda_depthwise_separable_eval(const void *x, const void *depthwise_weight, const void *depthwise_bias,
                                                const void *depthwise_stats, int depthwise_activation,
                                                double depthwise_slope, const void *weight, const void *bias, void *y,
                                                const void *y_stats, int y_activation, double y_slope, int64_t batch,
                                                int64_t channels, int64_t height, int64_t width, int64_t out_channels,
                                                int64_t stride, int dtype, void *stream) {
  const int64_t out_height = (height - 1) / stride + 1, out_width = (width - 1) / stride + 1;
  const int64_t pixels = batch * out_height * out_width;
  if (pixels == 0) return FF_OK;
  const bool served = (dtype == FF_FLOAT16 || dtype == FF_BFLOAT16) && channels % 8 == 0 && out_channels % 8 == 0 &&
                      out_channels <= kMostWarps * ff::kWarpTile && batch * height * width <= kMostPixels &&
                      ff::aligned({x, weight, y}) && attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
  if (!served) return FF_NOT_SERVED;
  ff::Pass p{};
  p.batch = static_cast<int>(batch);
  p.channels = p.out_channels = p.groups = static_cast<int>(channels);
  p.height = static_cast<int>(height);
  p.width = static_cast<int>(width);
  p.out_height = static_cast<int>(out_height);
  p.out_width = static_cast<int>(out_width);
  p.kernel = 3;
  p.stride = static_cast<int>(stride);
  p.padding = p.up = 1;
  const int outs = static_cast<int>(out_channels);
  const Tiling t = choose_tiling<__half>(pixels, p.channels, outs, false);
  const ff::Norm between = ff::make_norm(depthwise_stats, channels, depthwise_activation, depthwise_slope);
  const ff::Norm out_norm = ff::make_norm(y_stats, out_channels, y_activation, y_slope);
  const auto run = [&](auto zero) -> int {
    using T = decltype(zero);
    separable_kernel<T><<<static_cast<unsigned>(ff::ceil_div(pixels, t.rows())), t.threads(), shared_bytes<T>(t, false),
                          static_cast<cudaStream_t>(stream)>>>(
        p, t, outs, static_cast<const T *>(x), static_cast<const T *>(depthwise_weight),
        static_cast<const T *>(depthwise_bias), between, static_cast<const T *>(weight), static_cast<const T *>(bias),
        out_norm, static_cast<T *>(y));
    return cudaGetLastError();
  };
  return dtype == FF_FLOAT16 ? run(__half{}) : run(__nv_bfloat16{});
}

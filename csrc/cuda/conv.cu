// Grouped and depthwise convolutions of NHWC tensors, forward and backward. The input is normalised and activated as it
// is loaded (deferred batch normalisation), so that between two convolutions only raw outputs are stored.
//
// A general block holds a tile of the input with its halo and a slice of the weights in shared memory, both in float32;
// a thread computes several output channels of one pixel. The gradient of the input is the same kernel: a convolution
// of the output's gradient, spread `up` apart, with the weights turned around. A depthwise thread computes four
// channels of four pixels in a row, with the weights in shared memory.
//
// Without groups and from 8 channels on both sides on, a general convolution is a product of matrices: conv_product.cu.
#include "conv.cuh"
#include "slices.cuh"

namespace {

constexpr int kTileWidth = 16, kTileHeight = 8, kPixels = kTileWidth * kTileHeight;
constexpr int kChunk = 8;  // input channels in shared memory at a time, output channels of a weight gradient's block
constexpr int kSharedBytes = 46 << 10;
constexpr int kLanes = 32, kRows = 8, kThreads = 256;
constexpr int kAcross = 4, kPack = 4;  // pixels and channels of a depthwise thread
constexpr int kPiece = 32;             // pixels of a line that a thread of a depthwise weight gradient takes at a time
constexpr int kMostKernel = 7;
constexpr int64_t kMostSlices = 256, kMostDepthwiseBlocks = 8192;

// What a block of conv_kernel and weight_gradient_kernel needs beside it.
struct Pass : ff::Pass {
  int chunk;  // input channels staged at a time

  __host__ __device__ int tile_height() const { return (kTileHeight - 1) * stride + kernel; }
  __host__ __device__ int tile_width() const { return (kTileWidth - 1) * stride + kernel; }
  __host__ __device__ int plane() const { return tile_height() * tile_width() | 1; }  // odd: no bank conflicts
  __host__ __device__ int tiles_x() const { return (out_width + kTileWidth - 1) / kTileWidth; }
  __host__ __device__ int tiles_y() const { return (out_height + kTileHeight - 1) / kTileHeight; }
  __host__ __device__ int64_t tiles() const { return int64_t(tiles_x()) * tiles_y() * batch; }
};

struct Tile {
  int image, y, x;  // of the first output pixel

  __device__ Tile(const Pass &p, int64_t number) {
    x = static_cast<int>(number % p.tiles_x()) * kTileWidth;
    number /= p.tiles_x();
    y = static_cast<int>(number % p.tiles_y()) * kTileHeight;
    image = static_cast<int>(number / p.tiles_y());
  }
};

// tile[c][row][column] = the input of channels first, first + 1, ..., normalised; zero outside the image and past
// `count`.
template <class T>
__device__ void stage_input(const Pass &p, const Tile &at, const T *__restrict__ x, const ff::Norm &norm, int first,
                            int count, int slots, float *tile) {
  const int width = p.tile_width(), area = p.tile_height() * width;
  const int top = at.y * p.stride - p.padding, left = at.x * p.stride - p.padding;
  const int64_t image = int64_t(at.image) * p.height * p.width;
#pragma unroll 1
  for (int i = threadIdx.x; i < area * slots; i += kPixels) {
    const int c = i % slots, place = i / slots;
    const int row = top + place / width, column = left + place % width;
    float v = 0;
    if (c < count && row >= 0 && column >= 0 && row % p.up == 0 && column % p.up == 0 && row / p.up < p.height &&
        column / p.up < p.width)
      v = norm(ff::to_float(x[(image + int64_t(row / p.up) * p.width + column / p.up) * p.channels + first + c]),
               first + c);
    tile[c * p.plane() + place] = v;
  }
}

template <class T>
__device__ __forceinline__ float weight_at(const Pass &p, const T *__restrict__ weight, int group, int out, int in,
                                           int tap) {
  const int taps = p.kernel * p.kernel;
  const int64_t row = p.transposed ? int64_t(group * p.group_in() + in) * p.group_out() + out
                                   : int64_t(group * p.group_out() + out) * p.group_in() + in;
  return ff::to_float(weight[row * taps + (p.transposed ? taps - 1 - tap : tap)]);
}

// grid: (tiles, groups * ceil(group_out / OC)). gate: the result is multiplied by the derivative of gate_norm's
// activation at gate, a tensor of the output's shape; otherwise out_norm is applied to the result.
template <class T, int OC, int K>
__global__ void __launch_bounds__(kPixels)
    conv_kernel(Pass p, const T *__restrict__ x, ff::Norm in_norm, const T *__restrict__ weight,
                const T *__restrict__ bias, ff::Norm out_norm, const T *__restrict__ gate, ff::Norm gate_norm,
                T *__restrict__ z) {
  extern __shared__ float memory[];
  constexpr int kSide = K > 0 ? K : 1;  // a kernel of unknown size is not unrolled
  const int k = K > 0 ? K : p.kernel, taps = k * k;
  float *tile = memory, *weights = memory + p.chunk * p.plane();  // weights: [channel][tap][OC]
  const Tile at(p, blockIdx.x);
  const int parts = (p.group_out() + OC - 1) / OC, group = blockIdx.y / parts, first_out = blockIdx.y % parts * OC;
  const int dy = threadIdx.x / kTileWidth, dx = threadIdx.x % kTileWidth;
  const int width = p.tile_width(), corner = dy * p.stride * width + dx * p.stride;
  float sum[OC];
#pragma unroll
  for (int o = 0; o < OC; ++o) sum[o] = 0;
  for (int first = 0; first < p.group_in(); first += p.chunk) {
    const int count = min(p.chunk, p.group_in() - first);
    __syncthreads();
    stage_input(p, at, x, in_norm, group * p.group_in() + first, count, count, tile);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * taps * OC; i += kPixels) {
      const int o = i % OC, tap = i / OC % taps, c = i / OC / taps;
      weights[i] = first_out + o < p.group_out() ? weight_at(p, weight, group, first_out + o, first + c, tap) : 0.0f;
    }
    __syncthreads();
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      const float *source = tile + c * p.plane() + corner;
      const float *w = weights + c * taps * OC;
#pragma unroll kSide
      for (int ky = 0; ky < k; ++ky)
#pragma unroll kSide
        for (int kx = 0; kx < k; ++kx) {
          const float v = source[ky * width + kx];
#pragma unroll
          for (int o = 0; o < OC; ++o) sum[o] += v * w[(ky * k + kx) * OC + o];
        }
    }
  }
  const int y = at.y + dy, column = at.x + dx;
  if (y >= p.out_height || column >= p.out_width) return;
  const int64_t pixel = (int64_t(at.image) * p.out_height + y) * p.out_width + column;
#pragma unroll
  for (int o = 0; o < OC; ++o) {
    if (first_out + o >= p.group_out()) continue;
    const int channel = group * p.group_out() + first_out + o;
    const int64_t place = pixel * p.out_channels + channel;
    float v = sum[o];
    if (gate != nullptr)
      v = ff::finish_gradient(gate_norm, v, ff::to_float(gate[place]), channel);
    else
      v = ff::finish(out_norm, bias == nullptr ? v : v + ff::to_float(bias[channel]), channel);
    z[place] = ff::from_float<T>(v);
  }
}

// partial: (slices, weights). grid: (slices, groups * ceil(group_out / kChunk) * ceil(group_in / kChunk)).
template <class T, int K>
__global__ void __launch_bounds__(kPixels)
    weight_gradient_kernel(Pass p, const T *__restrict__ grad, const T *__restrict__ x, ff::Norm in_norm,
                           float *__restrict__ partial) {
  constexpr int kMost = K > 0 ? K : kMostKernel, kOwn = (kChunk * kChunk * kMost * kMost + kPixels - 1) / kPixels;
  extern __shared__ float memory[];
  const int k = K > 0 ? K : p.kernel, taps = k * k;
  float *tile = memory, *gradients = memory + p.chunk * p.plane();  // gradients: [pixel][kChunk + 1]
  const int chunks = (p.group_in() + p.chunk - 1) / p.chunk, parts = (p.group_out() + kChunk - 1) / kChunk;
  const int first_in = blockIdx.y % chunks * p.chunk, first_out = blockIdx.y / chunks % parts * kChunk;
  const int group = blockIdx.y / chunks / parts;
  const int inputs = min(p.chunk, p.group_in() - first_in), outputs = min(kChunk, p.group_out() - first_out);
  const int owned = inputs * outputs * taps, width = p.tile_width();
  float sum[kOwn];
  int source[kOwn], output[kOwn];
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    const int i = min(owned - 1, int(threadIdx.x) + n * kPixels), tap = i % taps;
    source[n] = i / taps % inputs * p.plane() + tap / k * width + tap % k;
    output[n] = i / taps / inputs;
    sum[n] = 0;
  }
  for (int64_t number = blockIdx.x; number < p.tiles(); number += gridDim.x) {
    const Tile at(p, number);
    __syncthreads();
    stage_input(p, at, x, in_norm, group * p.group_in() + first_in, inputs, inputs, tile);
#pragma unroll 1
    for (int i = threadIdx.x; i < kPixels * outputs; i += kPixels) {
      const int o = i % outputs, pixel = i / outputs, y = at.y + pixel / kTileWidth, column = at.x + pixel % kTileWidth;
      float g = 0;
      if (y < p.out_height && column < p.out_width)
        g = ff::to_float(grad[((int64_t(at.image) * p.out_height + y) * p.out_width + column) * p.out_channels +
                              group * p.group_out() + first_out + o]);
      gradients[pixel * (kChunk + 1) + o] = g;
    }
    __syncthreads();
    const int rows = min(kTileHeight, p.out_height - at.y), columns = min(kTileWidth, p.out_width - at.x);
#pragma unroll 1
    for (int y = 0; y < rows; ++y)
#pragma unroll 1
      for (int column = 0; column < columns; ++column) {
        const float *g = gradients + (y * kTileWidth + column) * (kChunk + 1);
        const float *v = tile + y * p.stride * width + column * p.stride;
#pragma unroll
        for (int n = 0; n < kOwn; ++n) sum[n] += g[output[n]] * v[source[n]];
      }
  }
  const int64_t weights = int64_t(p.out_channels) * p.group_in() * taps;
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    const int i = int(threadIdx.x) + n * kPixels;
    if (i >= owned) continue;
    const int tap = i % taps, in = first_in + i / taps % inputs,
              out = group * p.group_out() + first_out + i / taps / inputs;
    partial[blockIdx.x * weights + (int64_t(out) * p.group_in() + in) * taps + tap] = sum[n];
  }
}

// weight: (channels, k, k) -> memory: [tap][channel], turned around for a gradient of the input.
template <class T>
__device__ __forceinline__ void stage_depthwise_weights(const Pass &p, const T *__restrict__ weight, bool turned,
                                                        float *memory) {
  const int taps = p.taps();
  for (int i = threadIdx.x; i < taps * p.channels; i += kThreads) {
    const int tap = i / p.channels, c = i % p.channels;
    memory[i] = ff::to_float(weight[c * taps + (turned ? taps - 1 - tap : tap)]);
  }
  __syncthreads();
}

// The weights of one tap for channels c, ...: from shared memory where they are staged.
template <int V, class T>
__device__ __forceinline__ void depthwise_weights(const Pass &p, bool staged, const float *memory,
                                                  const T *__restrict__ weight, bool turned, int tap, int c,
                                                  float (&w)[V]) {
  const int taps = p.taps();
#pragma unroll
  for (int j = 0; j < V; ++j)
    w[j] = staged ? memory[tap * p.channels + c + j]
                  : ff::to_float(weight[int64_t(c + j) * taps + (turned ? taps - 1 - tap : tap)]);
}

template <int V, class T>
__device__ __forceinline__ void load_pack(const T *from, float (&v)[V]) {
  const ff::Pack<T, V> values = *reinterpret_cast<const ff::Pack<T, V> *>(from);
#pragma unroll
  for (int j = 0; j < V; ++j) v[j] = ff::to_float(values.v[j]);
}

template <int V, class T>
__device__ __forceinline__ void store_pack(const float (&v)[V], T *to) {
  ff::Pack<T, V> values;
#pragma unroll
  for (int j = 0; j < V; ++j) values.v[j] = ff::from_float<T>(v[j]);
  *reinterpret_cast<ff::Pack<T, V> *>(to) = values;
}

// K and S: side and stride where they are known, else 0. Turned: the pass is that of the input's gradient, with stride
// 1; the result is multiplied by the derivative of out_norm's activation at gate.
template <class T, int V, int K, int S, bool Turned>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_kernel(Pass p, bool staged, const T *__restrict__ x, ff::Norm in_norm, const T *__restrict__ weight,
                     const T *__restrict__ bias, ff::Norm out_norm, const T *__restrict__ gate, T *__restrict__ z) {
  extern __shared__ float memory[];
  constexpr int kSide = K > 0 ? K : 1, kStride = S > 0 ? S : 1;
  const int k = K > 0 ? K : p.kernel, stride = S > 0 ? S : p.stride;
  const int packs = p.channels / V, across = (p.out_width + kAcross - 1) / kAcross;
  if (staged) stage_depthwise_weights(p, weight, Turned, memory);
  const int64_t items = int64_t(p.batch) * p.out_height * across * packs;
  int known = -1;  // the channel whose coefficients are in registers
  ff::NormPack<V> in(in_norm, 0);
#pragma unroll 1
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < items; i += int64_t(gridDim.x) * kThreads) {
    const int c = static_cast<int>(i % packs) * V;
    const int64_t line = i / packs / across;
    const int column = static_cast<int>(i / packs % across) * kAcross;
    const int y = static_cast<int>(line % p.out_height);
    const int64_t image = line / p.out_height;
    if (c != known) {
      in = ff::NormPack<V>(in_norm, c);
      known = c;
    }
    float sum[kAcross][V];
#pragma unroll
    for (int r = 0; r < kAcross; ++r)
#pragma unroll
      for (int j = 0; j < V; ++j) sum[r][j] = bias == nullptr ? 0.0f : ff::to_float(bias[c + j]);
#pragma unroll 1
    for (int ky = 0; ky < k; ++ky) {
      const int row = y * stride - p.padding + ky, left = column * stride - p.padding;
      if (row < 0 || row >= p.height) continue;
      const T *values = x + (image * p.height + row) * p.width * p.channels + c;
      if constexpr (K > 0) {
        float w[kSide][V];
#pragma unroll
        for (int kx = 0; kx < kSide; ++kx)
          depthwise_weights(p, staged, memory, weight, Turned, ky * kSide + kx, c, w[kx]);
#pragma unroll
        for (int seen = 0; seen < (kAcross - 1) * kStride + kSide; ++seen) {
          if (left + seen < 0 || left + seen >= p.width) continue;
          float v[V];
          load_pack(values + int64_t(left + seen) * p.channels, v);
          in.apply(v);
#pragma unroll
          for (int kx = 0; kx < kSide; ++kx)
            if (seen >= kx && (seen - kx) % kStride == 0 && (seen - kx) / kStride < kAcross)
#pragma unroll
              for (int j = 0; j < V; ++j) sum[(seen - kx) / kStride][j] += w[kx][j] * v[j];
        }
      } else {
#pragma unroll 1
        for (int kx = 0; kx < k; ++kx) {
          float w[V];
          depthwise_weights(p, staged, memory, weight, Turned, ky * k + kx, c, w);
#pragma unroll
          for (int r = 0; r < kAcross; ++r) {
            const int at = left + r * stride + kx;
            if (at < 0 || at >= p.width) continue;
            float v[V];
            load_pack(values + int64_t(at) * p.channels, v);
            in.apply(v);
#pragma unroll
            for (int j = 0; j < V; ++j) sum[r][j] += w[j] * v[j];
          }
        }
      }
    }
    const ff::NormPack<V> out(out_norm, c);
#pragma unroll
    for (int r = 0; r < kAcross; ++r) {
      if (column + r >= p.out_width) continue;
      const int64_t place = (line * p.out_width + column + r) * p.channels + c;
      if constexpr (Turned) {
        float at[V];
        load_pack(gate + place, at);
        out.gradient(sum[r], at);
      } else {
        out.apply(sum[r]);
      }
      store_pack(sum[r], z + place);
    }
  }
}

// The input's gradient for strides above 1. p is the forward pass; grad has its output's shape, gate and grad_x its
// input's.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    depthwise_input_gradient_kernel(Pass p, bool staged, const T *__restrict__ grad, const T *__restrict__ weight,
                                    const T *__restrict__ gate, ff::Norm gate_norm, T *__restrict__ grad_x) {
  extern __shared__ float memory[];
  const int packs = p.channels / V;
  if (staged) stage_depthwise_weights(p, weight, false, memory);
  const int64_t items = int64_t(p.batch) * p.height * p.width * packs;
  int known = -1;
  ff::NormPack<V> norm(gate_norm, 0);
#pragma unroll 1
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < items; i += int64_t(gridDim.x) * kThreads) {
    const int64_t pixel = i / packs;
    const int c = static_cast<int>(i % packs) * V;
    const int column = static_cast<int>(pixel % p.width), row = static_cast<int>(pixel / p.width % p.height);
    const int64_t image = pixel / p.width / p.height;
    if (c != known) {
      norm = ff::NormPack<V>(gate_norm, c);
      known = c;
    }
    float sum[V] = {};
#pragma unroll 1
    for (int ky = 0; ky < p.kernel; ++ky) {
      const int y = row + p.padding - ky;
      if (y < 0 || y % p.stride != 0 || y / p.stride >= p.out_height) continue;
#pragma unroll 1
      for (int kx = 0; kx < p.kernel; ++kx) {
        const int at = column + p.padding - kx;
        if (at < 0 || at % p.stride != 0 || at / p.stride >= p.out_width) continue;
        float w[V], v[V];
        depthwise_weights(p, staged, memory, weight, false, ky * p.kernel + kx, c, w);
        load_pack(grad + ((image * p.out_height + y / p.stride) * p.out_width + at / p.stride) * p.channels + c, v);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += w[j] * v[j];
      }
    }
    float at[V];
    load_pack(gate + pixel * p.channels + c, at);
    norm.gradient(sum, at);
    store_pack(sum, grad_x + pixel * p.channels + c);
  }
}

// partial: (slices, channels, k, k), of a depthwise convolution. A block takes `span` channels (a power of two up to
// kLanes), one slice of the output's pixels, and all taps of a 3x3 kernel or (K = 0) the one tap blockIdx.z. Its
// threads walk along pieces of lines; of a 3x3 kernel they keep the values under it (S: the stride, 0 for any).
template <class T, int K, int S>
__global__ void __launch_bounds__(kLanes *kRows, 3)
    depthwise_weight_gradient_kernel(Pass p, int span, const T *__restrict__ grad, const T *__restrict__ x,
                                     ff::Norm in_norm, float *__restrict__ partial) {
  constexpr int kSide = K > 0 ? K : 1;
  __shared__ float rows[kRows][kLanes];
  const int k = K > 0 ? K : p.kernel, stride = S > 0 ? S : p.stride;
  const int own = threadIdx.x % span, c = blockIdx.y * span + own, walkers = kLanes / span * kRows;
  const int first_y = K > 0 ? 0 : blockIdx.z / k, first_x = K > 0 ? 0 : blockIdx.z % k;
  float sum[kSide][kSide] = {};
  const int pieces = (p.out_width + kPiece - 1) / kPiece;
  const int64_t all = int64_t(p.batch) * p.out_height * pieces;
  if (c < p.channels) {
    const ff::NormPack<1> apply(in_norm, c);
#pragma unroll 1
    for (int64_t i = int64_t(blockIdx.x) * walkers + threadIdx.y * (kLanes / span) + threadIdx.x / span; i < all;
         i += int64_t(gridDim.x) * walkers) {
      const int begin = static_cast<int>(i % pieces) * kPiece, end = min(begin + kPiece, p.out_width);
      const int64_t line = i / pieces, image = line / p.out_height;
      const int top = static_cast<int>(line % p.out_height) * stride - p.padding + first_y;
      const T *gradients = grad + line * p.out_width * p.channels + c;
      const T *inputs = x + (image * p.height + top) * p.width * p.channels + c;
      const auto value = [&](int ky, int column) {
        float v[1] = {0};
        if (top + ky >= 0 && top + ky < p.height && column >= 0 && column < p.width) {
          v[0] = ff::to_float(inputs[(int64_t(ky) * p.width + column) * p.channels]);
          apply.apply(v);
        }
        return v[0];
      };
      constexpr int kKept = S > 0 && S < kSide ? kSide - S : 0;  // columns that the next pixel sees too
      float seen[kSide][kSide];
#pragma unroll
      for (int ky = 0; ky < kSide; ++ky)
#pragma unroll
        for (int kx = 0; kx < kKept; ++kx)
          seen[ky][kx + kSide - kKept] = value(ky, begin * stride - p.padding + first_x + kx);
#pragma unroll 1
      for (int column = begin; column < end; ++column) {
        const float g = ff::to_float(gradients[int64_t(column) * p.channels]);
#pragma unroll
        for (int ky = 0; ky < kSide; ++ky) {
#pragma unroll
          for (int kx = 0; kx < kKept; ++kx) seen[ky][kx] = seen[ky][kx + kSide - kKept];
#pragma unroll
          for (int kx = kKept; kx < kSide; ++kx) seen[ky][kx] = value(ky, column * stride - p.padding + first_x + kx);
#pragma unroll
          for (int kx = 0; kx < kSide; ++kx) sum[ky][kx] += g * seen[ky][kx];
        }
      }
    }
  }
#pragma unroll
  for (int tap = 0; tap < kSide * kSide; ++tap) {
    __syncthreads();
    rows[threadIdx.y][threadIdx.x] = sum[tap / kSide][tap % kSide];
    __syncthreads();
    if (threadIdx.y == 0 && threadIdx.x < span && c < p.channels) {
      float total = 0;
      for (int row = 0; row < kRows; ++row)
        for (int lane = own; lane < kLanes; lane += span) total += rows[row][lane];
      const int ky = first_y + tap / kSide, kx = first_x + tap % kSide;
      partial[((int64_t(blockIdx.x) * p.channels + c) * k + ky) * k + kx] = total;
    }
  }
}

Pass make_pass(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t out_channels, int64_t kernel,
               int64_t stride, int64_t padding, int64_t groups) {
  Pass p{};
  p.batch = static_cast<int>(batch);
  p.channels = static_cast<int>(channels);
  p.height = static_cast<int>(height);
  p.width = static_cast<int>(width);
  p.out_channels = static_cast<int>(out_channels);
  p.out_height = static_cast<int>((height + 2 * padding - kernel) / stride + 1);
  p.out_width = static_cast<int>((width + 2 * padding - kernel) / stride + 1);
  p.kernel = static_cast<int>(kernel);
  p.stride = static_cast<int>(stride);
  p.padding = static_cast<int>(padding);
  p.groups = static_cast<int>(groups);
  p.up = 1;
  p.transposed = false;
  return p;
}

bool valid(const Pass &p) {
  const auto below = [](int64_t value) { return value < (int64_t(1) << 31); };
  return p.batch > 0 && p.kernel >= 1 && p.kernel <= kMostKernel && p.stride >= 1 && p.padding >= 0 &&
         p.padding < p.kernel && p.groups >= 1 && p.channels % p.groups == 0 && p.out_channels % p.groups == 0 &&
         p.out_height >= 1 && p.out_width >= 1 && below(p.tiles()) && p.groups * ((p.group_out() + 3) / 4) <= 65535 &&
         below(int64_t(p.height) * p.width * p.channels) && below(int64_t(p.out_height) * p.out_width * p.out_channels);
}

bool depthwise(const Pass &p) { return p.groups == p.channels && p.out_channels == p.channels; }

// Input channels per stage such that `rest(chunk)` further floats fit beside the tile.
template <class F>
int choose_chunk(const Pass &p, F rest) {
  int chunk = p.group_in() < kChunk ? p.group_in() : kChunk;
  while (chunk > 1 && (chunk * p.plane() + rest(chunk)) * int(sizeof(float)) > kSharedBytes) --chunk;
  return chunk;
}

template <class T, int OC>
int launch_conv(Pass p, const T *x, ff::Norm in_norm, const T *weight, const T *bias, ff::Norm out_norm, const T *gate,
                ff::Norm gate_norm, T *z, cudaStream_t stream) {
  const auto rest = [&](int chunk) { return chunk * p.kernel * p.kernel * OC; };
  p.chunk = choose_chunk(p, rest);
  const size_t bytes = size_t(p.chunk * p.plane() + rest(p.chunk)) * sizeof(float);
  if (bytes > 48 << 10) return FF_BAD_ARGUMENT;
  const dim3 grid(static_cast<unsigned>(p.tiles()), static_cast<unsigned>(p.groups * ff::ceil_div(p.group_out(), OC)));
  if (p.kernel == 1)
    conv_kernel<T, OC, 1><<<grid, kPixels, bytes, stream>>>(p, x, in_norm, weight, bias, out_norm, gate, gate_norm, z);
  else if (p.kernel == 3)
    conv_kernel<T, OC, 3><<<grid, kPixels, bytes, stream>>>(p, x, in_norm, weight, bias, out_norm, gate, gate_norm, z);
  else
    conv_kernel<T, OC, 0><<<grid, kPixels, bytes, stream>>>(p, x, in_norm, weight, bias, out_norm, gate, gate_norm, z);
  return cudaGetLastError();
}

template <class T>
int run_conv(const Pass &p, const T *x, ff::Norm in_norm, const T *weight, const T *bias, ff::Norm out_norm,
             const T *gate, ff::Norm gate_norm, T *z, cudaStream_t stream) {
  if (ff::as_product(p, sizeof(T)))
    return ff::product_conv(p, x, in_norm, weight, bias, out_norm, gate, gate_norm, z, stream);
  if (p.group_out() <= 4) return launch_conv<T, 4>(p, x, in_norm, weight, bias, out_norm, gate, gate_norm, z, stream);
  if (p.group_out() <= 8) return launch_conv<T, 8>(p, x, in_norm, weight, bias, out_norm, gate, gate_norm, z, stream);
  return launch_conv<T, 16>(p, x, in_norm, weight, bias, out_norm, gate, gate_norm, z, stream);
}

// Bytes of shared memory for a depthwise convolution's weights; 0 where they stay in global memory.
size_t staged_bytes(const Pass &p) {
  const size_t bytes = size_t(p.taps()) * p.channels * sizeof(float);
  return bytes <= size_t(kSharedBytes) ? bytes : 0;
}

template <class T, int V, bool Turned>
int run_depthwise(const Pass &p, const T *x, ff::Norm in_norm, const T *weight, const T *bias, ff::Norm out_norm,
                  const T *gate, T *z, cudaStream_t stream) {
  const int64_t items = int64_t(p.batch) * p.out_height * ff::ceil_div(p.out_width, kAcross) * (p.channels / V);
  const unsigned blocks = ff::blocks_for(items, kThreads, kMostDepthwiseBlocks);
  const size_t bytes = staged_bytes(p);
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, kThreads, bytes, stream>>>(p, bytes > 0, x, in_norm, weight, bias, out_norm, gate, z);
  };
  if (p.kernel == 3 && p.stride == 1)
    launch(depthwise_kernel<T, V, 3, 1, Turned>);
  else if (p.kernel == 3 && p.stride == 2 && !Turned)
    launch(depthwise_kernel<T, V, 3, 2, false>);
  else
    launch(depthwise_kernel<T, V, 0, 0, Turned>);
  return cudaGetLastError();
}

// p is the forward pass, turned that of the gradient.
template <class T, int V>
int run_depthwise_input_gradient(const Pass &p, const Pass &turned, const T *grad, const T *weight, const T *gate,
                                 ff::Norm gate_norm, T *grad_x, cudaStream_t stream) {
  if (p.stride == 1)
    return run_depthwise<T, V, true>(turned, grad, ff::make_norm(nullptr, p.channels, FF_NONE, 0), weight, nullptr,
                                     gate_norm, gate, grad_x, stream);
  const int64_t items = int64_t(p.batch) * p.height * p.width * (p.channels / V);
  const unsigned blocks = ff::blocks_for(items, kThreads, kMostDepthwiseBlocks);
  const size_t bytes = staged_bytes(p);
  depthwise_input_gradient_kernel<T, V>
      <<<blocks, kThreads, bytes, stream>>>(p, bytes > 0, grad, weight, gate, gate_norm, grad_x);
  return cudaGetLastError();
}

int64_t weight_slices(const Pass &p) {
  if (depthwise(p)) return ff::blocks_for(int64_t(p.batch) * p.out_height * p.out_width, 16 * kRows, kMostSlices);
  return p.tiles() < kMostSlices ? p.tiles() : kMostSlices;
}

int64_t weight_count(const Pass &p) { return int64_t(p.out_channels) * p.group_in() * p.kernel * p.kernel; }

}  // namespace

extern "C" int ff_cuda_conv_forward(const void *x, const void *x_stats, int x_activation, double x_slope,
                                    const void *weight, const void *bias, void *z, const void *y_stats,
                                    int y_activation, double y_slope, int64_t batch, int64_t channels, int64_t height,
                                    int64_t width, int64_t out_channels, int64_t kernel, int64_t stride,
                                    int64_t padding, int64_t groups, int dtype, void *stream) {
  if (batch == 0) return FF_OK;
  const Pass p = make_pass(batch, channels, height, width, out_channels, kernel, stride, padding, groups);
  if (!valid(p)) return FF_BAD_ARGUMENT;
  const ff::Norm in = ff::make_norm(x_stats, channels, x_activation, x_slope);
  const ff::Norm out = ff::make_norm(y_stats, out_channels, y_activation, y_slope);
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const T *input = static_cast<const T *>(x), *w = static_cast<const T *>(weight), *b = static_cast<const T *>(bias);
    T *output = static_cast<T *>(z);
    if (!depthwise(p)) return run_conv<T>(p, input, in, w, b, out, nullptr, out, output, s);
    if (ff::wide(channels, kPack) && ff::aligned({x, z}))
      return run_depthwise<T, kPack, false>(p, input, in, w, b, out, nullptr, output, s);
    return run_depthwise<T, 1, false>(p, input, in, w, b, out, nullptr, output, s);
  });
}

extern "C" int ff_cuda_conv_input_gradient(const void *grad, const void *weight, const void *x, const void *x_stats,
                                           int x_activation, double x_slope, void *grad_x, int64_t batch,
                                           int64_t channels, int64_t height, int64_t width, int64_t out_channels,
                                           int64_t kernel, int64_t stride, int64_t padding, int64_t groups, int dtype,
                                           void *stream) {
  if (batch == 0) return FF_OK;
  const Pass p = make_pass(batch, channels, height, width, out_channels, kernel, stride, padding, groups);
  Pass turned =
      make_pass(batch, out_channels, p.out_height, p.out_width, channels, kernel, 1, kernel - 1 - padding, groups);
  turned.out_height = p.height;
  turned.out_width = p.width;
  turned.up = p.stride;
  turned.transposed = true;
  if (!valid(p) || !valid(turned)) return FF_BAD_ARGUMENT;
  const ff::Norm gate_norm = ff::make_norm(x_stats, channels, x_activation, x_slope);
  const ff::Norm none = ff::make_norm(nullptr, out_channels, FF_NONE, 0);
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const T *g = static_cast<const T *>(grad), *w = static_cast<const T *>(weight), *gate = static_cast<const T *>(x);
    T *out = static_cast<T *>(grad_x);
    if (!depthwise(p)) return run_conv<T>(turned, g, none, w, nullptr, none, gate, gate_norm, out, s);
    if (ff::wide(channels, kPack) && ff::aligned({grad, x, grad_x}))
      return run_depthwise_input_gradient<T, kPack>(p, turned, g, w, gate, gate_norm, out, s);
    return run_depthwise_input_gradient<T, 1>(p, turned, g, w, gate, gate_norm, out, s);
  });
}

extern "C" int64_t ff_cuda_conv_weight_gradient_workspace(int64_t batch, int64_t channels, int64_t height,
                                                          int64_t width, int64_t out_channels, int64_t kernel,
                                                          int64_t stride, int64_t padding, int64_t groups, int dtype) {
  const Pass p = make_pass(batch, channels, height, width, out_channels, kernel, stride, padding, groups);
  if (batch == 0 || !valid(p)) return 0;
  const bool product = ff::as_product(p, dtype == FF_FLOAT32 ? 4 : 2);
  return (product ? ff::product_weight_slices(p) : weight_slices(p)) * weight_count(p) * int64_t(sizeof(float));
}

extern "C" int ff_cuda_conv_weight_gradient(const void *grad, const void *x, const void *x_stats, int x_activation,
                                            double x_slope, void *grad_weight, int64_t batch, int64_t channels,
                                            int64_t height, int64_t width, int64_t out_channels, int64_t kernel,
                                            int64_t stride, int64_t padding, int64_t groups, void *workspace, int dtype,
                                            void *stream) {
  if (batch == 0) return FF_OK;
  Pass p = make_pass(batch, channels, height, width, out_channels, kernel, stride, padding, groups);
  if (!valid(p)) return FF_BAD_ARGUMENT;
  const auto rest = [](int) { return kPixels * (kChunk + 1); };
  p.chunk = choose_chunk(p, rest);
  const size_t bytes = size_t(p.chunk * p.plane() + rest(p.chunk)) * sizeof(float);
  const int64_t parts = p.groups * ff::ceil_div(p.group_out(), kChunk) * ff::ceil_div(p.group_in(), p.chunk);
  const ff::Norm in = ff::make_norm(x_stats, channels, x_activation, x_slope);
  const int64_t slices = weight_slices(p), weights = weight_count(p);
  const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(parts));
  int span = 1;
  while (span < channels && span < kLanes) span *= 2;
  const dim3 columns(static_cast<unsigned>(slices), static_cast<unsigned>(ff::ceil_div(channels, span)));
  const dim3 taps(columns.x, columns.y, static_cast<unsigned>(kernel * kernel));
  const dim3 block(kLanes, kRows);
  float *partial = static_cast<float *>(workspace);
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const T *g = static_cast<const T *>(grad), *input = static_cast<const T *>(x);
    if (ff::as_product(p, sizeof(T))) {
      const int code = ff::product_weight_gradient(p, g, input, in, partial, s);
      if (code != FF_OK) return code;
      return ff::sum_slices(partial, ff::product_weight_slices(p), weights, static_cast<T *>(grad_weight), s);
    }
    if (!depthwise(p) && (bytes > 48 << 10 || parts > 65535)) return FF_BAD_ARGUMENT;
    if (depthwise(p) && p.kernel == 3 && p.stride == 1)
      depthwise_weight_gradient_kernel<T, 3, 1><<<columns, block, 0, s>>>(p, span, g, input, in, partial);
    else if (depthwise(p) && p.kernel == 3 && p.stride == 2)
      depthwise_weight_gradient_kernel<T, 3, 2><<<columns, block, 0, s>>>(p, span, g, input, in, partial);
    else if (depthwise(p))
      depthwise_weight_gradient_kernel<T, 0, 0><<<taps, block, 0, s>>>(p, span, g, input, in, partial);
    else if (p.kernel == 1)
      weight_gradient_kernel<T, 1><<<grid, kPixels, bytes, s>>>(p, g, input, in, partial);
    else if (p.kernel == 3)
      weight_gradient_kernel<T, 3><<<grid, kPixels, bytes, s>>>(p, g, input, in, partial);
    else
      weight_gradient_kernel<T, 0><<<grid, kPixels, bytes, s>>>(p, g, input, in, partial);
    return ff::sum_slices(partial, static_cast<int>(slices), weights, static_cast<T *>(grad_weight), s);
  });
}

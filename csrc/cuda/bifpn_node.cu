// The fusion in front of a BiFPN node, on NHWC tensors: v = activation(sum over inputs of w_i * resampled(x_i)),
// forward and backward. Resampled inputs are never stored. Backward takes two steps: over the node's pixels the
// products that the weights' gradient sums, and which pixel of a window is its maximum; over an input's pixels its
// gradient.
#include "channels.cuh"

namespace {

constexpr int kInputs = 3, kThreads = 256;
constexpr int64_t kMostBlocks = 65536, kMostSums = 512;

// One input; what concerns its resampling to height x width of the node.
struct Input {
  const void *x;
  int resample, height, width;
  float scale_y, scale_x;
  bool same;

  // Source of place i of the node for FF_RESAMPLE_UP, in the arithmetic of torch.nn.functional.interpolate.
  static __device__ __forceinline__ int nearest(int i, float scale, int size) {
    return min(static_cast<int>(floorf(__fmul_rn(float(i), scale))), size - 1);
  }
  // First place of the node, at most `target`, whose source is not before `source`.
  static __device__ int first_place(int source, float scale, int size, int target) {
    if (source >= size) return target;
    int i = min(target, static_cast<int>(float(source) / scale));
    while (i > 0 && nearest(i - 1, scale, size) >= source) --i;
    while (i < target && nearest(i, scale, size) < source) ++i;
    return i;
  }
  // First row and column, perhaps outside, of the 3x3 window of stride 2 at place i; with `same` zeros surround x.
  __device__ __forceinline__ int top(int i) const { return 2 * i - (same ? height % 2 : 1); }
  __device__ __forceinline__ int left(int i) const { return 2 * i - (same ? width % 2 : 1); }
};

struct Node {
  Input inputs[kInputs];
  const float *fusion_weight;
  int weights, batch, channels, height, width;
  float epsilon;

  __host__ __device__ int64_t pixels() const { return int64_t(batch) * height * width; }
};

// w_i = relu(p_i) / (sum of relu(p) + epsilon)
struct Weights {
  float total, value[kInputs];

  explicit __device__ Weights(const Node &node) {
    total = 0;
    for (int i = 0; i < node.weights; ++i) total += positive(node.fusion_weight[i]);
    total += node.epsilon;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) value[i] = i < node.weights ? positive(node.fusion_weight[i]) / total : 0.0f;
  }
  static __device__ __forceinline__ float positive(float v) { return v < 0 ? 0 : v; }
};

// The values of channels c, c + 1, ... of a resampled input at (image, y, x), and the place in its window, 3 * row +
// column, where the maximum is: the first of equal values, the last NaN, as in torch.nn.functional.max_pool2d.
template <class T, int V>
__device__ __forceinline__ void resampled(const Input &in, int channels, int image, int y, int x, int c, float *value,
                                          int *where) {
  using Pack = ff::Pack<T, V>;
  const T *source = static_cast<const T *>(in.x) + int64_t(image) * in.height * in.width * channels + c;
  if (in.resample != FF_RESAMPLE_DOWN) {
    if (in.resample == FF_RESAMPLE_UP) {
      y = Input::nearest(y, in.scale_y, in.height);
      x = Input::nearest(x, in.scale_x, in.width);
    }
    const Pack values = *reinterpret_cast<const Pack *>(source + (int64_t(y) * in.width + x) * channels);
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = ff::to_float(values.v[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    value[j] = -INFINITY;
    where[j] = -1;
  }
#pragma unroll 1
  for (int k = 0; k < 9; ++k) {
    const int row = in.top(y) + k / 3, column = in.left(x) + k % 3;
    const bool inside = row >= 0 && row < in.height && column >= 0 && column < in.width;
    if (!inside && !in.same) continue;
    const int64_t pixel = inside ? int64_t(row) * in.width + column : 0;
    const Pack values = *reinterpret_cast<const Pack *>(source + pixel * channels);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float v = inside ? ff::to_float(values.v[j]) : 0.0f;
      const bool wins = v > value[j] || v != v;
      if (wins) value[j] = v;
      if (wins || where[j] < 0) where[j] = k;
    }
  }
}

struct Place {
  int image, y, x, c;
};

// Pack i of a (., height, width, channels) map.
template <int V>
__device__ __forceinline__ Place place_of(int64_t i, int height, int width, int channels) {
  const int per_pixel = channels / V;
  const int64_t pixel = i / per_pixel, row = pixel / width;
  return Place{static_cast<int>(row / height), static_cast<int>(row % height), static_cast<int>(pixel % width),
               static_cast<int>(i % per_pixel) * V};
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) fuse_kernel(Node node, int activation, T *__restrict__ v, int64_t packs) {
  using Pack = ff::Pack<T, V>;
  const Weights weights(node);
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < packs; i += int64_t(gridDim.x) * kThreads) {
    const Place at = place_of<V>(i, node.height, node.width, node.channels);
    float sum[V], value[V];
    int where[V];
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0;
#pragma unroll
    for (int n = 0; n < kInputs; ++n) {
      if (node.inputs[n].x == nullptr) continue;
      resampled<T, V>(node.inputs[n], node.channels, at.image, at.y, at.x, at.c, value, where);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += weights.value[n] * value[j];
    }
    if (activation == FF_SILU)
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] = ff::silu(sum[j]);
    Pack values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = ff::from_float<T>(sum[j]);
    reinterpret_cast<Pack *>(v)[i] = values;
  }
}

// partial: (blocks, kInputs), sums of grad * resampled(x_i). where: (kInputs, pixels, channels), for pooled inputs.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) products_kernel(Node node, const T *__restrict__ grad, int64_t packs,
                                                            double *__restrict__ partial, uint8_t *__restrict__ where) {
  using Pack = ff::Pack<T, V>;
  __shared__ double sums[kInputs][kThreads];
  double sum[kInputs] = {};
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < packs; i += int64_t(gridDim.x) * kThreads) {
    const Place at = place_of<V>(i, node.height, node.width, node.channels);
    const Pack gradients = reinterpret_cast<const Pack *>(grad)[i];
    float value[V];
    int index[V];
#pragma unroll
    for (int n = 0; n < kInputs; ++n) {
      if (node.inputs[n].x == nullptr) continue;
      resampled<T, V>(node.inputs[n], node.channels, at.image, at.y, at.x, at.c, value, index);
      float product = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) product += ff::to_float(gradients.v[j]) * value[j];
      sum[n] += product;
      if (node.inputs[n].resample != FF_RESAMPLE_DOWN) continue;
      ff::Pack<uint8_t, V> bytes;
#pragma unroll
      for (int j = 0; j < V; ++j) bytes.v[j] = static_cast<uint8_t>(index[j]);
      reinterpret_cast<ff::Pack<uint8_t, V> *>(where + n * packs * V)[i] = bytes;
    }
  }
#pragma unroll
  for (int n = 0; n < kInputs; ++n) sums[n][threadIdx.x] = sum[n];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      for (int n = 0; n < kInputs; ++n) sums[n][threadIdx.x] += sums[n][threadIdx.x + half];
  }
  __syncthreads();
  if (threadIdx.x < kInputs) partial[int64_t(blockIdx.x) * kInputs + threadIdx.x] = sums[threadIdx.x][0];
}

// One block.
__global__ void __launch_bounds__(kThreads)
    weight_gradient_kernel(Node node, const double *__restrict__ partial, int blocks, float *__restrict__ grad_weight) {
  __shared__ double dots[kInputs];
  if (threadIdx.x < kInputs) {
    double sum = 0;
    for (int i = 0; i < blocks; ++i) sum += partial[int64_t(i) * kInputs + threadIdx.x];
    dots[threadIdx.x] = sum;
  }
  __syncthreads();
  const Weights weights(node);
  double mean = 0;
  for (int n = 0; n < kInputs; ++n) mean += dots[n] * weights.value[n];
  for (int i = threadIdx.x; i < node.weights; i += kThreads)
    grad_weight[i] = node.fusion_weight[i] <= 0
                         ? 0.0f
                         : static_cast<float>(((i < kInputs ? dots[i] : 0.0) - mean) / double(weights.total));
}

// The second launch bound: without it the compiler spills a register or two to reach a higher occupancy.
// The gradient of in, input n. where: (pixels, channels) of the node, this input's.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    input_gradient_kernel(Node node, Input in, int n, const T *__restrict__ grad, const uint8_t *__restrict__ where,
                          T *__restrict__ out, int64_t packs) {
  using Pack = ff::Pack<T, V>;
  const Weights weights(node);
  const float w = n == 0 ? weights.value[0] : n == 1 ? weights.value[1] : weights.value[2];
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < packs; i += int64_t(gridDim.x) * kThreads) {
    const Place at = place_of<V>(i, in.height, in.width, node.channels);
    const int64_t image = int64_t(at.image) * node.height * node.width;
    float sum[V];
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0;
    int top = at.y, bottom = at.y + 1, left = at.x, right = at.x + 1;
    if (in.resample == FF_RESAMPLE_UP) {
      top = Input::first_place(at.y, in.scale_y, in.height, node.height);
      bottom = Input::first_place(at.y + 1, in.scale_y, in.height, node.height);
      left = Input::first_place(at.x, in.scale_x, in.width, node.width);
      right = Input::first_place(at.x + 1, in.scale_x, in.width, node.width);
    } else if (in.resample == FF_RESAMPLE_DOWN) {
      // Windows are three high and start two apart: a row lies in at most two of them.
      bottom = min(node.height, (at.y - in.top(0)) / 2 + 1);
      right = min(node.width, (at.x - in.left(0)) / 2 + 1);
      top = max(0, bottom - 2);
      left = max(0, right - 2);
    }
#pragma unroll 1
    for (int y = top; y < bottom; ++y)
#pragma unroll 1
      for (int x = left; x < right; ++x) {
        const int64_t from = (image + int64_t(y) * node.width + x) * node.channels + at.c;
        const Pack gradients = *reinterpret_cast<const Pack *>(grad + from);
        if (in.resample != FF_RESAMPLE_DOWN) {
#pragma unroll
          for (int j = 0; j < V; ++j) sum[j] += ff::to_float(gradients.v[j]);
          continue;
        }
        const int row = at.y - in.top(y), column = at.x - in.left(x);
        if (row > 2 || column > 2) continue;
        const ff::Pack<uint8_t, V> bytes = *reinterpret_cast<const ff::Pack<uint8_t, V> *>(where + from);
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (bytes.v[j] == 3 * row + column) sum[j] += ff::to_float(gradients.v[j]);
      }
    Pack values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = ff::from_float<T>(sum[j] * w);
    reinterpret_cast<Pack *>(out)[i] = values;
  }
}

Input make_input(const void *x, int resample, int64_t height, int64_t width, int same, int64_t node_height,
                 int64_t node_width) {
  return Input{
      x,        resample, int(height), int(width), float(height) / float(node_height), float(width) / float(node_width),
      same != 0};
}

bool valid(const Node &node) {
  bool fits = node.batch >= 1 && node.height >= 1 && node.width >= 1 && node.pixels() < (int64_t(1) << 31);
  for (const Input &in : node.inputs)
    fits = fits && (in.x == nullptr || (in.height >= 1 && in.width >= 1 && in.height < (1 << 24) &&
                                        int64_t(node.batch) * in.height * in.width < (int64_t(1) << 31)));
  return fits;
}

}  // namespace

#define FF_NODE                                                                      \
  const Node node{{make_input(x0, resample0, height0, width0, same, height, width),  \
                   make_input(x1, resample1, height1, width1, same, height, width),  \
                   make_input(x2, resample2, height2, width2, same, height, width)}, \
                  static_cast<const float *>(fusion_weight),                         \
                  int(weights),                                                      \
                  int(batch),                                                        \
                  int(channels),                                                     \
                  int(height),                                                       \
                  int(width),                                                        \
                  static_cast<float>(epsilon)};                                      \
  if (!valid(node)) return FF_BAD_ARGUMENT;                                          \
  cudaStream_t s = static_cast<cudaStream_t>(stream)

extern "C" int ff_cuda_bifpn_fuse(const void *x0, const void *x1, const void *x2, int resample0, int resample1,
                                  int resample2, int64_t height0, int64_t width0, int64_t height1, int64_t width1,
                                  int64_t height2, int64_t width2, const void *fusion_weight, int64_t weights,
                                  double epsilon, int same, int64_t batch, int64_t channels, int64_t height,
                                  int64_t width, int activation, void *v, int dtype, void *stream) {
  FF_NODE;
  if (activation != FF_NONE && activation != FF_SILU) return FF_BAD_ARGUMENT;
  return ff::dispatch_packs(dtype, channels, {x0, x1, x2, v}, [&](auto zero, auto pack) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(pack)::value;
    const int64_t packs = node.pixels() * channels / V;
    fuse_kernel<T, V><<<ff::blocks_for(packs, kThreads, kMostBlocks), kThreads, 0, s>>>(node, activation,
                                                                                        static_cast<T *>(v), packs);
    return cudaGetLastError();
  });
}

extern "C" int64_t ff_cuda_bifpn_fuse_workspace(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return kMostSums * kInputs * int64_t(sizeof(double)) + kInputs * batch * channels * height * width;
}

extern "C" int ff_cuda_bifpn_fuse_backward(const void *x0, const void *x1, const void *x2, int resample0, int resample1,
                                           int resample2, int64_t height0, int64_t width0, int64_t height1,
                                           int64_t width1, int64_t height2, int64_t width2, const void *fusion_weight,
                                           int64_t weights, double epsilon, int same, int64_t batch, int64_t channels,
                                           int64_t height, int64_t width, const void *grad, void *grad0, void *grad1,
                                           void *grad2, void *grad_weight, void *workspace, int dtype, void *stream) {
  FF_NODE;
  void *const grads[kInputs] = {grad0, grad1, grad2};
  bool products = grad_weight != nullptr;
  for (int n = 0; n < kInputs; ++n)
    products = products || (grads[n] != nullptr && node.inputs[n].resample == FF_RESAMPLE_DOWN);
  double *partial = static_cast<double *>(workspace);
  uint8_t *where = reinterpret_cast<uint8_t *>(partial + kMostSums * kInputs);
  const std::initializer_list<const void *> tensors = {x0, x1, x2, grad, grad0, grad1, grad2, workspace};
  return ff::dispatch_packs(dtype, channels, tensors, [&](auto zero, auto pack) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(pack)::value;
    const T *g = static_cast<const T *>(grad);
    const int64_t packs = node.pixels() * channels / V;
    const unsigned blocks = ff::blocks_for(packs, 4 * kThreads, kMostSums);
    if (products) products_kernel<T, V><<<blocks, kThreads, 0, s>>>(node, g, packs, partial, where);
    if (grad_weight != nullptr)
      weight_gradient_kernel<<<1, kThreads, 0, s>>>(node, partial, int(blocks), static_cast<float *>(grad_weight));
    for (int n = 0; n < kInputs; ++n) {
      if (grads[n] == nullptr) continue;
      const Input &in = node.inputs[n];
      const int64_t count = batch * in.height * in.width * channels / V;
      input_gradient_kernel<T, V><<<ff::blocks_for(count, kThreads, kMostBlocks), kThreads, 0, s>>>(
          node, in, n, g, where + n * packs * V, static_cast<T *>(grads[n]), count);
    }
    return cudaGetLastError();
  });
}

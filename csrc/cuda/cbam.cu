// One application of CBAM on NHWC tensors, forward and backward: y = activation(x * g * s + residual), g a gate per
// image and channel, s a gate per image, channel group and pixel.
//
// Forward reads x three times: for the sums and maxima per channel, for the mean and maximum maps of u = x * g, and for
// the result. Backward reads x and the gradient three times and writes the gradient of x once. The maps between are
// NHWC of a few channels in float32; their convolution and batch normalisation are those of conv.cu and batch_norm.cu.
#include "channels.cuh"

namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int64_t kMostSlices = 64, kMostBlocks = 65536;
constexpr unsigned kAllLanes = 0xffffffffu;

// How threads share out the channels: `across` threads, a power of two, take a pack each, the others further pixels.
struct Columns {
  int channels, packs, across;

  Columns(int64_t channels, int lanes) : channels(int(channels)), packs(int(channels / lanes)), across(1) {
    while (across < packs && across < kWarp) across *= 2;
  }
  __host__ __device__ int rows() const { return kThreads / across; }
  int parts() const { return (packs + across - 1) / across; }
};

int64_t slices_for(const Columns &columns, int64_t pixels) {
  return ff::blocks_for(pixels, 16 * columns.rows(), kMostSlices);
}
// Most slices of any pack width: what a workspace holds.
int64_t slice_limit(int64_t channels, int64_t pixels) { return slices_for(Columns(channels, 1), pixels); }

__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }  // a NaN stays

__device__ __forceinline__ float sigmoid(float v) { return 1 / (1 + expf(-v)); }

// The columns' two values per channel over the rows of a block -> partial (batch, slices, 2, channels); the second
// values are added up, or their largest is found.
template <int V, bool kLargest>
__device__ void reduce_rows(const Columns &columns, const float *first, const float *second, float *partial) {
  __shared__ float rows[2][kThreads][V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    rows[0][threadIdx.x][j] = first[j];
    rows[1][threadIdx.x][j] = second[j];
  }
  __syncthreads();
  float *out = partial + (int64_t(blockIdx.z) * gridDim.x + blockIdx.x) * 2 * columns.channels;
  for (int i = threadIdx.x; i < columns.across * V; i += kThreads) {
    const int column = i / V, c = (blockIdx.y * columns.across + column) * V + i % V;
    if (c >= columns.channels) continue;
    float sum = rows[0][column][i % V], other = rows[1][column][i % V];
    for (int row = 1; row < columns.rows(); ++row) {
      const int thread = row * columns.across + column;
      const float value = rows[1][thread][i % V];
      sum += rows[0][thread][i % V];
      other = kLargest ? larger(other, value) : other + value;
    }
    out[c] = sum;
    out[columns.channels + c] = other;
  }
}

// grid: (slices, parts of the channels, batch).
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(Columns columns, const T *__restrict__ x, int64_t pixels, float *__restrict__ partial) {
  using Pack = ff::Pack<T, V>;
  const int pack = blockIdx.y * columns.across + threadIdx.x % columns.across;
  float sum[V], most[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    sum[j] = 0;
    most[j] = -INFINITY;
  }
  if (pack < columns.packs) {
    const T *image = x + blockIdx.z * pixels * columns.channels + pack * V;
    const int64_t step = int64_t(gridDim.x) * columns.rows();
    for (int64_t p = blockIdx.x * columns.rows() + threadIdx.x / columns.across; p < pixels; p += step) {
      const Pack values = *reinterpret_cast<const Pack *>(image + p * columns.channels);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float v = ff::to_float(values.v[j]);
        sum[j] += v;
        most[j] = larger(most[j], v);
      }
    }
  }
  reduce_rows<V, true>(columns, sum, most, partial);
}

// MLP(v) = fc2(relu(fc1(v))) on every chunk of `width` channels; a block works on one image, its pooled mean and
// maximum at once. hidden: (batch, 2, chunks, size), after the ReLU.
struct Mlp {
  const float *w1, *b1, *w2, *b2;
  int channels, width, size;

  __device__ int chunks() const { return channels / width; }
  __device__ int units() const { return chunks() * size; }

  // body(unit, lane) by all lanes of a warp for each unit.
  template <class Body>
  __device__ __forceinline__ void over_units(int count, const Body &body) const {
    for (int unit = threadIdx.x / kWarp; unit < count; unit += kThreads / kWarp) body(unit, threadIdx.x % kWarp);
  }

  static __device__ __forceinline__ float warp_sum(float v) {
    for (int bits = kWarp / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(kAllLanes, v, bits);
    return v;
  }

  __device__ void first_layer(const float *pooled, float *hidden) const {
    over_units(2 * units(), [&](int unit, int lane) {
      const int which = unit / units(), chunk = unit % units() / size, i = unit % size;
      const float *v = pooled + (int64_t(which) * gridDim.x + blockIdx.x) * channels + chunk * width;
      float sum = 0;
      for (int j = lane; j < width; j += kWarp) sum += w1[i * width + j] * v[j];
      sum = warp_sum(sum) + (b1 == nullptr ? 0.0f : b1[i]);
      if (lane == 0) hidden[int64_t(blockIdx.x) * 2 * units() + unit] = sum < 0 ? 0 : sum;
    });
  }
};

// pooled: (2, batch, channels), gate: (batch, channels). One block per image.
__global__ void __launch_bounds__(kThreads)
    gate_kernel(const float *__restrict__ partial, int slices, int64_t pixels, Mlp mlp, float *pooled, float *hidden,
                float *__restrict__ gate) {
  const int channels = mlp.channels;
  const int64_t image = blockIdx.x, vectors = int64_t(gridDim.x) * channels;
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    const float *at = partial + image * slices * 2 * channels + c;
    double sum = 0;
    float most = -INFINITY;
    for (int slice = 0; slice < slices; ++slice, at += 2 * channels) {
      sum += at[0];
      most = larger(most, at[channels]);
    }
    pooled[image * channels + c] = static_cast<float>(sum / double(pixels));
    pooled[vectors + image * channels + c] = most;
  }
  __syncthreads();
  mlp.first_layer(pooled, hidden);
  __syncthreads();
  const float *h = hidden + image * 2 * mlp.units();
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    const int j = c % mlp.width, first = c / mlp.width * mlp.size;
    float sum = mlp.b2 == nullptr ? 0.0f : 2 * mlp.b2[j];
    for (int i = 0; i < mlp.size; ++i) sum += mlp.w2[j * mlp.size + i] * (h[first + i] + h[mlp.units() + first + i]);
    gate[image * channels + c] = sigmoid(sum);
  }
}

// Groups of channels: item i = pixel * groups + group is `size` neighbouring channels, shared by `lanes` threads.
struct Groups {
  int64_t items, per_image;
  int channels, count, size, lanes;
  bool max_first;

  Groups(int64_t batch, int64_t channels, int64_t pixels, int64_t groups, int order, int pack)
      : items(batch * pixels * groups),
        per_image(pixels * groups),
        channels(int(channels)),
        count(int(groups)),
        size(int(channels / groups)),
        lanes(1),
        max_first(order != 0) {
    while (lanes < kWarp && lanes * pack < size) lanes *= 2;
  }
  __device__ __forceinline__ int64_t mean_map(int64_t item) const { return 2 * item + (max_first ? 1 : 0); }
  __device__ __forceinline__ int64_t max_map(int64_t item) const { return 2 * item + (max_first ? 0 : 1); }
  int64_t per_block() const { return kThreads / lanes; }
  unsigned blocks() const { return ff::blocks_for(items, per_block(), kMostBlocks); }

  // body(item, lane, there) by all threads of a block alike, since they meet in shuffles; `there`: it is a real item.
  template <class Body>
  __device__ __forceinline__ void over_items(const Body &body) const {
    const int64_t step = int64_t(gridDim.x) * (kThreads / lanes);
    for (int64_t first = int64_t(blockIdx.x) * (kThreads / lanes); first < items; first += step) {
      const int64_t item = first + threadIdx.x / lanes;
      body(item, int(threadIdx.x) % lanes, item < items);
    }
  }
  __device__ __forceinline__ float sum(float v) const {
    for (int bits = lanes / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(kAllLanes, v, bits);
    return v;
  }
  __device__ __forceinline__ float maximum(float v) const {
    for (int bits = lanes / 2; bits > 0; bits /= 2) v = larger(v, __shfl_xor_sync(kAllLanes, v, bits));
    return v;
  }
};

// maps: (pixels, 2 groups), of u = x * gate.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    maps_kernel(Groups groups, const T *__restrict__ x, const float *__restrict__ gate, float *__restrict__ maps) {
  using Pack = ff::Pack<T, V>;
  groups.over_items([&](int64_t item, int lane, bool there) {
    float sum = 0, most = -INFINITY;
    if (there) {
      const T *source = x + item * groups.size;
      const float *g = gate + item / groups.per_image * groups.channels + item % groups.count * groups.size;
      for (int c = lane * V; c < groups.size; c += groups.lanes * V) {
        const Pack values = *reinterpret_cast<const Pack *>(source + c);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float u = __fmul_rn(ff::to_float(values.v[j]), g[c + j]);
          sum += u;
          most = larger(most, u);
        }
      }
    }
    sum = groups.sum(sum);
    most = groups.maximum(most);
    if (there && lane == 0) {
      maps[groups.mean_map(item)] = sum / groups.size;
      maps[groups.max_map(item)] = most;
    }
  });
}

// spatial = sigmoid(norm(z)), z and spatial (pixels, groups); y = x * gate * spatial + residual.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const T *__restrict__ x, const float *__restrict__ gate, const float *__restrict__ z, ff::Norm norm,
                 const T *__restrict__ residual, bool relu, float *__restrict__ spatial, T *__restrict__ y,
                 int64_t image_packs, int64_t packs, int channels) {
  using Pack = ff::Pack<T, V>;
  const int per_pixel = channels / V, groups = norm.channels, size = channels / groups;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < packs; i += int64_t(gridDim.x) * kThreads) {
    const int c = static_cast<int>(i % per_pixel) * V;
    const int64_t pixel = i / per_pixel;
    const float *g = gate + i / image_packs * channels + c;
    Pack values = reinterpret_cast<const Pack *>(x)[i], added{};
    if (residual != nullptr) added = reinterpret_cast<const Pack *>(residual)[i];
    float s = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int group = (c + j) / size, inside = (c + j) % size;
      if (j == 0 || inside == 0) s = sigmoid(norm.normalised(z[pixel * groups + group], group));
      if (inside == 0) spatial[pixel * groups + group] = s;
      float v = ff::to_float(values.v[j]) * g[j] * s;
      if (residual != nullptr) v += ff::to_float(added.v[j]);
      values.v[j] = ff::from_float<T>(relu && v < 0 ? 0.0f : v);
    }
    reinterpret_cast<Pack *>(y)[i] = values;
  }
}

// The gradient in front of the last ReLU, where y is its result.
template <class T>
__device__ __forceinline__ float before_relu(T grad, T y, bool relu) {
  return relu && ff::to_float(y) <= 0 ? 0.0f : ff::to_float(grad);
}

// The gradient of norm(z), (pixels, groups), and one over the number of channels of a group that equal its maximum.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    spatial_gradient_kernel(Groups groups, const T *__restrict__ grad, const T *__restrict__ y, const T *__restrict__ x,
                            const float *__restrict__ gate, const float *__restrict__ maps,
                            const float *__restrict__ spatial, float *__restrict__ out, float *__restrict__ shares) {
  using Pack = ff::Pack<T, V>;
  groups.over_items([&](int64_t item, int lane, bool there) {
    float sum = 0, equal = 0;
    if (there) {
      const int64_t base = item * groups.size;
      const float *g = gate + item / groups.per_image * groups.channels + item % groups.count * groups.size;
      const float most = maps[groups.max_map(item)];
      for (int c = lane * V; c < groups.size; c += groups.lanes * V) {
        const Pack values = *reinterpret_cast<const Pack *>(x + base + c);
        const Pack gradients = *reinterpret_cast<const Pack *>(grad + base + c);
        Pack results{};
        if (y != nullptr) results = *reinterpret_cast<const Pack *>(y + base + c);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float u = __fmul_rn(ff::to_float(values.v[j]), g[c + j]);
          sum += before_relu(gradients.v[j], results.v[j], y != nullptr) * u;
          equal += u == most ? 1.0f : 0.0f;
        }
      }
    }
    sum = groups.sum(sum);
    equal = groups.sum(equal);
    if (there && lane == 0) {
      const float s = spatial[item];
      out[item] = sum * s * (1 - s);
      shares[item] = 1 / equal;
    }
  });
}

// What the gradient of u depends on besides x and grad, per pixel and group.
struct Planes {
  const float *maps, *grad_maps, *spatial, *shares;
};

// kSums: partial (batch, slices, 2, channels), the gradient of gate and how many pixels equal the channel's maximum.
// Otherwise grad_x, to which `each` (batch, 2, channels) adds for every pixel and for those of the maximum.
template <class T, int V, bool kSums>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Columns columns, Groups groups, const T *__restrict__ grad, const T *__restrict__ y,
                    const T *__restrict__ x, const float *__restrict__ gate, const float *__restrict__ largest,
                    Planes planes, int64_t pixels, float *__restrict__ partial, const float *__restrict__ each,
                    bool add_grad, T *__restrict__ grad_x) {
  using Pack = ff::Pack<T, V>;
  const int pack = blockIdx.y * columns.across + threadIdx.x % columns.across, c = pack * V;
  float sum[V], equal[V];
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = equal[j] = 0;
  if (pack < columns.packs) {
    const int first = c / groups.size, inside = c % groups.size;
    const float portion = 1.0f / groups.size;
    float g[V], most[V], add[V], share[V];
    const int64_t row = int64_t(blockIdx.z) * columns.channels + c;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      g[j] = gate[row + j];
      most[j] = largest[row + j];
      add[j] = kSums ? 0.0f : each[row + int64_t(blockIdx.z) * columns.channels + j];
      share[j] = kSums ? 0.0f : each[row + int64_t(blockIdx.z + 1) * columns.channels + j];
    }
    const int64_t step = int64_t(gridDim.x) * columns.rows();
    for (int64_t p = blockIdx.x * columns.rows() + threadIdx.x / columns.across; p < pixels; p += step) {
      const int64_t pixel = blockIdx.z * pixels + p, at = pixel * columns.channels + c;
      const Pack gradients = *reinterpret_cast<const Pack *>(grad + at);
      Pack values = *reinterpret_cast<const Pack *>(x + at), results{};
      if (y != nullptr) results = *reinterpret_cast<const Pack *>(y + at);
      int64_t item = pixel * groups.count + first;
      int left = groups.size - inside;
      float s = 0, mean = 0, maximum = 0, of_maximum = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (left == 0) {
          ++item;
          left = groups.size;
        }
        if (j == 0 || left == groups.size) {
          s = planes.spatial[item];
          mean = planes.grad_maps[groups.mean_map(item)] * portion;
          maximum = planes.maps[groups.max_map(item)];
          of_maximum = planes.grad_maps[groups.max_map(item)] * planes.shares[item];
        }
        --left;
        const float v = ff::to_float(values.v[j]), outer = before_relu(gradients.v[j], results.v[j], y != nullptr);
        const float du = outer * s + mean + (__fmul_rn(v, g[j]) == maximum ? of_maximum : 0.0f);
        if (kSums) {
          sum[j] += du * v;
          equal[j] += v == most[j] ? 1.0f : 0.0f;
        } else {
          const float dx = du * g[j] + add[j] + (v == most[j] ? share[j] : 0.0f);
          values.v[j] = ff::from_float<T>(add_grad ? dx + outer : dx);
        }
      }
      if (!kSums) *reinterpret_cast<Pack *>(grad_x + at) = values;
    }
  }
  if constexpr (kSums) reduce_rows<V, false>(columns, sum, equal, partial);
}

// Through the sigmoid and the MLP. logits (batch, channels) and units (batch, 2, chunks, hidden): gradients of what the
// sigmoid and the ReLU read. each (batch, 2, channels): what every pixel and every maximum of x receives.
__global__ void __launch_bounds__(kThreads)
    gate_gradient_kernel(const float *__restrict__ partial, int slices, int64_t pixels, Mlp mlp,
                         const float *__restrict__ pooled, const float *__restrict__ gate, float *hidden, float *logits,
                         float *units, float *each) {
  const int channels = mlp.channels, count = mlp.units();
  const int64_t image = blockIdx.x;
  float *mine = logits + image * channels, *coefficients = each + image * 2 * channels;
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    const float *at = partial + image * slices * 2 * channels + c;
    double sum = 0, ties = 0;
    for (int slice = 0; slice < slices; ++slice, at += 2 * channels) {
      sum += at[0];
      ties += at[channels];
    }
    const float g = gate[image * channels + c];
    mine[c] = static_cast<float>(sum) * g * (1 - g);
    coefficients[c] = 1 / static_cast<float>(pixels);
    coefficients[channels + c] = 1 / static_cast<float>(ties);
  }
  mlp.first_layer(pooled, hidden);
  __syncthreads();
  const float *h = hidden + image * 2 * count;
  float *dh = units + image * 2 * count;
  mlp.over_units(count, [&](int unit, int lane) {
    const int i = unit % mlp.size;
    float sum = 0;
    for (int j = lane; j < mlp.width; j += kWarp)
      sum += mine[unit / mlp.size * mlp.width + j] * mlp.w2[j * mlp.size + i];
    sum = Mlp::warp_sum(sum);
    if (lane < 2) dh[lane * count + unit] = h[lane * count + unit] <= 0 ? 0.0f : sum;
  });
  __syncthreads();
  for (int c = threadIdx.x; c < channels; c += kThreads)
    for (int which = 0; which < 2; ++which) {
      const float *of_chunk = dh + which * count + c / mlp.width * mlp.size;
      float sum = 0;
      for (int i = 0; i < mlp.size; ++i) sum += of_chunk[i] * mlp.w1[i * mlp.width + c % mlp.width];
      coefficients[which * channels + c] *= sum;
    }
}

// Gradients of fc1_weight, fc1_bias, fc2_weight, fc2_bias, one thread each.
__global__ void __launch_bounds__(kThreads)
    mlp_gradient_kernel(int batch, Mlp mlp, const float *__restrict__ pooled, const float *__restrict__ hidden,
                        const float *__restrict__ logits, const float *__restrict__ units, float *__restrict__ grad_w1,
                        float *__restrict__ grad_b1, float *__restrict__ grad_w2, float *__restrict__ grad_b2) {
  const int weights = mlp.size * mlp.width, count = mlp.units();
  int n = blockIdx.x * kThreads + threadIdx.x;
  const bool first = n < weights + mlp.size;
  if (!first) n -= weights + mlp.size;
  if (n >= weights + (first ? mlp.size : mlp.width)) return;
  const bool bias = n >= weights;
  // Of fc1: row i, column j of w1; of fc2: row j, column i of w2.
  const int i = first ? (bias ? n - weights : n / mlp.width) : n % mlp.size;
  const int j = first ? n % mlp.width : (bias ? n - weights : n / mlp.size);
  double sum = 0;
  for (int image = 0; image < batch; ++image)
    for (int chunk = 0; chunk < mlp.chunks(); ++chunk)
      for (int which = 0; which < 2; ++which) {
        const int64_t unit = (int64_t(image) * 2 + which) * count + chunk * mlp.size + i;
        const int64_t c = int64_t(image) * mlp.channels + chunk * mlp.width + j;
        if (first)
          sum += units[unit] * (bias ? 1.0 : double(pooled[int64_t(which) * batch * mlp.channels + c]));
        else
          sum += logits[c] * (bias ? 1.0 : double(hidden[unit]));
      }
  (first ? (bias ? grad_b1 : grad_w1) : (bias ? grad_b2 : grad_w2))[bias ? n - weights : n] = static_cast<float>(sum);
}

bool valid(int64_t batch, int64_t channels, int64_t pixels, int64_t hidden, int64_t mlp_width, int64_t groups) {
  return batch >= 1 && batch <= 65535 && pixels >= 1 && groups >= 1 && channels % groups == 0 && mlp_width >= 1 &&
         channels % mlp_width == 0 && channels < (int64_t(1) << 20) && hidden * mlp_width < (int64_t(1) << 30);
}

Mlp make_mlp(const void *w1, const void *b1, const void *w2, const void *b2, int64_t channels, int64_t width,
             int64_t hidden) {
  const auto at = [](const void *p) { return static_cast<const float *>(p); };
  return Mlp{at(w1), at(b1), at(w2), at(b2), int(channels), int(width), int(hidden)};
}

// Floats of a workspace: partial sums, hidden units, and for the backward pass the gradients of logits, of hidden units
// and `each`.
struct Plan {
  float *partial, *hidden, *logits, *units, *each;
  int64_t floats;

  Plan(void *workspace, int64_t batch, int64_t channels, int64_t pixels, int64_t hidden_size, int64_t mlp_width) {
    const int64_t unit_count = 2 * batch * (channels / mlp_width) * hidden_size;
    partial = static_cast<float *>(workspace);
    hidden = partial + batch * slice_limit(channels, pixels) * 2 * channels;
    logits = hidden + unit_count;
    units = logits + batch * channels;
    each = units + unit_count;
    floats = each + 2 * batch * channels - partial;
  }
};

}  // namespace

extern "C" int64_t ff_cuda_cbam_workspace(int64_t batch, int64_t channels, int64_t pixels, int64_t hidden,
                                          int64_t mlp_width) {
  return Plan(nullptr, batch, channels, pixels, hidden, mlp_width).floats * int64_t(sizeof(float));
}

extern "C" int ff_cuda_cbam_maps(const void *x, const void *fc1_weight, const void *fc1_bias, const void *fc2_weight,
                                 const void *fc2_bias, void *pooled, void *gate, void *maps, int64_t batch,
                                 int64_t channels, int64_t pixels, int64_t hidden, int64_t mlp_width, int64_t groups,
                                 int spatial_order, void *workspace, int dtype, void *stream) {
  if (!valid(batch, channels, pixels, hidden, mlp_width, groups)) return FF_BAD_ARGUMENT;
  const Plan plan(workspace, batch, channels, pixels, hidden, mlp_width);
  const Mlp mlp = make_mlp(fc1_weight, fc1_bias, fc2_weight, fc2_bias, channels, mlp_width, hidden);
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  float *g = static_cast<float *>(gate);
  const int code = ff::dispatch_packs(dtype, channels, {x}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const Columns columns(channels, V);
    const int64_t slices = slices_for(columns, pixels);
    const dim3 grid(unsigned(slices), unsigned(columns.parts()), unsigned(batch));
    pool_kernel<T, V><<<grid, kThreads, 0, s>>>(columns, static_cast<const T *>(x), pixels, plan.partial);
    gate_kernel<<<unsigned(batch), kThreads, 0, s>>>(plan.partial, int(slices), pixels, mlp,
                                                     static_cast<float *>(pooled), plan.hidden, g);
    return cudaGetLastError();
  });
  if (code != FF_OK) return code;
  return ff::dispatch_packs(dtype, channels / groups, {x}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const Groups all(batch, channels, pixels, groups, spatial_order, V);
    maps_kernel<T, V><<<all.blocks(), kThreads, 0, s>>>(all, static_cast<const T *>(x), g, static_cast<float *>(maps));
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_cbam_apply(const void *x, const void *gate, const void *z, const void *z_stats,
                                  const void *residual, int relu, void *spatial, void *y, int64_t batch,
                                  int64_t channels, int64_t pixels, int64_t groups, int dtype, void *stream) {
  if (!valid(batch, channels, pixels, 1, channels, groups)) return FF_BAD_ARGUMENT;
  const ff::Norm norm = ff::make_norm(z_stats, groups, FF_NONE, 0);
  return ff::dispatch_packs(dtype, channels, {x, residual, y}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const int64_t image_packs = pixels * channels / V;
    apply_kernel<T, V><<<ff::blocks_for(batch * image_packs, kThreads, kMostBlocks), kThreads, 0,
                         static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T *>(x), static_cast<const float *>(gate), static_cast<const float *>(z), norm,
        static_cast<const T *>(residual), relu != 0, static_cast<float *>(spatial), static_cast<T *>(y), image_packs,
        batch * image_packs, int(channels));
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_cbam_spatial_gradient(const void *grad, const void *y, const void *x, const void *gate,
                                             const void *maps, const void *spatial, void *grad_normalised, void *shares,
                                             int64_t batch, int64_t channels, int64_t pixels, int64_t groups,
                                             int spatial_order, int dtype, void *stream) {
  if (!valid(batch, channels, pixels, 1, channels, groups)) return FF_BAD_ARGUMENT;
  return ff::dispatch_packs(dtype, channels / groups, {grad, y, x}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const Groups all(batch, channels, pixels, groups, spatial_order, V);
    spatial_gradient_kernel<T, V><<<all.blocks(), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        all, static_cast<const T *>(grad), static_cast<const T *>(y), static_cast<const T *>(x),
        static_cast<const float *>(gate), static_cast<const float *>(maps), static_cast<const float *>(spatial),
        static_cast<float *>(grad_normalised), static_cast<float *>(shares));
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_cbam_backward(const void *grad, const void *y, const void *x, const void *fc1_weight,
                                     const void *fc1_bias, const void *fc2_weight, const void *fc2_bias,
                                     const void *pooled, const void *gate, const void *maps, const void *grad_maps,
                                     const void *spatial, const void *shares, int add_grad, void *grad_x,
                                     void *grad_fc1_weight, void *grad_fc1_bias, void *grad_fc2_weight,
                                     void *grad_fc2_bias, int64_t batch, int64_t channels, int64_t pixels,
                                     int64_t hidden, int64_t mlp_width, int64_t groups, int spatial_order,
                                     void *workspace, int dtype, void *stream) {
  if (!valid(batch, channels, pixels, hidden, mlp_width, groups)) return FF_BAD_ARGUMENT;
  const Plan plan(workspace, batch, channels, pixels, hidden, mlp_width);
  const Mlp mlp = make_mlp(fc1_weight, fc1_bias, fc2_weight, fc2_bias, channels, mlp_width, hidden);
  const auto at = [](const void *p) { return static_cast<const float *>(p); };
  const Planes planes{at(maps), at(grad_maps), at(spatial), at(shares)};
  const float *largest = at(pooled) + batch * channels;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  return ff::dispatch_packs(dtype, channels, {grad, y, x, grad_x}, [&](auto zero, auto width) -> int {
    using T = decltype(zero);
    constexpr int V = decltype(width)::value;
    const Columns columns(channels, V);
    const Groups all(batch, channels, pixels, groups, spatial_order, V);
    const int64_t slices = slices_for(columns, pixels);
    const dim3 grid(unsigned(slices), unsigned(columns.parts()), unsigned(batch));
    const T *g = static_cast<const T *>(grad), *result = static_cast<const T *>(y), *input = static_cast<const T *>(x);
    gradient_kernel<T, V, true><<<grid, kThreads, 0, s>>>(columns, all, g, result, input, at(gate), largest, planes,
                                                          pixels, plan.partial, nullptr, false, nullptr);
    gate_gradient_kernel<<<unsigned(batch), kThreads, 0, s>>>(
        plan.partial, int(slices), pixels, mlp, at(pooled), at(gate), plan.hidden, plan.logits, plan.units, plan.each);
    const int64_t parameters = 2 * hidden * mlp_width + hidden + mlp_width;
    mlp_gradient_kernel<<<ff::blocks_for(parameters, kThreads, INT32_MAX), kThreads, 0, s>>>(
        int(batch), mlp, at(pooled), plan.hidden, plan.logits, plan.units, static_cast<float *>(grad_fc1_weight),
        static_cast<float *>(grad_fc1_bias), static_cast<float *>(grad_fc2_weight),
        static_cast<float *>(grad_fc2_bias));
    if (grad_x != nullptr)
      gradient_kernel<T, V, false><<<grid, kThreads, 0, s>>>(columns, all, g, result, input, at(gate), largest, planes,
                                                             pixels, nullptr, plan.each, add_grad != 0,
                                                             static_cast<T *>(grad_x));
    return cudaGetLastError();
  });
}

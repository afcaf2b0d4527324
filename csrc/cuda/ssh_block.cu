// The SSH block in evaluation mode as one kernel, on NHWC tensors: five grouped
// 3x3 convolutions with their batch normalisations and ReLUs, concatenation and
// channel shuffle. A block keeps its tile of the input, with a halo of three
// pixels, and what lies between the convolutions in shared memory; nothing but
// the output is stored.
#include "channels.cuh"

namespace {

constexpr int kLayers = 5, kTaps = 9, kThreads = 256;
constexpr int kSharedBytes = 48 << 10;
constexpr int kTileHeight = 8;
template <class T>
constexpr int kTileWidth = sizeof(T) == 2 ? 16 : 8;
constexpr int kHaloX = 3, kHaloShared = 2,
              kHaloLast = 1;  // of the input, of layer 1, of layer 3

// A convolution and its batch normalisation; no bias, weight or offset: null.
template <class T>
struct Layer {
  const T *weight, *bias;
  ff::Numbers bn_weight, bn_bias, mean, variance;
  int in, out, groups;
  float eps;

  __host__ __device__ int group_in() const { return in / groups; }
  __host__ __device__ int group_out() const { return out / groups; }
  __host__ __device__ int lanes() const { return group_out() <= 2 ? 2 : 4; }  // output channels of a thread
  __host__ __device__ int parts() const { return (group_out() + lanes() - 1) / lanes(); }
  __host__ __device__ int weights() const { return groups * parts() * kTaps * group_in() * lanes(); }
  __host__ __device__ int floats() const { return weights() + 3 * out; }
};

template <class T>
struct Ssh {
  Layer<T> layers[kLayers];
  int batch, height, width, shuffle_groups;

  __host__ __device__ int channels() const { return layers[0].in; }
  __host__ __device__ int outputs() const { return layers[0].out + layers[2].out + layers[4].out; }
  __host__ __device__ int tiles_x() const { return (width + kTileWidth<T> - 1) / kTileWidth<T>; }
  __host__ __device__ int tiles_y() const { return (height + kTileHeight - 1) / kTileHeight; }
};

// Elements between pixels in shared memory: an odd number of 4-byte words, so
// that neighbouring pixels lie in different banks.
template <class T>
__host__ __device__ constexpr int pitch_of(int channels) {
  constexpr int per_word = 4 / int(sizeof(T));
  return ((channels + per_word - 1) / per_word | 1) * per_word;
}

template <class T>
__host__ __device__ constexpr int area_of(int halo) {
  return (kTileHeight + 2 * halo) * (kTileWidth<T> + 2 * halo);
}

// The tile with a halo around it, in shared memory.
template <class T>
struct Map {
  T *data;
  int pitch, halo;

  __device__ Map(T *&memory, int channels, int halo) : data(memory), pitch(pitch_of<T>(channels)), halo(halo) {
    memory += size(channels, halo);
  }
  static __host__ __device__ int size(int channels, int halo) { return area_of<T>(halo) * pitch_of<T>(channels); }
  __device__ __forceinline__ int width() const { return kTileWidth<T> + 2 * halo; }
};

template <class T>
__host__ __device__ int map_elements(const Ssh<T> &ssh) {
  return Map<T>::size(ssh.channels(), kHaloX) + Map<T>::size(ssh.layers[1].out, kHaloShared) +
         Map<T>::size(ssh.layers[3].out, kHaloLast) + Map<T>::size(ssh.outputs(), 0);
}

template <class T>
int shared_bytes(const Ssh<T> &ssh) {
  int floats = 0;
  for (const Layer<T> &layer : ssh.layers) floats = layer.floats() > floats ? layer.floats() : floats;
  return floats * int(sizeof(float)) + map_elements(ssh) * int(sizeof(T));
}

struct Origin {
  int image, y, x;  // of the tile's first pixel
};

// weights: [group and part][tap][input channel][lane], then of every output
// channel bias - mean, scale and offset.
template <class T>
__device__ void stage_layer(const Layer<T> &layer, float *weights) {
  const int lanes = layer.lanes(), group_in = layer.group_in(), parts = layer.parts();
#pragma unroll 1
  for (int i = threadIdx.x; i < layer.weights(); i += kThreads) {
    const int lane = i % lanes, c = i / lanes % group_in, tap = i / lanes / group_in % kTaps;
    const int part = i / lanes / group_in / kTaps, o = part % parts * lanes + lane;
    const int64_t row = int64_t(part / parts * layer.group_out() + o) * group_in + c;
    weights[i] = o < layer.group_out() ? ff::to_float(layer.weight[row * kTaps + tap]) : 0.0f;
  }
  float *finish = weights + layer.weights();
#pragma unroll 1
  for (int o = threadIdx.x; o < layer.out; o += kThreads) {
    finish[o] = (layer.bias == nullptr ? 0.0f : ff::to_float(layer.bias[o])) - layer.mean.at(o);
    finish[layer.out + o] = layer.bn_weight.at(o, 1) / sqrtf(layer.variance.at(o) + layer.eps);
    finish[2 * layer.out + o] = layer.bn_bias.at(o);
  }
}

// Channel o of the layer goes to channel first + o of the target's, shuffled in
// shuffle_groups of `channels`.
struct Destination {
  int first, channels, shuffle_groups;

  __device__ __forceinline__ int channel(int o) const {
    const int c = first + o, per_group = channels / shuffle_groups;
    return c % per_group * shuffle_groups + c / per_group;
  }
};

template <int Lanes, class T>
__device__ void convolve_lanes(const Ssh<T> &ssh, const Layer<T> &layer, const float *weights, const Origin &origin,
                               const Map<T> &source, const Map<T> &target, const Destination &to) {
  const int area = area_of<T>(target.halo), width = target.width(), group_in = layer.group_in(), parts = layer.parts();
  const int inset = source.halo - target.halo - 1;
  const float *finish = weights + layer.weights();
#pragma unroll 1
  for (int i = threadIdx.x; i < area * layer.groups * parts; i += kThreads) {
    const int place = i % area, part = i / area, row = place / width, column = place % width;
    const int group = part / parts, first = part % parts * Lanes;
    const int y = origin.y + row - target.halo, x = origin.x + column - target.halo;
    const bool inside = y >= 0 && y < ssh.height && x >= 0 && x < ssh.width;
    float sum[Lanes] = {};
    if (inside) {
      const T *corner =
          source.data + ((row + inset) * source.width() + column + inset) * source.pitch + group * group_in;
      const float *w = weights + part * kTaps * group_in * Lanes;
#pragma unroll 1
      for (int tap = 0; tap < kTaps; ++tap) {
        const T *values = corner + (tap / 3 * source.width() + tap % 3) * source.pitch;
#pragma unroll 4
        for (int c = 0; c < group_in; ++c, w += Lanes) {
          const float v = ff::to_float(values[c]);
#pragma unroll
          for (int lane = 0; lane < Lanes; ++lane) sum[lane] += v * w[lane];
        }
      }
    }
#pragma unroll
    for (int lane = 0; lane < Lanes; ++lane) {
      if (first + lane >= layer.group_out()) continue;
      const int o = group * layer.group_out() + first + lane;
      const float v = (sum[lane] + finish[o]) * finish[layer.out + o] + finish[2 * layer.out + o];
      // What lies outside the image pads the next convolution. A NaN stays.
      target.data[place * target.pitch + to.channel(o)] = ff::from_float<T>(!inside || v < 0 ? 0.0f : v);
    }
  }
}

template <class T>
__device__ void convolve(const Ssh<T> &ssh, const Layer<T> &layer, float *weights, const Origin &origin,
                         const Map<T> &source, const Map<T> &target, const Destination &to) {
  __syncthreads();
  stage_layer(layer, weights);
  __syncthreads();
  if (layer.lanes() == 2)
    convolve_lanes<2>(ssh, layer, weights, origin, source, target, to);
  else
    convolve_lanes<4>(ssh, layer, weights, origin, source, target, to);
}

// grid: tiles. V: channels that are moved at once.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) ssh_kernel(Ssh<T> ssh, const T *__restrict__ x, T *__restrict__ y) {
  using Pack = ff::Pack<T, V>;
  extern __shared__ float memory[];
  T *maps = reinterpret_cast<T *>(memory);
  float *weights = memory + (map_elements(ssh) * int(sizeof(T)) + 3) / 4;
  const int tile = blockIdx.x;
  const Origin origin{tile / ssh.tiles_x() / ssh.tiles_y(), tile / ssh.tiles_x() % ssh.tiles_y() * kTileHeight,
                      tile % ssh.tiles_x() * kTileWidth<T>};
  const int channels = ssh.channels(), outputs = ssh.outputs();
  const Map<T> input(maps, channels, kHaloX), shared(maps, ssh.layers[1].out, kHaloShared);
  const Map<T> last(maps, ssh.layers[3].out, kHaloLast), output(maps, outputs, 0);

#pragma unroll 1
  for (int i = threadIdx.x; i < area_of<T>(kHaloX) * (channels / V); i += kThreads) {
    const int c = i % (channels / V) * V, place = i / (channels / V);
    const int row = origin.y + place / input.width() - kHaloX, column = origin.x + place % input.width() - kHaloX;
    Pack values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = ff::from_float<T>(0.0f);
    if (row >= 0 && row < ssh.height && column >= 0 && column < ssh.width)
      values = *reinterpret_cast<const Pack *>(
          x + ((int64_t(origin.image) * ssh.height + row) * ssh.width + column) * channels + c);
#pragma unroll
    for (int j = 0; j < V; ++j) input.data[place * input.pitch + c + j] = values.v[j];
  }

  const int first5 = ssh.layers[0].out, first7 = first5 + ssh.layers[2].out;
  convolve(ssh, ssh.layers[0], weights, origin, input, output, {0, outputs, ssh.shuffle_groups});
  convolve(ssh, ssh.layers[1], weights, origin, input, shared, {0, ssh.layers[1].out, 1});
  convolve(ssh, ssh.layers[2], weights, origin, shared, output, {first5, outputs, ssh.shuffle_groups});
  convolve(ssh, ssh.layers[3], weights, origin, shared, last, {0, ssh.layers[3].out, 1});
  convolve(ssh, ssh.layers[4], weights, origin, last, output, {first7, outputs, ssh.shuffle_groups});
  __syncthreads();

#pragma unroll 1
  for (int i = threadIdx.x; i < area_of<T>(0) * (outputs / V); i += kThreads) {
    const int c = i % (outputs / V) * V, place = i / (outputs / V);
    const int row = origin.y + place / kTileWidth<T>, column = origin.x + place % kTileWidth<T>;
    if (row >= ssh.height || column >= ssh.width) continue;
    Pack values;
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = output.data[place * output.pitch + c + j];
    *reinterpret_cast<Pack *>(y + ((int64_t(origin.image) * ssh.height + row) * ssh.width + column) * outputs + c) =
        values;
  }
}

constexpr int kFields = 9;  // of a layer in the host's array

template <class T>
Ssh<T> make_ssh(const int64_t *layers, const double *eps, int64_t batch, int64_t channels, int64_t height,
                int64_t width, int64_t shuffle_groups) {
  Ssh<T> ssh{};
  for (int i = 0; i < kLayers; ++i) {
    const int64_t *f = layers + i * kFields;
    const auto tensor = [f](int field) { return reinterpret_cast<const T *>(f[field]); };
    const auto numbers = [f](int field) {
      return ff::Numbers{reinterpret_cast<const void *>(f[field]), static_cast<int>(f[6])};
    };
    const int in = i < 2 ? int(channels) : i < 4 ? ssh.layers[1].out : ssh.layers[3].out;
    ssh.layers[i] = Layer<T>{tensor(0),  tensor(1), numbers(2), numbers(3), numbers(4),
                             numbers(5), in,        int(f[7]),  int(f[8]),  static_cast<float>(eps[i])};
  }
  ssh.batch = static_cast<int>(batch);
  ssh.height = static_cast<int>(height);
  ssh.width = static_cast<int>(width);
  ssh.shuffle_groups = static_cast<int>(shuffle_groups);
  return ssh;
}

}  // namespace

extern "C" int ff_cuda_ssh_grouped_eval(const void *x, const int64_t *layers, const double *eps, void *y, int64_t batch,
                                        int64_t channels, int64_t height, int64_t width, int64_t shuffle_groups,
                                        int dtype, void *stream) {
  if (batch * height * width == 0) return FF_OK;
  for (int i = 0; i < kLayers; ++i)
    if (!ff::known(static_cast<int>(layers[i * kFields + 6]))) return FF_UNSUPPORTED_DTYPE;
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const auto ssh = make_ssh<T>(layers, eps, batch, channels, height, width, shuffle_groups);
    for (const Layer<T> &layer : ssh.layers)
      if (layer.groups < 1 || layer.in % layer.groups != 0 || layer.out % layer.groups != 0) return FF_BAD_ARGUMENT;
    const int bytes = shared_bytes(ssh);
    const int64_t tiles = batch * ssh.tiles_x() * ssh.tiles_y();
    if (shuffle_groups < 1 || ssh.outputs() % shuffle_groups != 0 || tiles > INT32_MAX) return FF_BAD_ARGUMENT;
    if (bytes > kSharedBytes) return FF_OUT_OF_MEMORY;
    constexpr int V = ff::kWide<T>;
    const bool packs = ff::wide(channels, V) && ff::wide(ssh.outputs(), V) && ff::aligned({x, y});
    const auto kernel = packs ? ssh_kernel<T, V> : ssh_kernel<T, 1>;
    kernel<<<static_cast<unsigned>(tiles), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(
        ssh, static_cast<const T *>(x), static_cast<T *>(y));
    return cudaGetLastError();
  });
}

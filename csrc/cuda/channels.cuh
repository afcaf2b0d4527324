// Batch normalisation and activation as kernels apply them to one value of a channel.
#ifndef FF_CUDA_CHANNELS_CUH
#define FF_CUDA_CHANNELS_CUH

#include <initializer_list>
#include <type_traits>

#include "common.cuh"

namespace ff {

__device__ __forceinline__ float silu(float v) { return v / (1 + expf(-v)); }

// Not inlined: it would be in every kernel as often as these unroll their loops over channels.
static __device__ __attribute__((noinline)) float silu_gradient(float grad, float v) {
  const float s = 1 / (1 + expf(-v));
  return grad * (s * (1 + v * (1 - s)));
}

__device__ __forceinline__ float activate(float v, int activation, float slope) {
  switch (activation) {
    case FF_RELU:
      return v < 0 ? 0 : v;  // a NaN stays
    case FF_LEAKY_RELU:
      return v < 0 ? v * slope : v;
    case FF_SILU:
      return silu(v);
  }
  return v;
}

// The gradient of the activation's argument v, from the gradient of its result.
__device__ __forceinline__ float activation_gradient(float grad, float v, int activation, float slope) {
  switch (activation) {
    case FF_RELU:
      return v <= 0 ? 0 : grad;
    case FF_LEAKY_RELU:
      return v > 0 ? grad : grad * slope;
    case FF_SILU:
      return silu_gradient(grad, v);
  }
  return grad;
}

// stats: (4, channels) mean, biased variance, scale, shift; null: no normalisation.
struct Norm {
  const float *stats;
  int channels, activation;
  float slope;

  __device__ __forceinline__ bool identity() const { return stats == nullptr && activation == FF_NONE; }
  __device__ __forceinline__ float mean(int c) const { return stats[c]; }
  __device__ __forceinline__ float variance(int c) const { return stats[channels + c]; }
  __device__ __forceinline__ float scale(int c) const { return stats[2 * channels + c]; }
  __device__ __forceinline__ float normalised(float v, int c) const {
    return stats == nullptr ? v : (v - mean(c)) * scale(c) + stats[3 * channels + c];
  }
  __device__ __forceinline__ float operator()(float v, int c) const {
    return identity() ? v : activate(normalised(v, c), activation, slope);
  }
  __device__ __forceinline__ float gradient(float grad, float v, int c) const {
    return activation == FF_NONE ? grad : activation_gradient(grad, normalised(v, c), activation, slope);
  }
};

// The same for a kernel's results, as calls: inlined into an unrolled loop over channels, their branches multiply.
static __device__ __attribute__((noinline)) float finish(Norm norm, float v, int c) { return norm(v, c); }
static __device__ __attribute__((noinline)) float finish_gradient(Norm norm, float grad, float v, int c) {
  return norm.gradient(grad, v, c);
}

inline Norm make_norm(const void *stats, int64_t channels, int activation, double slope) {
  return Norm{static_cast<const float *>(stats), static_cast<int>(channels), activation, static_cast<float>(slope)};
}

// Values of neighbouring channels that one thread moves at once: 16 bytes, or one where channels do not divide.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
template <class T>
constexpr int kWide = 16 / int(sizeof(T));

// The Norm of V neighbouring channels, in registers, for a thread that applies it to many pixels.
template <int V>
struct NormPack {
  float mean[V], scale[V], shift[V];
  int activation;
  float slope;
  bool identity;

  __device__ __forceinline__ NormPack(const Norm &norm, int first)
      : activation(norm.activation), slope(norm.slope), identity(norm.identity()) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      mean[j] = norm.stats == nullptr ? 0.0f : norm.mean(first + j);
      scale[j] = norm.stats == nullptr ? 1.0f : norm.scale(first + j);
      shift[j] = norm.stats == nullptr ? 0.0f : norm.stats[3 * norm.channels + first + j];
    }
  }
  __device__ __forceinline__ void normalise(float (&v)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = (v[j] - mean[j]) * scale[j] + shift[j];
  }
  __device__ __forceinline__ void apply(float (&v)[V]) const {
    if (identity) return;
    normalise(v);
    // One branch for all values instead of one for each.
    switch (activation) {
      case FF_RELU:
        return activate_all<FF_RELU>(v);
      case FF_LEAKY_RELU:
        return activate_all<FF_LEAKY_RELU>(v);
      case FF_SILU:
        return activate_all<FF_SILU>(v);
    }
  }
  // The same for values as tensors hold them: computed in float32, rounded once.
  template <class T>
  __device__ __forceinline__ void apply(Pack<T, V> &values) const {
    if (identity) return;
    float v[V];
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = to_float(values.v[j]);
    apply(v);
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = from_float<T>(v[j]);
  }
  // From the gradients of the results those of the activation's arguments, at the raw values v.
  __device__ __forceinline__ void gradient(float (&grad)[V], float (&v)[V]) const {
    if (activation == FF_NONE) return;
    normalise(v);
    switch (activation) {
      case FF_RELU:
        return gradient_all<FF_RELU>(grad, v);
      case FF_LEAKY_RELU:
        return gradient_all<FF_LEAKY_RELU>(grad, v);
      case FF_SILU:
        return gradient_all<FF_SILU>(grad, v);
    }
  }

 private:
  template <int Activation>
  __device__ __forceinline__ void activate_all(float (&v)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = activate(v[j], Activation, slope);
  }
  template <int Activation>
  __device__ __forceinline__ void gradient_all(float (&grad)[V], const float (&v)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) grad[j] = activation_gradient(grad[j], v[j], Activation, slope);
  }
};

inline bool wide(int64_t channels, int64_t lanes) { return channels % lanes == 0; }
inline bool aligned(std::initializer_list<const void *> tensors) {
  uintptr_t bits = 0;
  for (const void *tensor : tensors) bits |= reinterpret_cast<uintptr_t>(tensor);
  return bits % 16 == 0;
}
// Calls function(T{}, constant): constant is the number of values in 16 bytes where `count` neighbouring channels and
// all tensors allow such packs, else 1.
template <class F>
int dispatch_packs(int dtype, int64_t count, std::initializer_list<const void *> tensors, F function) {
  return dispatch(dtype, [&](auto zero) -> int {
    constexpr int V = kWide<decltype(zero)>;
    if (wide(count, V) && aligned(tensors)) return function(zero, std::integral_constant<int, V>{});
    return function(zero, std::integral_constant<int, 1>{});
  });
}

}  // namespace ff

#endif

// What the convolution kernels share: the shape of a convolution, rows of the input as it is to be convolved
// (normalised, activated, zero-padded), rows of the gradient behind a batch normalisation, and packed weights.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"
#include "channels.h"
#include "gemm.h"
#include "parallel.h"

namespace ff {

struct ConvShape {
  int64_t batch, channels, height, width;
  int64_t out_channels, kernel, stride, padding, groups;
  int64_t split;  // outputs from here on are those of a second convolution of as many groups

  int64_t out_height() const { return (height + 2 * padding - kernel) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - kernel) / stride + 1; }
  int64_t out_pixels() const { return batch * out_height() * out_width(); }
  bool depthwise() const { return groups == channels && out_channels == channels; }
  int64_t group_of(int64_t output) const {
    return output < split ? output / (split / groups) : (output - split) / ((out_channels - split) / groups);
  }
  bool pointwise() const { return kernel == 1 && stride == 1 && padding == 0 && groups == 1; }
  bool valid() const {
    return batch >= 0 && channels > 0 && out_channels > 0 && height > 0 && width > 0 && kernel >= 1 && kernel <= 7 &&
           stride >= 1 && padding >= 0 && padding < kernel && groups >= 1 && channels % groups == 0 && split > 0 &&
           split <= out_channels && split % groups == 0 && out_channels % groups == 0 &&
           height + 2 * padding >= kernel && width + 2 * padding >= kernel;
  }
};

constexpr int64_t kMaxKernel = 7;
// Pixels of a tile of a 1x1 convolution; a tile and its sums stay in the first-level cache.
constexpr int64_t kTile = 64;
// Work below this many multiplications is not worth a second thread.
constexpr int64_t kGrainProducts = 1 << 17;

// Rows of an image kept by number, computed when they are first asked for. Row numbers outside the image are zeros.
template <class T>
class RowCache {
 public:
  RowCache() = default;
  RowCache(Arena &arena, int64_t slots, int64_t elements)
      : rows_(arena.take<T>((slots + 1) * (elements + kSlack))), slots_(slots), size_(elements + kSlack) {}

  void clear() {
    std::fill_n(rows_, (slots_ + 1) * size_, T(0));
    forget();
  }
  void forget() { std::fill_n(number_, kMostRows, int64_t(-1)); }
  T *zeros() const { return rows_ + slots_ * size_; }

  // Row `row`; fill(memory) computes it if it is not here.
  template <class Fill>
  T *get(int64_t row, const Fill &fill) {
    const int64_t slot = row % slots_;
    T *memory = rows_ + slot * size_;
    if (number_[slot] != row) {
      fill(memory);
      number_[slot] = row;
    }
    return memory;
  }

 private:
  static constexpr int64_t kSlack = 2 * Vec<T>::kLanes, kMostRows = 10;
  T *rows_ = nullptr;
  int64_t slots_ = 0, size_ = 0;
  int64_t number_[kMostRows];
};

// An NHWC tensor whose pixels lie `pixel` elements apart.
template <class T>
struct Pixels {
  const T *data = nullptr;
  int64_t channels = 0, pixel = 0;

  bool dense() const { return channels == pixel; }
};

// For the few channels of a pixel, where a call of memcpy costs more than the copy.
template <class T>
FF_INLINE void copy(const T *from, int64_t count, T *to) {
  int64_t i = 0;
  for (; i + Vec<T>::kLanes <= count; i += Vec<T>::kLanes) Vec<T>::load(from + i).store(to + i);
  for (; i < count; ++i) to[i] = from[i];
}

// out = `count` pixels from `first` on, channels dense.
template <class T>
inline void gather(const Pixels<T> &x, int64_t first, int64_t count, T *out) {
  if (x.dense()) return void(std::copy_n(x.data + first * x.pixel, count * x.channels, out));
  for (int64_t i = 0; i < count; ++i) copy(x.data + (first + i) * x.pixel, x.channels, out + i * x.channels);
}

// The input of a convolution: act((x - mean) * scale + shift).
template <class T>
struct Input {
  Pixels<T> x;
  Affine<T> affine;
  int64_t period = 0;

  // out = `count` pixels from `first` on.
  void read(int64_t first, int64_t count, T *out) const {
    const T *source = x.data + first * x.pixel;
    if (!x.dense()) gather(x, first, count, out), source = out;
    if (affine.identity()) {
      if (source != out) std::copy_n(source, count * x.channels, out);
    } else {
      apply_affine(source, count * x.channels, period, affine, out);
    }
  }
};

// The gradient with respect to a convolution's raw output z, from the gradient of what follows it:
// dz = scale * (g - b - (z - mean) * c), where g = grad * act'(normalised z), b is the mean of g and c that of
// g * (z - mean) / (var + eps); without b, dz = scale * g. Arrays of a whole period.
template <class T>
struct OutputGradient {
  Pixels<T> grad, z;
  Affine<T> affine;        // without scale: no batch normalisation
  bool activated = false;  // whether grad is the gradient of the activation's output
  const T *b = nullptr, *c = nullptr;
  int64_t period = 0;

  bool identity() const { return affine.scale == nullptr && !activated; }

  // out = `count` pixels from `first` on; scratch holds as many.
  void read(int64_t first, int64_t count, T *out, T *scratch) const {
    const int64_t elements = count * grad.channels;
    const T *g = grad.data + first * grad.pixel;
    if (!grad.dense()) gather(grad, first, count, out), g = out;
    if (identity()) {
      if (g != out) std::copy_n(g, elements, out);
      return;
    }
    const T *raw = z.data + first * z.pixel;
    if (!z.dense()) gather(z, first, count, scratch), raw = scratch;
    with_activation(activated ? affine.activation : FF_NONE, [&](auto activation) {
      b ? run<activation.value, true>(g, raw, elements, out) : run<activation.value, false>(g, raw, elements, out);
    });
  }

 private:
  template <int A, bool Centred>
  void run(const T *g, const T *raw, int64_t elements, T *out) const {
    constexpr int kLanes = Vec<T>::kLanes;
    const Vec<T> slope(affine.slope);
    over_runs<T>(period, [&](int64_t channel, auto vectors, auto) {
      AffineVector<T> normalised[vectors.value];
      Vec<T> vb[vectors.value], vc[vectors.value];
      for (int v = 0; v < vectors.value; ++v) {
        normalised[v] = AffineVector<T>(affine, channel + v * kLanes);
        if constexpr (Centred) vb[v] = Vec<T>::load(b + channel + v * kLanes);
        if constexpr (Centred) vc[v] = Vec<T>::load(c + channel + v * kLanes);
      }
      along_pixels<T, vectors.value>(elements, period, channel, [&](int64_t first, auto mask) {
        for (int v = 0; v < vectors.value; ++v) {
          const int64_t i = first + v * kLanes;
          prefetch(g + i + elements), prefetch(raw + i + elements);
          const Vec<T> value = load(raw + i, mask);
          Vec<T> d = load(g + i, mask);
          if constexpr (A != FF_NONE) d = activate_backward<A>(normalised[v](value), d, slope);
          if constexpr (Centred) d = (d - vb[v]) - (value - normalised[v].mean) * vc[v];
          store(out + i, normalised[v].scale * d, mask);
        }
      });
    });
  }
};

// Sums that the backward pass of a batch normalisation needs: of g and of g * (z - mean), per channel.
struct GradientSums {
  double *g = nullptr, *gz = nullptr;

  template <class T>
  static GradientSums take(Arena &arena, int64_t period) {
    return {arena.take<double>(period + Vec<T>::kLanes), arena.take<double>(period + Vec<T>::kLanes)};
  }
  template <class T>
  void clear(int64_t period) const {
    std::fill_n(g, period + Vec<T>::kLanes, 0.0);
    std::fill_n(gz, period + Vec<T>::kLanes, 0.0);
  }
};

// out (2, channels) = the sums of all ranks; sums(rank) are those of one, repeated over a period.
template <class Sums>
inline void join_sums(int ranks, int64_t channels, int64_t period, const Sums &sums, double *out) {
  for (int64_t i = 0; i < channels; ++i) {
    double g = 0, gz = 0;
    for (int rank = 0; rank < ranks; ++rank)
      for (int64_t j = i; j < period; j += channels) {
        g += sums(rank).g[j];
        gz += sums(rank).gz[j];
      }
    out[i] = g;
    out[channels + i] = gz;
  }
}

// g = grad * act'(normalised z) written to `out` (may be nullptr or grad), its sums added to `sums`.
template <class T>
inline void activation_backward(const T *grad, const T *z, int64_t elements, int64_t period, const Affine<T> &affine,
                                T *out, const GradientSums *sums) {
  constexpr int kLanes = Vec<T>::kLanes;
  with_activation(affine.activation, [&](auto activation) {
    const Vec<T> slope(affine.slope);
    over_runs<T>(period, [&](int64_t c, auto vectors, auto) {
      AffineVector<T> normalised[vectors.value];
      double g_sum[vectors.value * kLanes] = {}, gz_sum[vectors.value * kLanes] = {};
      for (int v = 0; v < vectors.value; ++v) normalised[v] = AffineVector<T>(affine, c + v * kLanes);
      in_parts(elements, period, [&](int64_t first, int64_t part) {
        Vec<T> total[vectors.value], product[vectors.value];
        for (int v = 0; v < vectors.value; ++v) total[v] = product[v] = Vec<T>::zero();
        along_pixels<T, vectors.value>(part, period, c, [&](int64_t at, auto mask) {
          for (int v = 0; v < vectors.value; ++v) {
            const int64_t i = first + at + v * kLanes;
            prefetch(z + i + elements);
            const Vec<T> value = load(z + i, mask);
            Vec<T> g = load(grad + i, mask);
            if constexpr (activation.value != FF_NONE)
              g = activate_backward<activation.value>(normalised[v](value), g, slope);
            if (out != nullptr) store(out + i, g, mask);
            total[v] += g;
            product[v] += g * (value - normalised[v].mean);
          }
        });
        for (int i = 0; i < vectors.value * kLanes; ++i) {
          g_sum[i] += total[i / kLanes].v[i % kLanes];
          gz_sum[i] += product[i / kLanes].v[i % kLanes];
        }
      });
      for (int i = 0; i < vectors.value * kLanes && sums != nullptr; ++i) {
        sums->g[c + i] += g_sum[i];
        sums->gz[c + i] += gz_sum[i];
      }
    });
  });
}

// stats (4, channels) as the affine map before an activation, in memory taken from the arena.
template <class T>
struct AffineMemory {
  T *memory;
  int64_t period;
  AffineMemory(Arena &arena, int64_t whole_period)
      : memory(arena.take<T>(3 * (whole_period + Vec<T>::kLanes))), period(whole_period) {}
  Affine<T> set(const void *stats, int64_t channels, int activation, double slope) const {
    Affine<T> affine{nullptr, nullptr, nullptr, activation, T(slope)};
    if (stats == nullptr) return affine;
    const T *source = static_cast<const T *>(stats);
    T *rows[3];
    for (int i = 0; i < 3; ++i) {
      rows[i] = memory + i * (period + Vec<T>::kLanes);
      repeat(source + (i == 0 ? 0 : i + 1) * channels, channels, period, rows[i]);
    }
    affine.mean = rows[0], affine.scale = rows[1], affine.shift = rows[2];
    return affine;
  }
};

// stats = mean, biased variance, scale, shift. The shift makes up for the rounding of the mean.
template <class T>
inline void write_stats(int64_t i, double mean, double var, const T *weight, const T *bias, double eps,
                        int64_t channels, T *stats) {
  const double scale = (weight ? double(weight[i]) : 1.0) / std::sqrt(var + eps);
  stats[i] = T(mean);
  stats[channels + i] = T(var);
  stats[2 * channels + i] = T(scale);
  stats[3 * channels + i] = T((bias ? double(bias[i]) : 0.0) - (mean - double(T(mean))) * scale);
}

}  // namespace ff

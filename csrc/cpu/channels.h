// Loops over NHWC memory that do something per channel, and sums per channel.
//
// A row of pixels is `count` consecutive elements. Runs of a few vectors of channels are the outer loop, so that their
// coefficients and sums stay in registers while they walk along the pixels. With fewer channels than lanes, and lanes a
// multiple of them, several pixels share a vector: the loop then has the period of a whole vector instead of the number
// of channels, and per-channel arrays are repeated to that length.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "simd.h"

namespace ff {

template <class T>
inline int64_t period_of(int64_t channels) {
  return channels < Vec<T>::kLanes && Vec<T>::kLanes % channels == 0 ? Vec<T>::kLanes : channels;
}

// out[i] = values[i % channels] for i < period, and zero up to whole vectors beyond.
template <class T>
inline void repeat(const T *values, int64_t channels, int64_t period, T *out) {
  for (int64_t i = 0; i < period; ++i) out[i] = values[i % channels];
  for (int64_t i = period; i < period + Vec<T>::kLanes; ++i) out[i] = T(0);
}

// body(channel, mask) for every vector of channels.
template <class T, class Body>
FF_INLINE void over_channels(int64_t channels, const Body &body) {
  int64_t c = 0;
  for (; c + Vec<T>::kLanes <= channels; c += Vec<T>::kLanes) body(c, AllLanes{});
  if (c < channels) body(c, FirstLanes{static_cast<int>(channels - c)});
}

// body(channel, std::integral_constant<int, vectors>, mask) for runs of up to kRun vectors of channels. A loop over
// pixels in the body then walks along memory in long steps, with what belongs to each vector of the run in registers.
constexpr int kRun = FF_VECTOR_BYTES == 64 ? 4 : 2;
template <class T, int Vectors = kRun, class Body>
FF_INLINE void over_runs(int64_t channels, const Body &body, int64_t c = 0) {
  for (; c + Vectors * Vec<T>::kLanes <= channels; c += Vectors * Vec<T>::kLanes)
    body(c, std::integral_constant<int, Vectors>{}, AllLanes{});
  if constexpr (Vectors > 1)
    over_runs<T, Vectors / 2>(channels, body, c);
  else if (c < channels)
    body(c, std::integral_constant<int, 1>{}, FirstLanes{static_cast<int>(channels - c)});
}

// body(element, mask) for the elements in [0, count) at which `Vectors` vectors of channels from `channel` on begin in
// every period. With more than one vector, a period has room for them all and count is a multiple of it.
template <class T, int Vectors = 1, class Body>
FF_INLINE void along_pixels(int64_t count, int64_t period, int64_t channel, const Body &body) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  int64_t i = channel;
  if (Vectors > 1 || period - channel >= kLanes) {
    for (; i + Vectors * kLanes <= count; i += period) body(i, AllLanes{});
    if constexpr (Vectors == 1)
      if (i < count) body(i, FirstLanes{static_cast<int>(count - i)});
  } else if constexpr (Vectors == 1) {
    for (; i < count; i += period) body(i, FirstLanes{static_cast<int>(std::min(period - channel, count - i))});
  }
}

// A batch normalisation and an activation, act((x - mean) * scale + shift); arrays of a whole period. Without scale the
// activation alone. Subtracting first keeps what is left of a small variance around a large mean.
template <class T>
struct Affine {
  const T *mean = nullptr, *scale = nullptr, *shift = nullptr;
  int activation = FF_NONE;
  T slope = T(0);

  bool identity() const { return scale == nullptr && activation == FF_NONE; }
};

// Its coefficients for one vector of channels.
template <class T>
struct AffineVector {
  Vec<T> mean, scale, shift;

  FF_INLINE AffineVector() = default;
  FF_INLINE AffineVector(const Affine<T> &affine, int64_t c)
      : mean(affine.scale ? Vec<T>::load(affine.mean + c) : Vec<T>::zero()),
        scale(affine.scale ? Vec<T>::load(affine.scale + c) : Vec<T>(T(1))),
        shift(affine.scale ? Vec<T>::load(affine.shift + c) : Vec<T>::zero()) {}
  FF_INLINE Vec<T> operator()(Vec<T> x) const { return (x - mean) * scale + shift; }
};

// A pass over one tile asks for the line at the same place of the next one, which the work between two tiles leaves
// time to fetch.
template <class T>
FF_INLINE void prefetch(const T *p) {
  __builtin_prefetch(p, 0, 2);
}

// out = act((x - mean) * scale + shift) over `count` elements; out may be x.
template <class T>
inline void apply_affine(const T *x, int64_t count, int64_t period, const Affine<T> &affine, T *out) {
  with_activation(affine.activation, [&](auto activation) {
    const Vec<T> slope(affine.slope);
    over_runs<T>(period, [&](int64_t c, auto vectors, auto) {
      AffineVector<T> normalised[vectors.value];
      for (int v = 0; v < vectors.value; ++v) normalised[v] = AffineVector<T>(affine, c + v * Vec<T>::kLanes);
      along_pixels<T, vectors.value>(count, period, c, [&](int64_t first, auto mask) {
        for (int v = 0; v < vectors.value; ++v) {
          const int64_t i = first + v * Vec<T>::kLanes;
          prefetch(x + i + count);
          store(out + i, activate<activation.value>(normalised[v](load(x + i, mask)), slope), mask);
        }
      });
    });
  });
}

// Sums in T are flushed to double after this many values.
constexpr int64_t kFlush = 16;

// Calls body(first element, elements) for consecutive parts of at most kFlush periods.
template <class Body>
FF_INLINE void in_parts(int64_t elements, int64_t period, const Body &body) {
  for (int64_t first = 0; first < elements; first += kFlush * period)
    body(first, std::min(elements - first, kFlush * period));
}

// Mean and variance per channel of values that arrive in blocks. Values are summed relative to the mean so far, in T
// for kFlush values, then in double relative to the mean of the first block: a small variance around a large mean
// survives, and nothing is divided per value. Arrays have the length of a period, rounded up to whole vectors.
struct Moments {
  double *reference = nullptr, *count = nullptr, *sum = nullptr, *squares = nullptr;

  template <class T, class Arena>
  static Moments take(Arena &arena, int64_t period) {
    const int64_t length = period + Vec<T>::kLanes;
    Moments moments;
    for (double **array : {&moments.reference, &moments.count, &moments.sum, &moments.squares})
      *array = arena.template take<double>(length);
    return moments;
  }

  template <class T>
  void clear(int64_t period) const {
    for (double *array : {reference, count, sum, squares}) std::fill_n(array, period + Vec<T>::kLanes, 0.0);
  }

  template <class T>
  void add(const T *x, int64_t elements, int64_t period) const {
    constexpr int kLanes = Vec<T>::kLanes;
    for (int64_t c = 0; c < std::min(period, elements); c += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>({kLanes, period - c, elements - c}));
      double n[kLanes], s[kLanes] = {}, q[kLanes] = {};
      const double pixels = static_cast<double>(elements / period);
      for (int lane = 0; lane < kLanes; ++lane)
        n[lane] = lane < lanes ? pixels + (c + lane < elements % period ? 1.0 : 0.0) : 0.0;
      if (count[c] == 0) {
        Vec<T> total = Vec<T>::zero();
        along_pixels<T>(elements, period, c, [&](int64_t i, auto mask) { total += load(x + i, mask); });
        for (int lane = 0; lane < lanes; ++lane) reference[c + lane] = T(total.v[lane] / n[lane]);
      }
      const double inverse = count[c] > 0 ? 1.0 / count[c] : 0.0;
      Vec<T> center;
      for (int lane = 0; lane < kLanes; ++lane) center.v[lane] = T(reference[c + lane] + sum[c + lane] * inverse);
      in_parts(elements, period, [&](int64_t first, int64_t part) {
        Vec<T> part_s = Vec<T>::zero(), part_q = Vec<T>::zero();
        along_pixels<T>(part, period, c, [&](int64_t i, auto mask) {
          const Vec<T> d = keep(load(x + first + i, mask) - center, mask);
          part_s += d;
          part_q += d * d;
        });
        for (int lane = 0; lane < kLanes; ++lane) {
          s[lane] += part_s.v[lane];
          q[lane] += part_q.v[lane];
        }
      });
      for (int lane = 0; lane < kLanes; ++lane) {
        const double shift = center.v[lane] - reference[c + lane], moved = n[lane] * shift;
        count[c + lane] += n[lane];
        sum[c + lane] += moved + s[lane];
        squares[c + lane] += q[lane] + shift * (moved + 2.0 * s[lane]);
      }
    }
  }
};

// Mean and sum of squared deviations of one channel, joined from parts by Chan's formula.
struct MeanAndM2 {
  double count = 0, mean = 0, m2 = 0;

  void join(const Moments &part, int64_t i) {
    if (part.count[i] == 0) return;
    const double n = part.count[i], offset = part.sum[i] / n, total = count + n;
    const double delta = part.reference[i] + offset - mean;
    mean += delta * (n / total);
    m2 += part.squares[i] - part.sum[i] * offset + delta * delta * (count * n / total);
    count = total;
  }
};

}  // namespace ff

// 3x3 convolutions of stride 1 with a few channels per group, along rows of planes.
//
// In NHWC a vector of outputs spans several groups, and most of a matrix product would be multiplications by zero. Here
// a row of the image is turned into a plane per channel, (channel, pixel) with one zero pixel in front, and a vector is
// a run of pixels of one channel.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "engine_math.h"
#include "simd.h"

namespace ff {

// Channels whose sums stay in registers, and vectors of pixels of each.
constexpr int kPlanes = FF_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kPlaneVectors = FF_VECTOR_BYTES == 64 ? 3 : 2;

// out[j * out_step + i] = in[i * in_step + j] for i, j < kLanes.
template <class T>
FF_INLINE void transpose(const T *in, int64_t in_step, T *out, int64_t out_step) {
  constexpr int kLanes = Vec<T>::kLanes;
  if constexpr (std::is_same_v<T, float>)
    engine::transpose(in, in_step, out, out_step);
  else
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) out[j * out_step + i] = in[i * in_step + j];
}

// Sizes of a row: `vectors` whole vectors of pixels; `step` elements from one plane to the next.
template <class T>
struct PlanarRow {
  int64_t pixels;

  int64_t vectors() const { return (pixels + Vec<T>::kLanes - 1) / Vec<T>::kLanes; }
  int64_t step() const { return (vectors() + 1) * Vec<T>::kLanes; }
};

// A row of pixels (pixel, channel) as planes, pixel x at 1 + x, zeros around. `planes` begins with zeros.
template <class T>
void to_planes(const PlanarRow<T> &row, const T *pixels, int64_t channels, T *planes) {
  constexpr int kLanes = Vec<T>::kLanes;
  alignas(64) T in[kLanes * kLanes], out[kLanes * kLanes];
  for (int64_t x = 0; x < row.pixels; x += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, row.pixels - x);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, channels - c));
      for (int64_t i = 0; i < kLanes; ++i) {
        const T *from = pixels + (x + i) * channels + c;
        (i >= count        ? Vec<T>::zero()
         : lanes == kLanes ? Vec<T>::load(from)
                           : Vec<T>::load_first(from, lanes))
            .store(in + i * kLanes);
      }
      transpose(in, kLanes, out, kLanes);
      for (int j = 0; j < lanes; ++j) Vec<T>::load(out + j * kLanes).store(planes + (c + j) * row.step() + 1 + x);
    }
  }
}

// Back, from planes without the pixel in front.
template <class T>
void from_planes(const PlanarRow<T> &row, const T *planes, int64_t channels, T *pixels) {
  constexpr int kLanes = Vec<T>::kLanes;
  alignas(64) T in[kLanes * kLanes], out[kLanes * kLanes];
  for (int64_t x = 0; x < row.pixels; x += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, row.pixels - x);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, channels - c));
      for (int j = 0; j < kLanes; ++j)
        (j < lanes ? Vec<T>::load(planes + (c + j) * row.step() + x) : Vec<T>::zero()).store(in + j * kLanes);
      transpose(in, kLanes, out, kLanes);
      for (int64_t i = 0; i < count; ++i) {
        const Vec<T> value = Vec<T>::load(out + i * kLanes);
        T *to = pixels + (x + i) * channels + c;
        lanes == kLanes ? value.store(to) : value.store_first(to, lanes);
      }
    }
  }
}

// One group: out[target] = initial[target] + sum over channels c of `sources` and taps of rows[ky][c][x + kx] *
// weight[c][ky][kx][target]. rows are planes of three rows of the image.
template <class T, int Targets, int Vectors>
__attribute__((noinline)) void planar_tile(const T *const *rows, int64_t step, const int64_t *sources, int64_t count,
                                           const T *weight, int64_t weight_step, const T *initial,
                                           const int64_t *targets, int64_t x, T *out) {
  constexpr int kLanes = Vec<T>::kLanes;
  Vec<T> sum[Targets][Vectors];
#pragma GCC unroll 8
  for (int n = 0; n < Targets; ++n)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sum[n][v] = initial ? Vec<T>(initial[targets[n]]) : Vec<T>::zero();
  for (int64_t c = 0; c < count; ++c)
    for (int ky = 0; ky < 3; ++ky) {
      const T *row = rows[ky] + sources[c] * step + x;
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx, weight += weight_step) {
        Vec<T> value[Vectors];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) value[v] = Vec<T>::load(row + kx + v * kLanes);
#pragma GCC unroll 8
        for (int n = 0; n < Targets; ++n) {
          const Vec<T> w(weight[n]);
#pragma GCC unroll 3
          for (int v = 0; v < Vectors; ++v) sum[n][v] = sum[n][v] + value[v] * w;
        }
      }
    }
#pragma GCC unroll 8
  for (int n = 0; n < Targets; ++n)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sum[n][v].store(out + targets[n] * step + x + v * kLanes);
}

template <class T, int Targets>
void planar_group(const PlanarRow<T> &row, const T *const *rows, const int64_t *sources, int64_t count, const T *weight,
                  int64_t weight_step, const T *initial, const int64_t *targets, int64_t target_count, T *out) {
  if constexpr (Targets > 1)
    if (target_count < Targets)
      return planar_group<T, Targets - 1>(row, rows, sources, count, weight, weight_step, initial, targets,
                                          target_count, out);
  int64_t left = row.vectors(), x = 0;
  const auto tiles = [&](auto vectors) {
    for (; left >= vectors.value; left -= vectors.value, x += vectors.value * Vec<T>::kLanes)
      planar_tile<T, Targets, vectors.value>(rows, row.step(), sources, count, weight, weight_step, initial, targets, x,
                                             out);
  };
  if constexpr (kPlaneVectors > 2) tiles(std::integral_constant<int, 3>{});
  tiles(std::integral_constant<int, 2>{});
  tiles(std::integral_constant<int, 1>{});
}

// sums[target][kx] += sum over `count` rows and pixels of source[x + kx] * dz[target][x], a vector each: pixels of a
// lane are added up at the end. source[r] and dz[r] are planes; dz has a zero pixel in front.
template <class T, int Targets>
__attribute__((noinline)) void planar_weight_tile(const T *const *source, const T *const *dz, int64_t count,
                                                  int64_t vectors, int64_t step, const int64_t *targets, T *sums) {
  constexpr int kLanes = Vec<T>::kLanes;
  Vec<T> sum[Targets][3];
#pragma GCC unroll 8
  for (int n = 0; n < Targets; ++n)
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) sum[n][kx] = Vec<T>::load(sums + (n * 3 + kx) * kLanes);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t x = 0; x < vectors * kLanes; x += kLanes) {
      Vec<T> value[3];
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) value[kx] = Vec<T>::load(source[r] + x + kx);
#pragma GCC unroll 8
      for (int n = 0; n < Targets; ++n) {
        const Vec<T> d = Vec<T>::load(dz[r] + targets[n] * step + 1 + x);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) sum[n][kx] = sum[n][kx] + d * value[kx];
      }
    }
#pragma GCC unroll 8
  for (int n = 0; n < Targets; ++n)
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) sum[n][kx].store(sums + (n * 3 + kx) * kLanes);
}

template <class T, int Targets>
void planar_weights(const T *const *source, const T *const *dz, int64_t count, int64_t vectors, int64_t step,
                    const int64_t *targets, int64_t target_count, T *sums) {
  if constexpr (Targets > 1)
    if (target_count < Targets)
      return planar_weights<T, Targets - 1>(source, dz, count, vectors, step, targets, target_count, sums);
  planar_weight_tile<T, Targets>(source, dz, count, vectors, step, targets, sums);
}

// A grouped convolution as groups of channels on both sides: channel(s) of group g are at [g * per_group, ...).
struct PlanarGroups {
  int64_t groups = 0, inputs = 0, outputs = 0;  // channels per group
  int64_t *input = nullptr, *output = nullptr;

  template <class Shape, class Arena>
  static PlanarGroups of(Arena &arena, const Shape &s) {
    PlanarGroups all{s.groups, s.channels / s.groups, s.out_channels / s.groups,
                     arena.template take<int64_t>(s.channels), arena.template take<int64_t>(s.out_channels)};
    if (all.input == nullptr) return all;
    for (int64_t i = 0; i < s.channels; ++i) all.input[i] = i;
    int64_t n = 0;
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t o = 0; o < s.out_channels; ++o)
        if (s.group_of(o) == g) all.output[n++] = o;
    return all;
  }

  // weight (O, I / groups, 3, 3) -> per group [input][tap][output], or for the gradient of the input [output][reversed
  // tap][input].
  template <class T>
  void pack(const T *weight, bool reversed, T *packed) const {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < outputs; ++j)
        for (int64_t i = 0; i < inputs; ++i)
          for (int64_t tap = 0; tap < 9; ++tap) {
            const T value = weight[(output[g * outputs + j] * inputs + i) * 9 + tap];
            if (reversed)
              packed[((g * outputs + j) * 9 + 8 - tap) * inputs + i] = value;
            else
              packed[((g * inputs + i) * 9 + tap) * outputs + j] = value;
          }
  }

  template <class T>
  void convolve(const PlanarRow<T> &row, const T *const *rows, const T *packed, const T *bias, T *out) const {
    run(row, rows, input, inputs, output, outputs, packed, bias, out);
  }
  template <class T>
  void convolve_back(const PlanarRow<T> &row, const T *const *rows, const T *packed, T *out) const {
    run(row, rows, output, outputs, input, inputs, packed, static_cast<const T *>(nullptr), out);
  }

  // Elements of the sums of weight_gradient: [group][input][ky][output][kx][lane].
  template <class T>
  int64_t sums_length() const {
    return groups * inputs * outputs * 9 * Vec<T>::kLanes;
  }

  // Adds `count` rows: sources[r + ky] are planes of the input around row r, dz[r] of the gradient.
  template <class T>
  void add_weight_gradient(const PlanarRow<T> &row, const T *const *sources, const T *const *dz, int64_t count,
                           T *sums) const {
    constexpr int64_t kMostRows = 16;
    const T *source[kMostRows];
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t ky = 0; ky < 3; ++ky) {
          for (int64_t r = 0; r < count; ++r) source[r] = sources[r + ky] + input[g * inputs + i] * row.step();
          for (int64_t first = 0; first < outputs; first += kPlanes)
            planar_weights<T, kPlanes>(source, dz, count, row.vectors(), row.step(), output + g * outputs + first,
                                       outputs - first,
                                       sums + (((g * inputs + i) * 3 + ky) * outputs + first) * 3 * Vec<T>::kLanes);
        }
  }

  // The gradient of weight[output j of group g][input i][ky][kx].
  template <class T>
  double weight_gradient(const T *sums, int64_t g, int64_t j, int64_t i, int64_t tap) const {
    const T *lanes = sums + ((((g * inputs + i) * 3 + tap / 3) * outputs + j) * 3 + tap % 3) * Vec<T>::kLanes;
    double total = 0;
    for (int lane = 0; lane < Vec<T>::kLanes; ++lane) total += lanes[lane];
    return total;
  }

 private:
  template <class T>
  void run(const PlanarRow<T> &row, const T *const *rows, const int64_t *from, int64_t from_count, const int64_t *to,
           int64_t to_count, const T *packed, const T *initial, T *out) const {
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t first = 0; first < to_count; first += kPlanes)
        planar_group<T, kPlanes>(row, rows, from + g * from_count, from_count,
                                 packed + g * from_count * 9 * to_count + first, to_count, initial,
                                 to + g * to_count + first, to_count - first, out);
  }
};

}  // namespace ff

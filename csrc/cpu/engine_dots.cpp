// Products of the engine in bfloat16 as dot products of pairs of numbers (AVX512-BF16).
#include "engine_bf16.h"

#if defined(FF_ENGINE_DOTS)

#include <algorithm>

#include "engine_bf16_rows.h"

namespace ff::engine {
namespace {

typedef int32_t PairInMemory __attribute__((aligned(2), may_alias));

FF_INLINE __m512i load(const void *p) { return _mm512_loadu_si512(p); }
FF_INLINE V dot(V sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b); }

// M pixels times N tiles of channels, pixels from `pixel` on.
template <int M, int N>
FF_INLINE void dot_block(const TileLayer &layer, const bf16 *const *a, int64_t pixel, const bf16 *w, const float *bias,
                         V (&acc)[M][N]) {
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[m][n] = V::load(bias + n * kTileChannels);
  for (int64_t s = 0; s < layer.steps; ++s) {
    const int64_t stride = layer.strides[s];
    const bf16 *p = a[s] + pixel * stride;
    for (const bf16 *end = p + 2 * layer.pairs[s]; p < end; p += 2, w += N * 2 * kTileChannels) {
      __m512i weight[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) weight[n] = load(w + n * 2 * kTileChannels);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512i value = _mm512_set1_epi32(*reinterpret_cast<const PairInMemory *>(p + m * stride));
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], value, weight[n]);
      }
    }
  }
}

// The first `channels` of the N tiles of one pixel.
template <int N>
FF_INLINE void store_pixel(const V (&y)[N], int channels, bf16 *out) {
  if constexpr (N == 2) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y[1].v, y[0].v);
    if (channels == 2 * kTileChannels)
      _mm512_storeu_si512(out, both);
    else
      _mm512_mask_storeu_epi16(out, (1u << channels) - 1, both);
  } else {
    const __m256i one = (__m256i)_mm512_cvtneps_pbh(y[0].v);
    if (channels == kTileChannels)
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), one);
    else if (channels == kTileChannels / 2)
      _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm256_castsi256_si128(one));
    else
      _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1u << channels) - 1), one);
  }
}

template <int N>
FF_INLINE void store_pixel(const V (&y)[N], int channels, float *out) {
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const int count = channels - n * kTileChannels;
    if (count >= L)
      y[n].store(out + n * L);
    else
      y[n].store_first(out + n * L, count);
  }
}

template <int M, int N, class T>
FF_INLINE void store_block(const TileLayer &layer, V (&acc)[M][N], int pixels, int channels, T *out) {
  with_activation(layer.act, layer.slope, [&](auto act) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      if (m >= pixels) break;
      V y[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) y[n] = act(acc[m][n]);
      store_pixel(y, channels, out + m * layer.out_stride);
    }
  });
}

template <int M, int N>
void dot_tile(const TileLayer &layer, const Strip &strip, int pixel, int64_t tile, const bf16 *w, int channels) {
  V acc[M][N];
  dot_block(layer, strip.a, pixel, w, layer.bias + tile * kTileChannels, acc);
  const int64_t at = pixel * layer.out_stride + tile * kTileChannels;
  if (layer.as_float)
    store_block(layer, acc, strip.pixels - pixel, channels, static_cast<float *>(strip.out) + at);
  else
    store_block(layer, acc, strip.pixels - pixel, channels, static_cast<bf16 *>(strip.out) + at);
}

template <int N>
void dot_strip(const TileLayer &layer, const Strip &strip, int64_t tile, const bf16 *w, int channels) {
  int x = 0;
  for (; strip.pixels - x > 4; x += 8) dot_tile<8, N>(layer, strip, x, tile, w, channels);
  if (x < strip.pixels) dot_tile<4, N>(layer, strip, x, tile, w, channels);
}

}  // namespace

void multiply_tiles(const TileLayer &layer, const Strip *strips, int count) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < layer.steps; ++s) pairs += layer.pairs[s];
  const bf16 *w = layer.weights;
  for (int64_t tile = 0; tile < layer.tiles; tile += 2) {
    const bool two = tile + 1 < layer.tiles;
    const int channels = tile + 2 >= layer.tiles ? layer.last : 2 * kTileChannels;
    for (int i = 0; i < count; ++i) (two ? dot_strip<2> : dot_strip<1>)(layer, strips[i], tile, w, channels);
    w += pairs * (two ? 2 : 1) * 2 * kTileChannels;
  }
}

void multiply_permuted(const TileLayer &layer, int64_t pairs, const Strip &strip) {
  constexpr int M = 4;
  const auto *w = reinterpret_cast<const char *>(layer.weights) + 64 * pairs;
  const V bias[2] = {V::load(layer.bias), V::load(layer.bias + L)};
  for (int x = 0; x < strip.pixels; x += M) {
    V acc[M][2];
    __m512i pixel[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      acc[m][0] = bias[0], acc[m][1] = bias[1];
      pixel[m] = load(strip.a[0] + (x + m) * kTileDepth);
    }
    for (int64_t k = 0; k < pairs; ++k) {
      const __m512i place = load(reinterpret_cast<const char *>(layer.weights) + 64 * k);
      const __m512i first = load(w + 128 * k), second = load(w + 128 * k + 64);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m512i value = _mm512_permutexvar_epi32(place, pixel[m]);
        acc[m][0] = dot(acc[m][0], value, first);
        acc[m][1] = dot(acc[m][1], value, second);
      }
    }
    store_block(layer, acc, strip.pixels - x, 2 * kTileChannels, static_cast<bf16 *>(strip.out) + x * layer.out_stride);
  }
}

namespace {

// Half of a block of 2 * Lanes channels.
template <int Lanes>
struct Half;

template <>
struct Half<16> {
  using Numbers = __m512i;
  using Sums = __m512;
  static FF_INLINE Numbers zero() { return _mm512_setzero_si512(); }
  static FF_INLINE Numbers numbers(const void *p) { return _mm512_loadu_si512(p); }
  static FF_INLINE Sums sums(const float *p) { return _mm512_loadu_ps(p); }
  static FF_INLINE Sums dot(Sums sum, Numbers a, Numbers b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  template <int Upper>
  static FF_INLINE Numbers pairs(Numbers a, Numbers b) {
    return Upper ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
  }
  static FF_INLINE V wide(Sums x) { return x; }
  static FF_INLINE void store(__m256i y, bf16 *out) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), y); }
};

template <>
struct Half<8> {
  using Numbers = __m256i;
  using Sums = __m256;
  static FF_INLINE Numbers zero() { return _mm256_setzero_si256(); }
  static FF_INLINE Numbers numbers(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
  static FF_INLINE Sums sums(const float *p) { return _mm256_loadu_ps(p); }
  static FF_INLINE Sums dot(Sums sum, Numbers a, Numbers b) { return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b); }
  template <int Upper>
  static FF_INLINE Numbers pairs(Numbers a, Numbers b) {
    return Upper ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
  }
  static FF_INLINE V wide(Sums x) { return _mm512_castps256_ps512(x); }
  static FF_INLINE void store(__m256i y, bf16 *out) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm256_castsi256_si128(y));
  }
};

template <>
struct Half<4> {
  using Numbers = __m128i;
  using Sums = __m128;
  static FF_INLINE Numbers zero() { return _mm_setzero_si128(); }
  static FF_INLINE Numbers numbers(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
  static FF_INLINE Sums sums(const float *p) { return _mm_loadu_ps(p); }
  static FF_INLINE Sums dot(Sums sum, Numbers a, Numbers b) { return _mm_dpbf16_ps(sum, (__m128bh)a, (__m128bh)b); }
  template <int Upper>
  static FF_INLINE Numbers pairs(Numbers a, Numbers b) {
    return Upper ? _mm_unpackhi_epi16(a, b) : _mm_unpacklo_epi16(a, b);
  }
  static FF_INLINE V wide(Sums x) { return _mm512_castps128_ps512(x); }
  static FF_INLINE void store(__m256i y, bf16 *out) {
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm256_castsi256_si128(y));
  }
};

// R rows of X pixels of half a block. Columns are `unit` numbers apart.
template <int Lanes, int Upper, int S, int R, int X>
FF_INLINE void depthwise_tile(const bf16 *const *rows, int64_t offset, int64_t unit,
                              const typename Half<Lanes>::Numbers (&w)[12], typename Half<Lanes>::Sums bias, bf16 *out,
                              int64_t out_row, int64_t out_pixel, int act, V slope) {
  using H = Half<Lanes>;
  constexpr int kRows = (R - 1) * S + 3, kPairs = (kRows + 1) / 2;
  constexpr bool kShared = X > 1;  // neighbouring pixels read the same columns
  typename H::Sums acc[R][X];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < X; ++x) acc[r][x] = bias;
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) {
    const bool both = 2 * p + 1 < kRows;
    const bf16 *first = rows[2 * p] + offset, *second = rows[2 * p + both] + offset;
#pragma GCC unroll 16
    for (int j = 0; j < (kShared ? (X - 1) * S + 3 : 3); ++j) {
      const auto bottom = both ? H::numbers(second + j * unit) : H::zero();
      const auto value = H::template pairs<Upper>(H::numbers(first + j * unit), bottom);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        // Rows 2 p and 2 p + 1 are rows 0 and 1 of the window, 2 and 3, -1 and 0, or 1 and 2.
        const int at = 2 * p - r * S;
        const int kind = at == 0 ? 0 : at == 2 ? 1 : at == -1 ? 2 : at == 1 ? 3 : -1;
        if (kind < 0) continue;
#pragma GCC unroll 8
        for (int x = 0; x < X; ++x) {
          const int kx = j - x * S;
          if (kx >= 0 && kx <= 2) acc[r][x] = H::dot(acc[r][x], value, w[kind * 3 + kx]);
        }
      }
    }
  }
  with_activation(act, slope, [&](auto activation) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int x = 0; x < X; ++x)
        H::store((__m256i)_mm512_cvtneps_pbh(activation(H::wide(acc[r][x])).v), out + r * out_row + x * out_pixel);
  });
}

// All columns of R rows, half a block.
template <int Lanes, int Upper, int S, int R, int X>
void depthwise_columns(const Depthwise &layer, const bf16 *const *rows, int columns, int64_t offset, int64_t unit,
                       int64_t step, const float *weights, bf16 *out, int64_t out_row, int64_t out_pixel) {
  using H = Half<Lanes>;
  typename H::Numbers w[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) w[i] = H::numbers(weights + i * Lanes);
  const auto bias = H::sums(weights + 12 * Lanes);
  for (int x = 0; x < columns; x += X)
    depthwise_tile<Lanes, Upper, S, R, X>(rows, offset + x * step, unit, w, bias, out + x * out_pixel, out_row,
                                          out_pixel, layer.act, layer.slope);
}

template <int Lanes, int S, int R>
void depthwise_rows(const Depthwise &layer, const bf16 *const *rows, int columns, bf16 *out, int64_t out_row) {
  const float *w = layer.weights;
  const int64_t cs = layer.cs;
  for (int64_t v = 0; v < cs; v += 2 * Lanes, w += 26 * Lanes) {
    depthwise_columns<Lanes, 0, S, R, 4>(layer, rows, columns, v, cs, S * cs, w, out + v, out_row, cs);
    depthwise_columns<Lanes, 1, S, R, 4>(layer, rows, columns, v, cs, S * cs, w + 13 * Lanes, out + v + Lanes, out_row,
                                         cs);
  }
}

// Four pixels of eight channels are a block.
template <int R>
void depthwise_packed(const Depthwise &layer, const bf16 *const *rows, int columns, bf16 *out, int64_t out_row) {
  const float *w = layer.weights;
  const int blocks = (columns + 3) / 4;
  depthwise_columns<16, 0, 1, R, 1>(layer, rows, blocks, 0, 8, 32, w, out, out_row, 16);
  depthwise_columns<16, 1, 1, R, 1>(layer, rows, blocks, 0, 8, 32, w + 13 * 16, out + 64, out_row, 16);
}

template <int R>
void depthwise(const Depthwise &layer, const bf16 *const *rows, int columns, bf16 *out, int64_t out_row) {
  if (layer.cs == 8 && layer.stride == 1) return depthwise_packed<R>(layer, rows, columns, out, out_row);
  const auto run = layer.stride == 1 ? layer.cs == 16 ? depthwise_rows<8, 1, R> : depthwise_rows<16, 1, R>
                   : layer.cs == 8   ? depthwise_rows<4, 2, R>
                   : layer.cs == 16  ? depthwise_rows<8, 2, R>
                                     : depthwise_rows<16, 2, R>;
  run(layer, rows, columns, out, out_row);
}

}  // namespace

void multiply_depthwise(const Depthwise &layer, const bf16 *const *rows, int64_t n, int columns, bf16 *out,
                        int64_t row_size) {
  int64_t r = 0;
  for (; r + 2 <= n; r += 2) depthwise<2>(layer, rows + r * layer.stride, columns, out + r * row_size, row_size);
  if (r < n) depthwise<1>(layer, rows + r * layer.stride, columns, out + r * row_size, row_size);
}

namespace {

constexpr int kGroupPairs = 4;  // of a group of 8 channels

// Sums of pixels 0 to 7.
FF_INLINE void add_quads(const bf16 *const (&rows)[3], const bf16 *weights, V (&acc)[8]) {
  for (int ky = 0; ky < 3; ++ky, weights += 3 * kGroupPairs * 32) {
    __m512i w[3 * kGroupPairs];
#pragma GCC unroll 12
    for (int i = 0; i < 3 * kGroupPairs; ++i) w[i] = load(weights + 32 * i);
#pragma GCC unroll 10
    for (int j = 0; j < 10; ++j) {
      const __m512i pixel = load(rows[ky] + 32 * j);
      const __m512i pairs[kGroupPairs] = {
          _mm512_shuffle_epi32(pixel, _MM_PERM_AAAA), _mm512_shuffle_epi32(pixel, _MM_PERM_BBBB),
          _mm512_shuffle_epi32(pixel, _MM_PERM_CCCC), _mm512_shuffle_epi32(pixel, _MM_PERM_DDDD)};
#pragma GCC unroll 4
      for (int k = 0; k < kGroupPairs; ++k)
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx)
          if (j - kx >= 0 && j - kx < 8) acc[j - kx] = dot(acc[j - kx], pairs[k], w[kx * kGroupPairs + k]);
    }
  }
}

template <int K>
FF_INLINE __m512i twin_pairs(__m512i pixel, __m512i next) {
  return (__m512i)_mm512_shuffle_ps((__m512)pixel, (__m512)next, K * 0x55);
}

// Sums of pixels 2 i and 2 i + 1, those of even and of odd pairs apart.
FF_INLINE void add_twins(const bf16 *const (&rows)[3], const bf16 *weights, V (&acc)[4][2]) {
  for (int ky = 0; ky < 3; ++ky, weights += 3 * kGroupPairs * 32) {
    __m512i w[3 * kGroupPairs];
#pragma GCC unroll 12
    for (int i = 0; i < 3 * kGroupPairs; ++i) w[i] = load(weights + 32 * i);
#pragma GCC unroll 9
    for (int j = 0; j < 9; ++j) {
      const __m512i pixel = load(rows[ky] + 32 * j), next = load(rows[ky] + 32 * j + 32);
      const __m512i pairs[kGroupPairs] = {twin_pairs<0>(pixel, next), twin_pairs<1>(pixel, next),
                                          twin_pairs<2>(pixel, next), twin_pairs<3>(pixel, next)};
#pragma GCC unroll 4
      for (int k = 0; k < kGroupPairs; ++k)
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          const int at = j - kx;
          if (at % 2 == 0 && at >= 0 && at < 8) {
            V &sum = acc[at / 2][k % 2];
            sum = dot(sum, pairs[k], w[kx * kGroupPairs + k]);
          }
        }
    }
  }
}

FF_INLINE void add_doubled(const bf16 *const (&rows)[3], const bf16 *weights, V (&acc)[4]) {
  for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx, weights += 32) {
      const __m512i w = load(weights);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[i] = dot(acc[i], load(rows[ky] + 16 * (2 * i + kx)), w);
    }
}

alignas(64) constexpr int32_t kTwinsOut[16] = {0, 2, 4, 6, 1, 3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(64) constexpr int32_t kTwinsDoubled[16] = {0, 0, 2, 2, 4, 4, 6, 6, 1, 1, 3, 3, 5, 5, 7, 7};
alignas(64) constexpr int32_t kDoubledOut[16] = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};

// Two pixels of 8 channels, of which `order` says where their pairs are.
FF_INLINE void store_twins(V sums, const int32_t *order, const Grouped &layer, bf16 *out) {
  const __m512i both = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(sums.v));
  const __m512i ordered = order == nullptr ? both : _mm512_permutexvar_epi32(_mm512_load_si512(order), both);
  if (layer.doubled) {
    _mm512_storeu_si512(out, ordered);
    return;
  }
  const __m256i low = _mm512_castsi512_si256(ordered);
  _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm256_castsi256_si128(low));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(out + layer.out_stride), _mm256_extracti128_si256(low, 1));
}

}  // namespace

void multiply_groups(const Grouped &layer, const bf16 *const (&rows)[3], int pixels, bf16 *out) {
  static_assert(kGroupedPixels == 8);
  if (pixels < kGroupedPixels) {
    alignas(64) bf16 spare[kGroupedPixels * 16];
    Grouped whole = layer;
    const int64_t numbers = layer.grouping == kQuads || layer.doubled ? 16 : 8;
    whole.out_stride = numbers;
    multiply_groups(whole, rows, kGroupedPixels, spare);
    for (int m = 0; m < pixels; ++m)
      std::memcpy(out + m * layer.out_stride, spare + m * numbers, numbers * sizeof(bf16));
    return;
  }
  const V bias = V::load(layer.bias);
  with_activation(layer.act, layer.slope, [&](auto act) {
    if (layer.grouping == kQuads) {
      V acc[8] = {bias, bias, bias, bias, bias, bias, bias, bias};
      add_quads(rows, layer.weights, acc);
#pragma GCC unroll 8
      for (int m = 0; m < 8; ++m)
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + m * layer.out_stride),
                            (__m256i)_mm512_cvtneps_pbh(act(acc[m]).v));
    } else if (layer.grouping == kTwins) {
      V acc[4][2] = {{bias, V::zero()}, {bias, V::zero()}, {bias, V::zero()}, {bias, V::zero()}};
      add_twins(rows, layer.weights, acc);
      const int32_t *order = layer.doubled ? kTwinsDoubled : kTwinsOut;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store_twins(act(acc[i][0] + acc[i][1]), order, layer, out + 2 * i * layer.out_stride);
    } else {
      V acc[4] = {bias, bias, bias, bias};
      add_doubled(rows, layer.weights, acc);
      const int32_t *order = layer.doubled ? kDoubledOut : nullptr;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store_twins(act(acc[i]), order, layer, out + 2 * i * layer.out_stride);
    }
  });
}

namespace {

// R rows of X vectors of sigmoid(bias + 7x7 convolution of pairs of a mean and a maximum). `lines` is the first row of
// the first window, of which rows lo .. hi - 1 exist.
template <int R, int X>
void spatial_tile(const bf16 *lines, int64_t row, int64_t lo, int64_t hi, const float *w, float *out, int64_t out_row) {
  V acc[R][X];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < X; ++i) acc[r][i] = V(w[49]);
#pragma GCC unroll 10
  for (int p = 0; p < R + 6; ++p) {
    if (p < lo || p >= hi) continue;
    const bf16 *line = lines + p * row;
    for (int kx = 0; kx < 7; ++kx) {
      __m512i value[X];
#pragma GCC unroll 2
      for (int i = 0; i < X; ++i) value[i] = load(line + 2 * (kx + i * L));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (p < r || p - r > 6) continue;
        const __m512i tap = (__m512i)_mm512_set1_ps(w[(p - r) * 7 + kx]);
#pragma GCC unroll 2
        for (int i = 0; i < X; ++i) acc[r][i] = dot(acc[r][i], value[i], tap);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < X; ++i) sigmoid(acc[r][i]).store(out + r * out_row + i * L);
}

template <int R>
void spatial_band(const Context &ctx, int64_t y, float *out) {
  const Block &b = *ctx.block;
  const int64_t plane = map_plane(b), top = y - 3;
  const int64_t lo = std::max<int64_t>(0, -top), hi = std::min<int64_t>(R + 6, ctx.a.h - top);
  for (int64_t g = 0; g < b.groups; ++g) {
    const auto *lines = reinterpret_cast<const bf16 *>(ctx.arena + b.maps + top * b.maps_row + g * plane);
    int64_t x = 0;
    for (; x + L < ctx.a.w; x += 2 * L)
      spatial_tile<R, 2>(lines + 2 * x, 2 * b.maps_row, lo, hi, ctx.weight(b.spatial) + g * 50, out + g * plane + x,
                         b.maps_row);
    if (x < ctx.a.w)
      spatial_tile<R, 1>(lines + 2 * x, 2 * b.maps_row, lo, hi, ctx.weight(b.spatial) + g * 50, out + g * plane + x,
                         b.maps_row);
  }
}

}  // namespace

void spatial_rows_bf16(const Context &ctx, int64_t y, int64_t n, float *out) {
  const auto at = [&](int64_t r) { return out + r * ctx.block->maps_row; };
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) spatial_band<4>(ctx, y + r, at(r));
  for (; r < n; ++r) spatial_band<1>(ctx, y + r, at(r));
}

}  // namespace ff::engine

#endif

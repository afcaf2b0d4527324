// Convolutions of the engine on NHWC rows.
#include <algorithm>

#include "engine.h"
#include "engine_gemm.h"
#include "engine_rows.h"

namespace ff::engine {
namespace {

// Depthwise 3x3 of R rows and X vectors per row, all in registers. `unit` is the distance between the inputs of two
// taps, SX * unit between those of two outputs; what lies `ahead` of the inputs is fetched into the L1 cache.
template <int SY, int SX, int R, int X>
FF_INLINE void depthwise_tile(const float *const *rows, int64_t offset, int64_t unit, int64_t ahead, const V (&w)[9],
                              V bias, float *out, int64_t out_row, int64_t out_column, int act, V slope) {
  V acc[R][X];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < X; ++x) acc[r][x] = bias;
#pragma GCC unroll 8
  for (int i = 0; i < (R - 1) * SY + 3; ++i) {
    const float *row = rows[i] + offset;
#pragma GCC unroll 16
    for (int j = 0; j < (X - 1) * SX + 3; ++j) {
      const V value = V::load(row + j * unit);
      __builtin_prefetch(row + j * unit + ahead);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const int ky = i - r * SY;
        if (ky < 0 || ky > 2) continue;
#pragma GCC unroll 8
        for (int x = 0; x < X; ++x) {
          const int kx = j - x * SX;
          if (kx >= 0 && kx <= 2) acc[r][x] = fma(value, w[ky * 3 + kx], acc[r][x]);
        }
      }
    }
  }
  with_activation(act, slope, [&](auto activation) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int x = 0; x < X; ++x) activation(acc[r][x]).store(out + r * out_row + x * out_column);
  });
}

// Vectors of a row in a tile: with nine filter taps and an input they fill the registers.
constexpr int kColumns = kRegisters == 32 ? 4 : 6;

// The last `columns` < X vectors of a row.
template <int SY, int SX, int R, int X>
FF_INLINE void depthwise_rest(int columns, const float *const *rows, int64_t offset, int64_t unit, int64_t ahead,
                              const V (&w)[9], V bias, float *out, int64_t out_row, int64_t out_column, int act,
                              V slope) {
  if constexpr (X > 1) {
    if (columns == X - 1)
      depthwise_tile<SY, SX, R, X - 1>(rows, offset, unit, ahead, w, bias, out, out_row, out_column, act, slope);
    else
      depthwise_rest<SY, SX, R, X - 1>(columns, rows, offset, unit, ahead, w, bias, out, out_row, out_column, act,
                                       slope);
  }
}

template <int SY, int SX, int R>
FF_INLINE void depthwise_columns(int columns, const float *const *rows, int64_t offset, int64_t unit, int64_t ahead,
                                 const V (&w)[9], V bias, float *out, int64_t out_row, int64_t out_column, int act,
                                 V slope) {
  int x = 0;
  for (; x + kColumns <= columns; x += kColumns)
    depthwise_tile<SY, SX, R, kColumns>(rows, offset + x * SX * unit, unit, ahead, w, bias, out + x * out_column,
                                        out_row, out_column, act, slope);
  depthwise_rest<SY, SX, R, kColumns>(columns - x, rows, offset + x * SX * unit, unit, ahead, w, bias,
                                      out + x * out_column, out_row, out_column, act, slope);
}

// `weights` is (vectors, 10, L): nine taps and the bias.
template <int SY, int SX>
void depthwise(int64_t n, int columns, int64_t vectors, const float *const *rows, int64_t unit, const float *weights,
               float *out, int64_t out_row, int64_t out_column, int act, V slope) {
  for (int64_t v = 0; v < vectors; ++v) {
    V w[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) w[i] = V::load(weights + (v * 10 + i) * L);
    const V bias = V::load(weights + (v * 10 + 9) * L);
    const int64_t ahead = v + 1 < vectors ? L : columns * SX * unit - v * L;
    int64_t r = 0;
    if constexpr (kRegisters == 32)
      for (; r + 2 <= n; r += 2)
        depthwise_columns<SY, SX, 2>(columns, rows + r * SY, v * L, unit, ahead, w, bias, out + r * out_row + v * L,
                                     out_row, out_column, act, slope);
    for (; r < n; ++r)
      depthwise_columns<SY, SX, 1>(columns, rows + r * SY, v * L, unit, ahead, w, bias, out + r * out_row + v * L,
                                   out_row, out_column, act, slope);
  }
}

// Sum and maximum of each channel over `columns` pixels, added to those of the row's earlier tiles.
void pool_row(const float *pixels, int64_t columns, int64_t cs, float *partial, bool first) {
  for (int64_t v = 0; v < cs; v += L) {
    V sum = V::load(pixels + v), most = sum;
    for (int64_t x = 1; x < columns; ++x) {
      const V value = V::load(pixels + x * cs + v);
      sum += value;
      most = max_keep(most, value);
    }
    if (!first) {
      sum += V::load(partial + v);
      most = max_keep(V::load(partial + cs + v), most);
    }
    sum.store(partial + v);
    most.store(partial + cs + v);
  }
}

// The stem's input: per row and channel the even and the odd columns apart, each with L floats before x = 0 of which
// the last is zero.
void split_float(const float *row, int64_t width, float *even, float *odd) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  for (; i + L <= width / 2; i += L) {
    const __m512 low = _mm512_loadu_ps(row + 2 * i), high = _mm512_loadu_ps(row + 2 * i + L);
    _mm512_storeu_ps(even + i, _mm512_permutex2var_ps(low, evens, high));
    _mm512_storeu_ps(odd + i, _mm512_permutex2var_ps(low, odds, high));
  }
#elif defined(__AVX2__)
  for (; i + L <= width / 2; i += L) {
    const __m256 first = _mm256_loadu_ps(row + 2 * i), second = _mm256_loadu_ps(row + 2 * i + L);
    const __m256 low = _mm256_permute2f128_ps(first, second, 0x20);
    const __m256 high = _mm256_permute2f128_ps(first, second, 0x31);
    _mm256_storeu_ps(even + i, _mm256_shuffle_ps(low, high, 0x88));
    _mm256_storeu_ps(odd + i, _mm256_shuffle_ps(low, high, 0xdd));
  }
#endif
  for (; i < width / 2; ++i) {
    even[i] = row[2 * i];
    odd[i] = row[2 * i + 1];
  }
  if (width % 2) {
    even[width / 2] = row[width - 1];
    odd[width / 2] = 0;
  }
  odd[-1] = 0;
}

// Pixels of three bytes, minus the mean: `channel` of those of even index to a, of the others to b.
void split_bytes(const uint8_t *row, int64_t width, int channel, float mean, float *a, float *b) {
  int64_t i = 0;
#if defined(__AVX2__)
  // 16 pixels are 48 bytes in three registers; byte d of the result comes from place 6 d + channel, and from 8 on the
  // odd pixels' bytes follow.
  __m128i places[3];
  for (int part = 0; part < 3; ++part) {
    alignas(16) int8_t place[16];
    for (int d = 0; d < 16; ++d) {
      const int at = 6 * (d % 8) + (d < 8 ? 0 : 3) + channel - 16 * part;
      place[d] = static_cast<int8_t>(at >= 0 && at < 16 ? at : -1);
    }
    places[part] = _mm_load_si128(reinterpret_cast<const __m128i *>(place));
  }
  const __m256 m = _mm256_set1_ps(mean);
  for (; i + 16 <= width; i += 16) {
    __m128i bytes = _mm_setzero_si128();
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const __m128i in = _mm_loadu_si128(reinterpret_cast<const __m128i *>(row + 3 * i + 16 * part));
      bytes = _mm_or_si128(bytes, _mm_shuffle_epi8(in, places[part]));
    }
    const __m256i even = _mm256_cvtepu8_epi32(bytes), odd = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
    _mm256_storeu_ps(a + i / 2, _mm256_sub_ps(_mm256_cvtepi32_ps(even), m));
    _mm256_storeu_ps(b + i / 2, _mm256_sub_ps(_mm256_cvtepi32_ps(odd), m));
  }
#endif
  for (; i < width; ++i) {
    float *to = i % 2 ? b : a;
    to[i / 2] = float(row[3 * i + channel]) - mean;
  }
}

// Row i of the network's input, of which `picture` covers a part, as split_float leaves it; false where it is zero.
bool split_picture(const Context &ctx, int64_t i, int64_t plane, float *out) {
  const Picture &p = *ctx.picture;
  if (i < p.top || i >= p.top + p.h) return false;
  const auto *row = reinterpret_cast<const uint8_t *>(ctx.image) + (i - p.top) * p.row_bytes;
  const int64_t count = (ctx.block->a_w + 1) / 2, right = p.left + p.w;
  for (int c = 0; c < 3; ++c) {
    float *even = out + 2 * c * plane + L, *odd = even + plane;
    float *first = p.left % 2 ? odd : even, *second = p.left % 2 ? even : odd;
    std::fill(even, even + (p.left + 1) / 2, 0.0f);
    std::fill(odd - 1, odd + p.left / 2, 0.0f);
    split_bytes(row, p.w, ctx.block->mode == 2 ? 2 - c : c, ctx.weight(ctx.block->w2)[c], first + p.left / 2,
                second + (p.left + 1) / 2);
    std::fill(even + (right + 1) / 2, even + count, 0.0f);
    std::fill(odd + right / 2, odd + count, 0.0f);
  }
  return true;
}

constexpr int kStemChannels = L == 16 ? 8 : 4;
constexpr int kStemVectors = L == 16 ? 3 : 2;

// kStemChannels channels of X vectors of pixels, planar, into `out` (kStemChannels, kStemVectors * L).
template <int X>
void stem_tile(const float *const (&rows)[3], int64_t plane, int64_t x, const float *w, const float *bias, int act,
               V slope, float *out) {
  V acc[kStemChannels][X];
#pragma GCC unroll 8
  for (int o = 0; o < kStemChannels; ++o)
#pragma GCC unroll 3
    for (int i = 0; i < X; ++i) acc[o][i] = V(bias[o]);
  for (int c = 0; c < 3; ++c)
    for (int ky = 0; ky < 3; ++ky) {
      const float *even = rows[ky] + 2 * c * plane + L + x, *odd = even + plane;
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx, w += kStemChannels) {
        const float *tap = kx == 0 ? odd - 1 : kx == 1 ? even : odd;
        V value[X];
#pragma GCC unroll 3
        for (int i = 0; i < X; ++i) value[i] = V::load(tap + i * L);
#pragma GCC unroll 8
        for (int o = 0; o < kStemChannels; ++o)
#pragma GCC unroll 3
          for (int i = 0; i < X; ++i) acc[o][i] = fma(value[i], V(w[o]), acc[o][i]);
      }
    }
  with_activation(act, slope, [&](auto activation) {
#pragma GCC unroll 8
    for (int o = 0; o < kStemChannels; ++o)
#pragma GCC unroll 3
      for (int i = 0; i < X; ++i) activation(acc[o][i]).store(out + (o * kStemVectors + i) * L);
  });
}

// (kStemChannels, pixels) planar -> pixels of distance cs.
void interleave(const float *in, int64_t pixels, float *out, int64_t cs) {
#if defined(__AVX512F__)
  if (cs == 8) {
    for (int64_t x = 0; x < pixels; x += L, out += 8 * L) {
      __m512 r[8], t[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = _mm512_loadu_ps(in + i * kStemVectors * L + x);
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
      }
      // After this, r[4 h + i] holds channels 4 h .. 4 h + 3 of pixel 4 l + i in its 128-bit lane l.
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512 low01 = _mm512_shuffle_f32x4(r[2 * i], r[4 + 2 * i], 0x44);
        const __m512 low23 = _mm512_shuffle_f32x4(r[2 * i], r[4 + 2 * i], 0xee);
        const __m512 high01 = _mm512_shuffle_f32x4(r[2 * i + 1], r[5 + 2 * i], 0x44);
        const __m512 high23 = _mm512_shuffle_f32x4(r[2 * i + 1], r[5 + 2 * i], 0xee);
        float *pair = out + i * 16;
        _mm512_storeu_ps(pair, _mm512_shuffle_f32x4(low01, high01, 0x88));
        _mm512_storeu_ps(pair + 32, _mm512_shuffle_f32x4(low01, high01, 0xdd));
        _mm512_storeu_ps(pair + 64, _mm512_shuffle_f32x4(low23, high23, 0x88));
        _mm512_storeu_ps(pair + 96, _mm512_shuffle_f32x4(low23, high23, 0xdd));
      }
    }
    return;
  }
#elif defined(__AVX2__)
  for (int64_t x = 0; x < pixels; x += 4, in += 4, out += 4 * cs) {
    __m128 r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_ps(in + i * kStemVectors * L);
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(out + i * cs, r[i]);
  }
  return;
#endif
  for (int64_t x = 0; x < pixels; ++x)
    for (int o = 0; o < kStemChannels; ++o) out[x * cs + o] = in[o * kStemVectors * L + x];
}

}  // namespace

void clear_border(const Map &map, int64_t y) {
  float *row = map.at(y), *end = row + (map.w + 1) * map.cs;
  std::memset(row, 0, map.cs * sizeof(float));
  std::memset(end, 0, map.cs * sizeof(float));
}

void stem(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t plane = b.p0, height = b.a_h, width = b.a_w;
  const V slope(ctx.slope());
  float *split = ctx.own(), *zeros = split + 3 * 6 * plane, *planar = zeros + 6 * plane;
  std::memset(zeros, 0, 6 * plane * sizeof(float));
  int64_t held[3] = {-2, -2, -2};
  bool filled[3];
  for (int64_t r = 0; r < n; ++r) {
    const float *rows[3];
    for (int ky = 0; ky < 3; ++ky) {
      const int64_t i = (y + r) * 2 - 1 + ky, slot = (i + 3) % 3;
      if (i < 0 || i >= height) {
        rows[ky] = zeros;
        continue;
      }
      float *out = split + slot * 6 * plane;
      if (held[slot] != i) {
        held[slot] = i;
        filled[slot] = true;
        if (b.mode == 0) {
          const float *image = reinterpret_cast<const float *>(ctx.image) + i * width;
          for (int c = 0; c < 3; ++c)
            split_float(image + c * height * width, width, out + 2 * c * plane + L, out + (2 * c + 1) * plane + L);
        } else {
          filled[slot] = split_picture(ctx, i, plane, out);
        }
      }
      rows[ky] = filled[slot] ? out : zeros;
    }
    float *row = ctx.o.at(y + r) + ctx.o.cs;
    const int64_t vectors = (ctx.o.w + L - 1) / L;
    for (int64_t v = 0; v < vectors; v += kStemVectors) {
      const int64_t count = std::min<int64_t>(kStemVectors, vectors - v);
      for (int64_t o = 0; o < b.o_c; o += kStemChannels) {
        const float *w = ctx.weight(b.w0) + o * 27, *bias = ctx.weight(b.w1) + o;
        if (count == kStemVectors)
          stem_tile<kStemVectors>(rows, plane, v * L, w, bias, b.act, slope, planar);
        else if (count == 2)
          stem_tile<2>(rows, plane, v * L, w, bias, b.act, slope, planar);
        else
          stem_tile<1>(rows, plane, v * L, w, bias, b.act, slope, planar);
        interleave(planar, count * L, row + v * L * ctx.o.cs + o, ctx.o.cs);
      }
    }
    clear_border(ctx.o, y + r);
  }
}

void output_rows(const Context &ctx, int64_t y, int64_t n, float **rows) {
  for (int64_t r = 0; r < n; ++r) rows[r] = ctx.o.at(y + r) + ctx.o.cs + ctx.block->p1;
}

void store_panels(const Context &ctx, const float *const *a, int64_t rows, int64_t a_row, int64_t taps,
                  int64_t channels, int64_t stride, float *const *out, int64_t x, int columns) {
  const Block &b = *ctx.block;
  const int64_t vectors = b.p0;
  const float *w = ctx.weight(b.w1), *bias = ctx.weight(b.w2);
  const V slope(ctx.slope());
  for (int64_t v = 0; v < vectors; v += kPanel) {
    const int width = static_cast<int>(std::min<int64_t>(kPanel, vectors - v));
    const int lanes = v + width == vectors ? static_cast<int>(b.p2) : L;
    for (int64_t r = 0; r < rows; ++r) {
      const float *pointers[9];
      for (int64_t t = 0; t < taps; ++t) pointers[t] = a[t + r * b.p3] + r * a_row;
      const Epilogue e{bias + v * L, out[r] + x * ctx.o.cs + v * L, ctx.o.cs, static_cast<int>(b.act), slope, lanes};
      if (stride == kTileStride)
        gemm_panel<kTileStride>(width, columns, pointers, taps, channels, 0, w, e);
      else
        gemm_panel<0>(width, columns, pointers, taps, channels, stride, w, e);
    }
    w += taps * channels * width * L;
  }
}

// The same for a 1x1 of kPacked channels, whose pixels follow each other.
static void store_packed(const Context &ctx, const float *a, int64_t rows, int64_t a_row, float *const *out, int64_t x,
                         int columns) {
  const Block &b = *ctx.block;
  const V slope(ctx.slope());
  with_activation(static_cast<int>(b.act), slope, [&](auto act) {
    for (int64_t v = 0; v < b.p0; ++v) {
      const int64_t panel = v / kPanel * kPanel, width = std::min<int64_t>(kPanel, b.p0 - panel);
      const PackedWeights w(ctx.weight(b.w1) + panel * kPacked * L + (v - panel) * L, width * L,
                            ctx.weight(b.w2) + v * L);
      for (int64_t r = 0; r < rows; ++r) {
        const float *pixels = a + r * a_row;
        float *to = out[r] + x * ctx.o.cs + v * L;
        int m = 0;
        for (; m + 8 <= columns; m += 8) packed_tile<8>(pixels + m * kPacked, w, to + m * ctx.o.cs, ctx.o.cs, act);
        for (; m < columns; ++m) packed_tile<1>(pixels + m * kPacked, w, to + m * ctx.o.cs, ctx.o.cs, act);
      }
    }
  });
}

namespace {

// A grouped 1x1 from two vectors of channels to two, for M pixels. Lane l of both outputs needs the same inputs:
// `table` is (size, L) of their positions, then the weights (size, 2, L).
template <int M>
void grouped_tile(const float *a, int64_t size, const float *table, const Epilogue &e) {
  V low[M], high[M], acc[M][2];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    low[m] = V::load(a + m * kTileStride), high[m] = V::load(a + m * kTileStride + L);
    acc[m][0] = V::load(e.bias), acc[m][1] = V::load(e.bias + L);
  }
  const float *weight = table + size * L;
  for (int64_t k = 0; k < size; ++k, table += L, weight += 2 * L) {
    const V first = V::load(weight), second = V::load(weight + L);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V value = pick(table, low[m], high[m]);
      acc[m][0] = fma(value, first, acc[m][0]);
      acc[m][1] = fma(value, second, acc[m][1]);
    }
  }
  with_activation(e.act, e.slope, [&](auto act) { finish_tile(acc, e, act); });
}

}  // namespace

// The same for a grouped 1x1 that the builder packed for grouped_tile.
static void store_grouped(const Context &ctx, const float *a, int64_t rows, int64_t a_row, float *const *out, int64_t x,
                          int columns) {
  const Block &b = *ctx.block;
  Epilogue e{ctx.weight(b.w2), nullptr, ctx.o.cs, static_cast<int>(b.act), V(ctx.slope()), L};
  for (int64_t r = 0; r < rows; ++r) {
    const float *pixel = a + r * a_row;
    e.out = out[r] + x * ctx.o.cs;
    int m = 0;
    for (; m + 4 <= columns; m += 4, pixel += 4 * kTileStride, e.out += 4 * e.stride)
      grouped_tile<4>(pixel, b.p5, ctx.weight(b.w1), e);
    for (; m < columns; ++m, pixel += kTileStride, e.out += e.stride) grouped_tile<1>(pixel, b.p5, ctx.weight(b.w1), e);
  }
}

void pool_tile(const Context &ctx, int64_t y, int64_t n, int64_t x, int64_t columns) {
  const Block &b = *ctx.block;
  if (b.pool < 0) return;
  for (int64_t r = 0; r < n; ++r)
    pool_row(ctx.o.at(y + r) + (x + 1) * ctx.o.cs, columns, ctx.o.cs, ctx.arena + b.pool + (y + r) * 2 * ctx.o.cs,
             x == 0);
}

namespace {

// Rows i0 .. i0 + count - 1 of the input from pixel -1 on; rows outside are zero.
struct InputRows {
  const float *zeros, *first[kMaxRows * 2 + 1];
  int64_t count, cs;
  InputRows(const Context &ctx, int64_t i0, int64_t count)
      : zeros(ctx.weight(ctx.block->w3)), count(count), cs(ctx.a.cs) {
    for (int64_t i = 0; i < count; ++i) first[i] = i0 + i >= 0 && i0 + i < ctx.a.h ? ctx.a.at(i0 + i) : nullptr;
  }
  void from(int64_t x, const float **rows) const {
    for (int64_t i = 0; i < count; ++i) rows[i] = first[i] ? first[i] + x * cs : zeros;
  }
};

}  // namespace

void separable(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t s = b.stride, cs = ctx.a.cs;
  const bool packed = cs == kPacked;
  const V slope(ctx.slope());
  const int64_t stride = packed ? cs : kTileStride, a_row = stride * (b.tile + packed);
  const int act = static_cast<int>(b.mode);
  float *buffer = ctx.own(), *out[kMaxRows];
  output_rows(ctx, y, n, out);
  const InputRows in(ctx, y * s - 1, (n - 1) * s + 3);
  for (int64_t x = 0; x < ctx.o.w; x += b.tile) {
    const int columns = static_cast<int>(std::min(b.tile, ctx.o.w - x));
    const float *rows[kMaxRows * 2 + 1];
    in.from(x * s, rows);
    const auto run = packed ? depthwise<1, 2> : s == 1 ? depthwise<1, 1> : depthwise<2, 2>;
    run(n, packed ? (columns + 1) / 2 : columns, packed ? 1 : cs / L, rows, cs, ctx.weight(b.w0), buffer, a_row,
        packed ? L : kTileStride, act, slope);
    const float *a[1] = {buffer};
    if (packed)
      store_packed(ctx, buffer, n, a_row, out, x, columns);
    else if (b.p5)
      store_grouped(ctx, buffer, n, a_row, out, x, columns);
    else
      store_panels(ctx, a, n, a_row, 1, ctx.a.c, kTileStride, out, x, columns);
    pool_tile(ctx, y, n, x, columns);
  }
  for (int64_t r = 0; r < n; ++r) clear_border(ctx.o, y + r);
}

void conv(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t s = b.stride, k = b.kernel, cs = ctx.a.cs;
  float *buffer = ctx.own(), *spatial = buffer + kMaxRows * b.tile * kTileStride, *out[kMaxRows];
  const bool gated = b.gate >= 0;
  if (gated) spatial_rows(ctx, y, n, spatial);
  output_rows(ctx, y, n, out);
  const InputRows in(ctx, y * s - k / 2, (n - 1) * s + k);
  for (int64_t x = 0; x < ctx.o.w; x += b.tile) {
    const int columns = static_cast<int>(std::min(b.tile, ctx.o.w - x));
    if (gated) {
      for (int64_t r = 0; r < n; ++r)
        gate_pixels(ctx, y + r, x, columns, spatial + r * b.maps_row / 2, buffer + r * b.tile * kTileStride,
                    kTileStride);
      const float *a[1] = {buffer};
      store_panels(ctx, a, n, b.tile * kTileStride, 1, ctx.a.c, kTileStride, out, x, columns);
    } else {
      const float *rows[kMaxRows * 2 + 1], *taps[9 * (kMaxRows * 2 + 1)];
      in.from(x * s + (k == 1), rows);
      for (int64_t i = 0; i < in.count; ++i)
        for (int64_t j = 0; j < k; ++j) taps[i * k + j] = rows[i] + j * cs;
      store_panels(ctx, taps, n, 0, k * k, ctx.a.c, cs * s, out, x, columns);
    }
    pool_tile(ctx, y, n, x, columns);
  }
  for (int64_t r = 0; r < n; ++r) clear_border(ctx.o, y + r);
}

namespace {

// Row y of the output from an input of another size by torch's nearest-neighbour interpolation, whose index is
// computed in float32.
void upsample_row(const Map &in, const Map &out, int64_t y, float *row) {
  const int64_t cs = out.cs;
  const float scale_y = float(in.h) / float(out.h), scale_x = float(in.w) / float(out.w);
  const float *from = in.at(std::min<int64_t>(int64_t(float(y) * scale_y), in.h - 1)) + cs;
  for (int64_t x = 0; x < out.w; ++x) {
    const float *pixel = from + std::min<int64_t>(int64_t(float(x) * scale_x), in.w - 1) * cs;
    for (int64_t v = 0; v < cs; v += L) V::load(pixel + v).store(row + x * cs + v);
  }
}

// Row y of a 3x3 maximum of stride 2. same: padded with zeros, (w % 2, 1) columns and (h % 2, 1) rows; else padding 1,
// ignored.
void pool_rows(const Map &in, const Map &out, int64_t y, bool same, float *row) {
  const int64_t cs = out.cs;
  const int64_t top = 2 * y - (same ? in.h % 2 : 1), left = same ? in.w % 2 : 1;
  const int64_t first_row = std::max<int64_t>(top, 0), rows = std::min(top + 3, in.h) - first_row;
  const float *lines[3];
  for (int64_t i = 0; i < rows; ++i) lines[i] = in.at(first_row + i) + cs;
  for (int64_t v = 0; v < cs; v += L) {
    const auto column = [&](int64_t x) {
      V most = V::load(lines[0] + x * cs + v);
      for (int64_t i = 1; i < rows; ++i) most = V::larger(most, V::load(lines[i] + x * cs + v));
      return most;
    };
    V last = V::zero();  // of the column that two windows share
    for (int64_t x = 0; x < out.w; ++x) {
      const int64_t first = std::max<int64_t>(2 * x - left, 0), end = std::min(2 * x - left + 3, in.w);
      V most = x > 0 && first == 2 * x - left ? last : column(first);
      for (int64_t j = first + 1; j < end; ++j) most = V::larger(most, last = column(j));
      if (same && (rows < 3 || end - first < 3)) most = V::larger(most, V::zero());
      most.store(row + x * cs + v);
    }
  }
}

template <int Inputs>
void fuse_rows(const float *const (&rows)[3], const float *weight, int64_t count, float *out) {
  const V first(weight[0]), second(weight[1]), third(weight[2]);
  for (int64_t i = 0; i < count; i += L) {
    V sum = V::load(rows[0] + i) * first;
    if constexpr (Inputs > 1) sum = fma(V::load(rows[1] + i), second, sum);
    if constexpr (Inputs > 2) sum = fma(V::load(rows[2] + i), third, sum);
    activate<kSilu>(sum, sum).store(out + i);
  }
}

}  // namespace

void fuse(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const Map *inputs[3] = {&ctx.a, &ctx.b, &ctx.c};
  const int64_t how[3] = {b.p0, b.p1, b.p2}, count = ctx.o.w * ctx.o.cs;
  const auto run = b.p1 < 0 ? fuse_rows<1> : b.p2 < 0 ? fuse_rows<2> : fuse_rows<3>;
  for (int64_t r = 0; r < n; ++r) {
    const float *rows[3] = {};
    for (int i = 0; i < 3; ++i) {
      float *spare = ctx.own() + i * count;
      rows[i] = how[i] == 0 ? inputs[i]->at(y + r) + ctx.o.cs : spare;
      if (how[i] == 1) upsample_row(*inputs[i], ctx.o, y + r, spare);
      if (how[i] > 1) pool_rows(*inputs[i], ctx.o, y + r, how[i] == 3, spare);
    }
    run(rows, ctx.weight(b.w0), count, ctx.o.at(y + r) + ctx.o.cs);
    clear_border(ctx.o, y + r);
  }
}

}  // namespace ff::engine

// Blocks of the engine in bfloat16 that are no convolutions of maps: the first layer, fusion, attention, heads.
#include "engine_bf16_rows.h"

#include <algorithm>
#include <cmath>

#include "engine_rows.h"

namespace ff::engine {
namespace {

// 2 L numbers, even and odd ones apart.
struct Pair {
  V even, odd;
  static FF_INLINE Pair load(const bf16 *p) { return {widen_every_other<0>(p), widen_every_other<1>(p)}; }
  FF_INLINE void store(bf16 *p) const {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
#else
    bf16 halves[2 * L];
    narrow(even, odd, halves);
    for (int i = 0; i < L; ++i) p[2 * i] = halves[i], p[2 * i + 1] = halves[L + i];
#endif
  }
};

template <class Op>
FF_INLINE Pair pair(Pair a, Op op) {
  return {op(a.even), op(a.odd)};
}
template <class Op>
FF_INLINE Pair pair(Pair a, Pair b, Op op) {
  return {op(a.even, b.even), op(a.odd, b.odd)};
}

// x / (1 + e^-x) to about 2^-12 of its value, which bfloat16 does not see.
FF_INLINE V silu(V x) {
#if defined(__AVX512F__)
  const __m512 t = _mm512_mul_ps(x.v, _mm512_set1_ps(-1.44269504f));
  const __m512 part = _mm512_reduce_ps(t, 0);
  __m512 p = _mm512_set1_ps(0.05500892f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.242211f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.69328293f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f));
  const __m512 power = _mm512_scalef_ps(p, _mm512_roundscale_ps(t, 0));
  return _mm512_mul_ps(x.v, _mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1.0f))));
#else
  return activate<kSilu>(x, x);
#endif
}

// (B, 3, H, W) float32 or (H, W, 3) bytes -> row i of the network's input, three numbers per pixel.
void pixels_of_planes(const float *const (&planes)[3], int64_t width, bf16 *out) {
  int64_t x = 0;
#if defined(__AVX512BF16__)
  alignas(64) static constexpr int16_t kLow[32] = {0,  16, 32, 1,  17, 33, 2,  18, 34, 3,  19, 35, 4,  20, 36, 5,
                                                   21, 37, 6,  22, 38, 7,  23, 39, 8,  24, 40, 9,  25, 41, 10, 26};
  alignas(64) static constexpr int16_t kHigh[32] = {42, 11, 27, 43, 12, 28, 44, 13, 29, 45, 14, 30, 46, 15, 31, 47};
  for (; x + 16 <= width; x += 16, out += 48) {
    const __m512i first = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(planes[1] + x), _mm512_loadu_ps(planes[0] + x));
    const __m512i second = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(planes[2] + x)));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, _mm512_load_si512(kLow), second));
    const __m512i rest = _mm512_permutex2var_epi16(first, _mm512_load_si512(kHigh), second);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 32), _mm512_castsi512_si256(rest));
  }
#endif
  for (; x < width; x += L / 4, out += 3 * (L / 4)) {
    float values[3 * L] = {};
    const int64_t count = std::min<int64_t>(L / 4, width - x);
    for (int64_t i = 0; i < count; ++i)
      for (int c = 0; c < 3; ++c) values[3 * i + c] = planes[c][x + i];
    bf16 narrowed[L];
    narrow(V::load(values), narrowed);
    std::memcpy(out, narrowed, 3 * count * sizeof(bf16));
  }
}

void pixels_of_bytes(const uint8_t *row, int64_t width, bool reversed, const float *mean, bf16 *out) {
  int64_t x = 0;
#if defined(__AVX512BF16__)
  const __m128i order = reversed ? _mm_set_epi8(-1, 12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2)
                                 : _mm_set_epi8(-1, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  alignas(64) float means[16];
  for (int i = 0; i < 16; ++i) means[i] = mean[i % 3];
  const __m512 m = _mm512_load_ps(means);
  for (; x + 6 <= width; x += 5, out += 15) {
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(row + 3 * x)), order);
    const __m512 values = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), m);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), (__m256i)_mm512_cvtneps_pbh(values));
  }
#endif
  for (; x < width; ++x)
    for (int c = 0; c < 3; ++c, ++out) {
      bf16 values[L];
      narrow(V(float(row[3 * x + (reversed ? 2 - c : c)]) - mean[c]), values);
      *out = values[0];
    }
}

// Row i of the network's input into `out`, from pixel 0 on; false where it is zero.
bool stem_row(const Context &ctx, int64_t i, bf16 *out) {
  const Block &b = *ctx.block;
  if (i < 0 || i >= b.a_h) return false;
  if (b.mode == 0) {
    const float *image = reinterpret_cast<const float *>(ctx.image) + i * b.a_w;
    const int64_t plane = b.a_h * b.a_w;
    pixels_of_planes({image, image + plane, image + 2 * plane}, b.a_w, out);
    return true;
  }
  const Picture &p = *ctx.picture;
  if (i < p.top || i >= p.top + p.h) return false;
  std::fill(out, out + 3 * p.left, bf16(0));
  const auto *row = reinterpret_cast<const uint8_t *>(ctx.image) + (i - p.top) * p.row_bytes;
  pixels_of_bytes(row, p.w, b.mode == 2, ctx.weight(b.w0), out + 3 * p.left);
  std::fill(out + 3 * (p.left + p.w), out + 3 * b.a_w, bf16(0));
  return true;
}

}  // namespace

// Rows of the image, three numbers per pixel, are a map of their own; p4 output pixels are one of 16 channels.
void stem_bf16(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t joined = b.p4, columns = (ctx.o.w + joined - 1) / joined;
  // Eight numbers before pixel 0, and behind the last what 16 pixels of the last strip read.
  const int64_t row_size = b.p0;
  auto *lines = reinterpret_cast<bf16 *>(ctx.own());
  bf16 *zeros = lines + (2 * kMaxRows + 1) * row_size;
  std::memset(zeros, 0, row_size * sizeof(bf16));
  const bf16 *rows[2 * kMaxRows + 1];
  for (int64_t i = 0; i < 2 * n + 1; ++i) {
    bf16 *line = lines + i * row_size;
    const int64_t end = 8 + 3 * b.a_w;
    std::memset(line, 0, 8 * sizeof(bf16));
    rows[i] = stem_row(ctx, 2 * y - 1 + i, line + 8) ? line : zeros;
    std::memset(line + end, 0, (row_size - end) * sizeof(bf16));
  }
  Tiles::configure(16);
  const int64_t strides[3] = {6 * joined, 6 * joined, 6 * joined}, pairs[3] = {8, 8, 8};
  TileLayer layer{3,
                  strides,
                  pairs,
                  reinterpret_cast<const bf16 *>(ctx.weight(b.w1)),
                  ctx.weight(b.w2),
                  b.p3,
                  static_cast<int>(b.act),
                  V(ctx.slope()),
                  joined * ctx.o.cs,
                  static_cast<int>(b.p2),
                  false};
  for (int64_t x = 0; x < columns; x += kTilePixels) {
    Strip strips[kMaxRows];
    const bf16 *taps[kMaxRows][3];
    for (int64_t r = 0; r < n; ++r) {
      for (int ky = 0; ky < 3; ++ky) taps[r][ky] = rows[2 * r + ky] + 8 + (2 * x * joined - 1) * 3;
      strips[r] = Strip{taps[r], pixels(ctx.o, y + r) + x * joined * ctx.o.cs,
                        static_cast<int>(std::min<int64_t>(kTilePixels, columns - x))};
    }
    multiply_tiles(layer, strips, static_cast<int>(n));
  }
  Tiles::configure();
  for (int64_t r = 0; r < n; ++r) clear_border_bf16(ctx.o, y + r);
}

namespace {

// The larger of both; NaN where either is.
FF_INLINE V larger(V kept, V value) {
#if defined(__AVX512F__)
  const __mmask16 bad = _mm512_cmp_ps_mask(kept.v, kept.v, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(_mm512_max_ps(kept.v, value.v), bad, kept.v);
#else
  return V::larger(kept, value);
#endif
}

// Adds an input of a BiFPN node to `sum`, or starts it, for `columns` pixels of `cs` numbers, even and odd ones of 2 L
// apart. value(x, v) gives numbers v .. v + 2 L - 1 of pixel x.
template <class Value>
FF_INLINE void add_input(bool first, float weight, int64_t columns, int64_t cs, float *sum, const Value &value) {
  const V w(weight);
  for (int64_t x = 0; x < columns; ++x)
    for (int64_t v = 0; v < cs; v += 2 * L, sum += 2 * L) {
      const Pair in = value(x, v);
      (first ? in.even * w : fma(in.even, w, V::load(sum))).store(sum);
      (first ? in.odd * w : fma(in.odd, w, V::load(sum + L))).store(sum + L);
    }
}

// how 0: as it is. 1: enlarged, with the index of torch's nearest-neighbour interpolation, computed in float32 as
// there. 2, 3: the 3x3 maximum of stride 2; 2: padding 1, ignored; 3: padded with zeros, (w % 2, 1) columns and (h % 2,
// 1) rows.
void add_resampled(const Map &in, int64_t how, float weight, const Map &out, int64_t y, bool first, float *sum) {
  const int64_t cs = out.cs;
  const auto add = [&](const auto &value) { add_input(first, weight, out.w, cs, sum, value); };
  if (how == 0) {
    const bf16 *row = pixels(in, y);
    return add([&](int64_t x, int64_t v) { return Pair::load(row + x * cs + v); });
  }
  if (how == 1) {
    const float scale_y = float(in.h) / float(out.h), scale = float(in.w) / float(out.w);
    const bf16 *row = pixels(in, std::min<int64_t>(int64_t(float(y) * scale_y), in.h - 1));
    const int32_t last = static_cast<int32_t>(in.w - 1);
    return add([&](int64_t x, int64_t v) {
      return Pair::load(row + std::min(int32_t(float(int32_t(x)) * scale), last) * cs + v);
    });
  }
  const int64_t top = 2 * y - (how == 3 ? in.h % 2 : 1), left = how == 3 ? in.w % 2 : 1;
  const int64_t first_row = std::max<int64_t>(top, 0), rows = std::min(top + 3, in.h) - first_row;
  const bf16 *lines[3];
  for (int64_t i = 0; i < 3; ++i) lines[i] = pixels(in, first_row + std::min(i, rows - 1));
  const auto column = [&](int64_t j, int64_t v) {
    const int64_t at = j * cs + v;
    const Pair low = Pair::load(lines[0] + at), middle = Pair::load(lines[1] + at), high = Pair::load(lines[2] + at);
    return pair(pair(low, middle, larger), high, larger);
  };
  add([&](int64_t x, int64_t v) {
    const int64_t from = std::max<int64_t>(2 * x - left, 0), count = std::min(2 * x - left + 3, in.w) - from;
    Pair most = column(from, v);
    for (int64_t j = 1; j < count; ++j) most = pair(most, column(from + j, v), larger);
    if (how == 3 && (rows < 3 || count < 3)) most = pair(most, Pair{V::zero(), V::zero()}, larger);
    return most;
  });
}

}  // namespace

void fuse_bf16(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const float *weight = ctx.weight(b.w0);
  const int64_t size = ctx.o.w * ctx.o.cs;
  float *sum = ctx.own();
  for (int64_t r = 0; r < n; ++r) {
    add_resampled(ctx.a, b.p0, weight[0], ctx.o, y + r, true, sum);
    if (b.p1 >= 0) add_resampled(ctx.b, b.p1, weight[1], ctx.o, y + r, false, sum);
    if (b.p2 >= 0) add_resampled(ctx.c, b.p2, weight[2], ctx.o, y + r, false, sum);
    bf16 *out = pixels(ctx.o, y + r);
    for (int64_t i = 0; i < size; i += 2 * L) Pair{silu(V::load(sum + i)), silu(V::load(sum + i + L))}.store(out + i);
    clear_border_bf16(ctx.o, y + r);
  }
}

void pool_row_bf16(const Context &ctx, int64_t y) {
  const Block &b = *ctx.block;
  if (b.pool < 0) return;
  const int64_t cs = ctx.o.cs;
  float *partial = ctx.arena + b.pool + y * 2 * cs;
  for (int64_t v = 0; v < cs; v += 2 * L) {
    const bf16 *row = pixels(ctx.o, y) + v;
    Pair most = Pair::load(row), sums[2] = {most, {V::zero(), V::zero()}};
    for (int64_t x = 1; x < ctx.o.w; ++x) {
      const Pair value = Pair::load(row + x * cs);
      sums[x % 2] = pair(sums[x % 2], value, [](V a, V c) { return a + c; });
      most = pair(most, value, max_keep);
    }
    const Pair sum = pair(sums[0], sums[1], [](V a, V c) { return a + c; });
    for (int i = 0; i < L; ++i) {
      partial[v + 2 * i] = sum.even.v[i], partial[v + 2 * i + 1] = sum.odd.v[i];
      partial[cs + v + 2 * i] = most.even.v[i], partial[cs + v + 2 * i + 1] = most.odd.v[i];
    }
  }
}

namespace {

#if defined(__AVX512F__)
constexpr bool kReduces = true;

// Lane by lane of 16 vectors, each four lanes combined: quarters[q][p] is that of lanes 4 q .. 4 q + 3 of vector p.
template <class Op>
FF_INLINE void combine_quarters(const V (&in)[16], V (&quarters)[4], Op op) {
  V four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    V two[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const V a = in[4 * i + 2 * j], b = in[4 * i + 2 * j + 1];
      two[j] = op(V(_mm512_unpacklo_ps(a.v, b.v)), V(_mm512_unpackhi_ps(a.v, b.v)));
    }
    const __m512d a = _mm512_castps_pd(two[0].v), b = _mm512_castps_pd(two[1].v);
    four[i] = op(V(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b))), V(_mm512_castpd_ps(_mm512_unpackhi_pd(a, b))));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 low =
        i == 0 ? _mm512_shuffle_f32x4(four[0].v, four[1].v, 0x44) : _mm512_shuffle_f32x4(four[0].v, four[1].v, 0xee);
    const __m512 high =
        i == 0 ? _mm512_shuffle_f32x4(four[2].v, four[3].v, 0x44) : _mm512_shuffle_f32x4(four[2].v, four[3].v, 0xee);
    quarters[2 * i] = _mm512_shuffle_f32x4(low, high, 0x88);
    quarters[2 * i + 1] = _mm512_shuffle_f32x4(low, high, 0xdd);
  }
}

// Means and maxima over groups of `size` channels (8, 16 or a multiple of 32) times their gates, of 16 pixels:
// store(group, mean, maximum).
template <class Store>
void group_maps(const bf16 *in, int64_t cs, int64_t channels, int64_t size, const float *gates, const Store &store) {
  const int64_t span = std::max<int64_t>(size, 32), inside = span / size;
  const V scale(1.0f / static_cast<float>(size));
  for (int64_t c = 0; c < channels; c += span) {
    V sums[16], tops[16], sum[4], top[4];
    for (int p = 0; p < 16; ++p) {
      const Pair first = Pair::load(in + p * cs + c);
      V even = first.even * V::load(gates + c), odd = first.odd * V::load(gates + c + L);
      V total = even + odd, largest = max_keep(even, odd);
      for (int64_t v = 32; v < span; v += 32) {
        const Pair next = Pair::load(in + p * cs + c + v);
        even = next.even * V::load(gates + c + v), odd = next.odd * V::load(gates + c + v + L);
        total += even + odd;
        largest = max_keep(largest, max_keep(even, odd));
      }
      sums[p] = total, tops[p] = largest;
    }
    combine_quarters(sums, sum, [](V a, V b) { return a + b; });
    combine_quarters(tops, top, max_keep);
    for (int64_t width = 1; width < 4 / inside; width *= 2)
      for (int64_t q = 0; q < 4; q += 2 * width) {
        sum[q] += sum[q + width];
        top[q] = max_keep(top[q], top[q + width]);
      }
    for (int64_t g = 0; g < inside; ++g) {
      const int64_t q = g * (4 / inside);
      store(c / size + g, sum[q] * scale, top[q]);
    }
  }
}
#else
constexpr bool kReduces = false;
template <class Store>
void group_maps(const bf16 *, int64_t, int64_t, int64_t, const float *, const Store &) {}
#endif

bf16 narrowed(float x) {
  bf16 values[L];
  narrow(V(x), values);
  return values[0];
}

float wide(bf16 x) {
  bf16 values[2 * L] = {x};
  return widen(values).v[0];
}

}  // namespace

// As maps(), of a bfloat16 map, and as one; for dot products mean and maximum of a pixel are a pair.
void maps_bf16(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t groups = b.groups, size = b.a_c / groups, plane = b.p1, cs = ctx.a.cs, width = ctx.o.w;
  const float *gate = ctx.arena + b.gate;
  const bool fast = kReduces && (size == 8 || size == 16 || size % 32 == 0) && b.a_c % 32 == 0;
  float *gates = ctx.own();  // of even channels of 2 L, then of odd ones
  for (int64_t c = 0; c < cs; ++c) gates[c / (2 * L) * 2 * L + c % 2 * L + c % (2 * L) / 2] = gate[c];
  for (int64_t r = 0; r < n; ++r) {
    const bf16 *row = pixels(ctx.a, y + r);
    auto *planes = reinterpret_cast<bf16 *>(ctx.o.at(y + r));
    constexpr int64_t kPixel = kDots ? 2 : 1;
    bf16 *mean = planes + (kDots ? b.p0 : b.p0 * plane) + kPixel * kMapMargin;
    bf16 *most = planes + (kDots ? 1 - b.p0 : (1 - b.p0) * plane) + kPixel * kMapMargin;
    if (fast) {
      for (int64_t x = 0; x < width; x += 16)
        group_maps(row + x * cs, cs, b.a_c, size, gates, [&](int64_t g, V sum, V top) {
          const int64_t at = 2 * g * plane + kPixel * x;
          if constexpr (kDots) {
            const Pair both = b.p0 ? Pair{top, sum} : Pair{sum, top};
            both.store(std::min(mean, most) + at);
          } else {
            narrow(sum, mean + at);
            narrow(top, most + at);
          }
        });
    } else {
      for (int64_t x = 0; x < width; ++x)
        for (int64_t g = 0; g < groups; ++g) {
          float sum = 0, top = 0;
          for (int64_t i = 0; i < size; ++i) {
            const float value = wide(row[x * cs + g * size + i]) * gate[g * size + i];
            sum += value;
            top = i == 0 || top < value ? value : top;
          }
          mean[2 * g * plane + kPixel * x] = narrowed(sum / static_cast<float>(size));
          most[2 * g * plane + kPixel * x] = narrowed(top);
        }
    }
    const int64_t line = kPixel * plane;
    for (int64_t m = 0; m < 2 * groups / kPixel; ++m, planes += line) {
      std::fill(planes, planes + kPixel * kMapMargin, bf16(0));
      std::fill(planes + kPixel * (kMapMargin + width), planes + line, bf16(0));
    }
  }
}

#if !defined(FF_ENGINE_DOTS)
namespace {

// Adds the convolution of one row of up to 16 segments of 16 outputs with row ky of two planes to tile C.
template <int C>
FF_INLINE void add_segments(const bf16 *line) {
  tile_load<4 + C % 2>(line, kTileChannels * sizeof(bf16));
  tile_multiply<C, 4 + C % 2, 6>();
}

}  // namespace

// A segment of 16 outputs is a product of 22 inputs, padded to 32, with a Toeplitz matrix of the 7 weights of a row:
// 14 tiles per group, then 16 times the bias.
void spatial_rows_bf16(const Context &ctx, int64_t y, int64_t n, float *out) {
  constexpr int64_t kGroupWeights = 14 * kTileWeights / 2 + kTileChannels;
  const Block &b = *ctx.block;
  const int64_t plane = map_plane(b), height = ctx.a.h, segments = (ctx.a.w + kTileChannels - 1) / kTileChannels;
  for (int64_t s = 0; s < segments; s += kTilePixels) {
    Tiles::configure(kTileDepth, static_cast<int>(std::min<int64_t>(kTilePixels, segments - s)));
    for (int64_t g = 0; g < b.groups; ++g) {
      const float *weights = ctx.weight(b.spatial) + g * kGroupWeights, *bias = weights + 7 * kTileWeights;
      float *gates = out + g * plane + s * kTileChannels;
      tile_load<0>(bias, 0);
      tile_load<1>(bias, 0);
      tile_load<2>(bias, 0);
      tile_load<3>(bias, 0);
      const auto *tile = reinterpret_cast<const bf16 *>(weights);
      for (int64_t m = 0; m < 2; ++m)
        for (int64_t ky = 0; ky < 7; ++ky, tile += kTileWeights) {
          tile_load<6>(tile, kTileDepth * sizeof(bf16));
          const int64_t top = y + ky - 3;
          const auto line = [&](int64_t r) {
            const auto *row = reinterpret_cast<const bf16 *>(ctx.arena + b.maps + (top + r) * b.maps_row);
            return row + (2 * g + m) * plane + s * kTileChannels;
          };
          const auto inside = [&](int64_t r) { return r < n && top + r >= 0 && top + r < height; };
          if (inside(0)) add_segments<0>(line(0));
          if (inside(1)) add_segments<1>(line(1));
          if (inside(2)) add_segments<2>(line(2));
          if (inside(3)) add_segments<3>(line(3));
        }
      constexpr int64_t kOut = kTileChannels * sizeof(float);
      tile_store<0>(gates, kOut);
      if (n > 1) tile_store<1>(gates + b.maps_row, kOut);
      if (n > 2) tile_store<2>(gates + 2 * b.maps_row, kOut);
      if (n > 3) tile_store<3>(gates + 3 * b.maps_row, kOut);
    }
  }
  Tiles::configure();
  const int64_t width = segments * kTileChannels;
  for (int64_t r = 0; r < n * b.groups; ++r)
    for (int64_t x = 0; x < width; x += L) sigmoid(V::load(out + r * plane + x)).store(out + r * plane + x);
}
#endif

namespace {

// L channels of a row of pixels. spatial_gate(x) gives that of the channels of pixel x.
template <int Mode, class SpatialGate>
FF_INLINE void gate_channels(const bf16 *in, const bf16 *residual, int64_t columns, int64_t cs, V gate,
                             const SpatialGate &spatial_gate, bf16 *out) {
  for (int64_t x = 0; x < columns; ++x) {
    const V raw = widen(in + x * cs), value = raw * gate, s = spatial_gate(x);
    V y = Mode == 0 ? value * s : fma(value, s, residual ? widen(residual + x * cs) : raw);
    if constexpr (Mode == 2) y = activate<kRelu>(y, y);
    narrow(y, out + x * cs);
  }
}

template <int Mode>
void gate_row(const bf16 *in, const bf16 *residual, int64_t columns, int64_t cs, const float *gate,
              const float *spatial, int64_t plane, int64_t size, int64_t groups, bf16 *out) {
  for (int64_t c = 0; c < cs; c += L, in += L, out += L, residual += residual ? L : 0) {
    const V channel_gate = V::load(gate + c);
    const float *line = spatial + (groups == 1 ? 0 : std::min(c / size, groups - 1) * plane);
    if (groups == 1 || size % L == 0) {
      gate_channels<Mode>(in, residual, columns, cs, channel_gate, [&](int64_t x) { return V(line[x]); }, out);
#if defined(__AVX512F__)
    } else if (size == 8 && groups % 2 == 0) {
      const auto halves = [&](int64_t x) -> V {
        return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(line[x]), _mm512_set1_ps(line[plane + x]));
      };
      gate_channels<Mode>(in, residual, columns, cs, channel_gate, halves, out);
#endif
    } else {
      const auto lanes = [&](int64_t x) {
        float values[L];
        for (int64_t i = 0; i < L; ++i) values[i] = spatial[std::min((c + i) / size, groups - 1) * plane + x];
        return V::load(values);
      };
      gate_channels<Mode>(in, residual, columns, cs, channel_gate, lanes, out);
    }
  }
}

}  // namespace

void gate_pixels_bf16(const Context &ctx, int64_t y, int64_t x, int64_t columns, const float *spatial, bf16 *out) {
  const Block &b = *ctx.block;
  const int64_t cs = ctx.a.cs;
  const bf16 *in = pixels(ctx.a, y) + x * cs, *residual = ctx.b.base ? pixels(ctx.b, y) + x * cs : nullptr;
  const auto run = b.mode == 0 ? gate_row<0> : b.mode == 1 ? gate_row<1> : gate_row<2>;
  run(in, residual, columns, cs, ctx.arena + b.gate, spatial + x, map_plane(b), ctx.a.c / b.groups, b.groups, out);
}

void apply_bf16(const Context &ctx, int64_t y, int64_t n) {
  float *spatial = ctx.own();
  spatial_rows_bf16(ctx, y, n, spatial);
  for (int64_t r = 0; r < n; ++r) {
    gate_pixels_bf16(ctx, y + r, 0, ctx.o.w, spatial + r * ctx.block->maps_row, pixels(ctx.o, y + r));
    pool_row_bf16(ctx, y + r);
    clear_border_bf16(ctx.o, y + r);
  }
}

// As head(); w0 holds tiles of weights.
void head_bf16(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t channels = b.p0 * 16, cs = ctx.a.cs;
  float *buffer = ctx.own();
  int64_t strides[8];
  std::fill(strides, strides + 8, cs);
  const int64_t run = std::min(cs, kMaxRun), pairs[1] = {cs / 2};
  TileLayer layer{(cs + run - 1) / run,
                  strides,
                  pairs,
                  reinterpret_cast<const bf16 *>(ctx.weight(b.w0)),
                  ctx.weight(b.w1),
                  b.p0,
                  kNone,
                  V::zero(),
                  channels,
                  b.p0 % 2 ? kTileChannels : 2 * kTileChannels,
                  true};
  for (int64_t r = 0; r < n; ++r) {
    const int64_t first = b.p1 + (y + r) * ctx.a.w * b.p0;
    for (int64_t x = 0; x < ctx.a.w; x += kTilePixels) {
      const int count = static_cast<int>(std::min<int64_t>(kTilePixels, ctx.a.w - x));
      const bf16 *taps[8];
      for (int64_t i = 0; i < layer.steps; ++i) taps[i] = pixels(ctx.a, y + r) + x * cs + i * kTileDepth;
      const Strip strip{taps, buffer, count};
      multiply_tiles(layer, &strip, 1);
      write_predictions(ctx, first + x * b.p0, count, buffer, channels);
    }
    finish_predictions(ctx, first);
  }
}

// As mix(), of NHWC maps.
void mix_bf16(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const V g(b.gate >= 0 ? ctx.arena[b.gate] : 1.0f), rest = V(1.0f) - g;
  for (int64_t r = 0; r < n; ++r) {
    const bf16 *in = pixels(ctx.a, y + r), *other = b.gate >= 0 ? pixels(ctx.b, y + r) : nullptr;
    bf16 *out = pixels(ctx.o, y + r);
    for (int64_t i = 0; i < ctx.o.w * ctx.o.cs; i += L) {
      V value = widen(in + i);
      if (other) {
        const V raw = widen(other + i);
        value = fma(g, value, rest * activate<kRelu>(raw, raw));
      }
      narrow(enhanced(value, b.p0), out + i);
    }
    clear_border_bf16(ctx.o, y + r);
  }
}

void to_float(const Context &ctx, int64_t y, int64_t n) {
  for (int64_t r = 0; r < n; ++r) {
    const bf16 *in = pixels(ctx.a, y + r);
    float *out = ctx.o.at(y + r) + ctx.o.cs;
    for (int64_t x = 0; x < ctx.o.w; ++x)
      for (int64_t c = 0; c < ctx.o.cs; c += L) widen(in + x * ctx.a.cs + c).store(out + x * ctx.o.cs + c);
    clear_border(ctx.o, y + r);
  }
}

void to_bf16(const Context &ctx, int64_t y, int64_t n) {
  for (int64_t r = 0; r < n; ++r) {
    const float *in = ctx.a.at(y + r) + ctx.a.cs;
    bf16 *out = pixels(ctx.o, y + r);
    std::fill(out, out + ctx.o.w * ctx.o.cs, bf16(0));
    for (int64_t x = 0; x < ctx.o.w; ++x)
      for (int64_t c = 0; c < ctx.a.c; c += L) {
        // Behind the channels of a concatenation nothing was written.
        const int count = static_cast<int>(std::min<int64_t>(L, ctx.a.c - c));
        narrow(V::load_first(in + x * ctx.a.cs + c, count), out + x * ctx.o.cs + c);
      }
    pool_row_bf16(ctx, y + r);
    clear_border_bf16(ctx.o, y + r);
  }
}

}  // namespace ff::engine

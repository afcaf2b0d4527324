// CBAM in the engine: channel gate from pooled rows, spatial gate from mean and maximum maps, both applied by whoever
// reads the gated map next.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "engine.h"
#include "engine_math.h"
#include "engine_rows.h"

namespace ff::engine {

// mode 0: a gate per channel, sigmoid(mlp(mean) + mlp(max)), the MLP (w0, w1, w2, w3: fc1 and fc2 with biases, p0
// inputs, p1 hidden units) on each chunk of p0 channels. mode 1: one gate, sigmoid(w0 . mean + w1[0]).
void gate(const Context &ctx, int64_t, int64_t) {
  const Block &b = *ctx.block;
  const int64_t c = b.a_c, cs = b.a_cs, rows = b.a_h;
  float *mean = ctx.own(), *most = mean + cs, *hidden = most + cs;
  for (int64_t v = 0; v < cs; v += L) {
    const float *partial = ctx.arena + b.pool + v;
    V sum = V::load(partial), top = V::load(partial + cs);
    for (int64_t y = 1; y < rows; ++y) {
      sum += V::load(partial + y * 2 * cs);
      top = max_keep(top, V::load(partial + (y * 2 + 1) * cs));
    }
    (sum / V(float(rows * b.a_w))).store(mean + v);
    top.store(most + v);
  }
  float *out = ctx.arena + b.gate;
  const float *fc1 = ctx.weight(b.w0), *bias1 = ctx.weight(b.w1), *fc2 = ctx.weight(b.w2), *bias2 = ctx.weight(b.w3);
  if (b.mode == 1) {
    float total = bias1[0];
    for (int64_t i = 0; i < c; ++i) total += fc1[i] * mean[i];
    out[0] = 1.0f / (1.0f + std::exp(-total));
    return;
  }
  for (int64_t chunk = 0; chunk < c; chunk += b.p0) {
    for (int64_t h = 0; h < b.p1; ++h) {
      float from_mean = bias1[h], from_max = bias1[h];
      for (int64_t i = 0; i < b.p0; ++i) {
        from_mean += fc1[h * b.p0 + i] * mean[chunk + i];
        from_max += fc1[h * b.p0 + i] * most[chunk + i];
      }
      hidden[h] = (from_mean < 0 ? 0 : from_mean) + (from_max < 0 ? 0 : from_max);
    }
    for (int64_t i = 0; i < b.p0; ++i) {
      float total = 2 * bias2[i];
      for (int64_t h = 0; h < b.p1; ++h) total += fc2[i * b.p1 + h] * hidden[h];
      out[chunk + i] = 1.0f / (1.0f + std::exp(-total));
    }
  }
  std::fill(out + c, out + cs, 0.0f);
}

namespace {

// Up to L pixels of cs channels as L pixels, with zeros for those that are missing. `spare` holds L * cs floats.
const float *whole_pixels(const float *in, int64_t pixels, int64_t cs, float *spare) {
  if (pixels == L) return in;
  std::memcpy(spare, in, pixels * cs * sizeof(float));
  std::memset(spare + pixels * cs, 0, (L - pixels) * cs * sizeof(float));
  return spare;
}

}  // namespace

void transpose_pixels(const float *in, int64_t pixels, int64_t cs, float *out, int64_t plane, float *spare) {
  in = whole_pixels(in, pixels, cs, spare);
  for (int64_t v = 0; v < cs; v += L) transpose(in + v, cs, out + v * plane, plane);
}

namespace {

// The sum and maximum of each group's gated channels for L pixels: `store(g, sum, maximum)`. `pixels`
// is (L, cs).
template <class Store>
void reduce_planar(const float *pixels, int64_t cs, int64_t groups, int64_t size, const float *gate, float *planar,
                   const Store &store) {
  for (int64_t v = 0; v < cs; v += L) transpose(pixels + v, cs, planar + v * L, L);
  for (int64_t g = 0; g < groups; ++g) {
    const float *value = planar + g * size * L, *weight = gate + g * size;
    V sum = V::load(value) * V(weight[0]), most = sum;
    for (int64_t i = 1; i < size; ++i) {
      const V gated = V::load(value + i * L) * V(weight[i]);
      sum += gated;
      most = max_keep(most, gated);
    }
    store(g, sum, most);
  }
}

#if defined(__AVX512F__)
struct Add {
  static FF_INLINE __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};
struct Max {
  static FF_INLINE __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

// Lane 4 q + i of the result: vector i reduced over its lanes 4 q .. 4 q + 3.
template <class Op>
FF_INLINE __m512 reduce_quarters(V a, V b, V c, V d) {
  const __m512 ab = Op::of(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = Op::of(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  return Op::of(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}

// Quarters of a and b: a0 a2 b0 b2 with a1 a3 b1 b3.
template <class Op>
FF_INLINE __m512 reduce_pairs(__m512 a, __m512 b) {
  return Op::of(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// reduce_planar for groups of 8 or of a multiple of 16 channels, without a transposition.
template <class Store>
void reduce_lanes(const float *pixels, int64_t cs, int64_t groups, int64_t size, const float *gate,
                  const Store &store) {
  for (int64_t v = 0; v < groups * size; v += std::max<int64_t>(size, L)) {
    __m512 sums[4], tops[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      V sum[4], most[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float *pixel = pixels + (4 * q + i) * cs + v;
        sum[i] = most[i] = V::load(pixel) * V::load(gate + v);
        for (int64_t j = L; j < size; j += L) {
          const V gated = V::load(pixel + j) * V::load(gate + v + j);
          sum[i] += gated;
          most[i] = max_keep(most[i], gated);
        }
      }
      sums[q] = reduce_quarters<Add>(sum[0], sum[1], sum[2], sum[3]);
      tops[q] = reduce_quarters<Max>(most[0], most[1], most[2], most[3]);
    }
    const __m512 sum01 = reduce_pairs<Add>(sums[0], sums[1]), sum23 = reduce_pairs<Add>(sums[2], sums[3]);
    const __m512 top01 = reduce_pairs<Max>(tops[0], tops[1]), top23 = reduce_pairs<Max>(tops[2], tops[3]);
    if (size >= L) {
      store(v / size, reduce_pairs<Add>(sum01, sum23), reduce_pairs<Max>(top01, top23));
    } else {
      store(v / size, _mm512_shuffle_f32x4(sum01, sum23, 0x88), _mm512_shuffle_f32x4(top01, top23, 0x88));
      store(v / size + 1, _mm512_shuffle_f32x4(sum01, sum23, 0xdd), _mm512_shuffle_f32x4(top01, top23, 0xdd));
    }
  }
}
#endif

}  // namespace

// Row y: for each of `groups` groups its mean, then its maximum (p0 = 1: maximum first), over the group's channels of
// a * gate; planes of p1 floats with zeros outside the image.
void maps(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t groups = b.groups, size = b.a_c / groups, plane = b.p1, cs = ctx.a.cs;
  const float *gate = ctx.arena + b.gate;
  float *planar = ctx.own(), *spare = planar + cs * L;  // (cs, L) and (L, cs)
  const V scale = V(static_cast<float>(size));
  for (int64_t r = 0; r < n; ++r) {
    const float *row = ctx.a.at(y + r) + cs;
    float *out = ctx.o.at(y + r);
    for (int64_t x = 0; x < ctx.o.w; x += L) {
      const float *pixels = whole_pixels(row + x * cs, std::min<int64_t>(L, ctx.o.w - x), cs, spare);
      const auto store = [&](int64_t g, V sum, V most) {
        float *at = out + 2 * g * plane + L + x;
        (sum / scale).store(at + b.p0 * plane);
        most.store(at + (1 - b.p0) * plane);
      };
#if defined(__AVX512F__)
      if ((size == L / 2 && groups % 2 == 0) || size % L == 0) {
        reduce_lanes(pixels, cs, groups, size, gate, store);
        continue;
      }
#endif
      reduce_planar(pixels, cs, groups, size, gate, planar, store);
    }
    for (int64_t m = 0; m < 2 * groups; ++m) {
      float *line = out + m * plane;
      std::memset(line, 0, L * sizeof(float));
      std::memset(line + L + ctx.o.w, 0, (plane - L - ctx.o.w) * sizeof(float));
    }
  }
}

namespace {

// Adds the taps of input row P, counted from the first of the window of output row 0, to R rows of X vectors.
template <int P, int R, int X>
FF_INLINE void spatial_taps(const float *line, int64_t plane, const float *w, V (&acc)[R][X]) {
  for (int m = 0; m < 2; ++m, line += plane, w += 49)
    for (int kx = 0; kx < 7; ++kx) {
      V value[X];
#pragma GCC unroll 3
      for (int i = 0; i < X; ++i) value[i] = V::load(line + kx + i * L);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (P < r || P - r > 6) continue;
        const V tap(w[(P - r) * 7 + kx]);
#pragma GCC unroll 3
        for (int i = 0; i < X; ++i) acc[r][i] = fma(value[i], tap, acc[r][i]);
      }
    }
}

// R rows of X vectors of sigmoid(bias + 7x7 convolution of two planes): an unaligned load takes as long as two
// products, so all rows share it. `lines` is the first row of the first window, of which rows lo .. hi exist.
template <int R, int X, int... P>
void spatial_tile(const float *lines, int64_t row, int64_t plane, int64_t lo, int64_t hi, const float *w, float *out,
                  int64_t out_row, std::integer_sequence<int, P...>) {
  V acc[R][X];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < X; ++i) acc[r][i] = V(w[98]);
  ((P >= lo && P < hi ? spatial_taps<P>(lines + P * row, plane, w, acc) : void()), ...);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < X; ++i) sigmoid(acc[r][i]).store(out + r * out_row + i * L);
}

template <int R>
void spatial_band(const Context &ctx, int64_t y, float *out) {
  const Block &b = *ctx.block;
  const int64_t plane = b.maps_row / (2 * b.groups), width = ctx.a.w, top = y - 3;
  const int64_t lo = std::max<int64_t>(0, -top), hi = std::min<int64_t>(R + 6, ctx.a.h - top);
  const std::make_integer_sequence<int, R + 6> windows;
  for (int64_t g = 0; g < b.groups; ++g) {
    const float *w = ctx.weight(b.spatial) + g * 99;
    const float *lines = ctx.arena + b.maps + top * b.maps_row + 2 * g * plane + L - 3;
    for (int64_t x = 0; x < width; x += 3 * L) {
      const int64_t vectors = (width - x + L - 1) / L;
      const auto tile = [&](auto count) {
        spatial_tile<R, count>(lines + x, b.maps_row, plane, lo, hi, w, out + g * plane + x, b.maps_row / 2, windows);
      };
      if (vectors > 2)
        tile(std::integral_constant<int, 3>{});
      else if (vectors == 2)
        tile(std::integral_constant<int, 2>{});
      else
        tile(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace

void spatial_rows(const Context &ctx, int64_t y, int64_t n, float *out) {
  int64_t r = 0;
  const auto at = [&](int64_t r) { return out + r * ctx.block->maps_row / 2; };
  for (; r + 4 <= n; r += 4) spatial_band<4>(ctx, y + r, at(r));
  for (; r + 2 <= n; r += 2) spatial_band<2>(ctx, y + r, at(r));
  for (; r < n; ++r) spatial_band<1>(ctx, y + r, at(r));
}

namespace {

// The spatial gate of channels v .. v + L - 1 at one pixel; spatial[g * plane] belongs to group g.
FF_INLINE V lane_gates(const float *spatial, int64_t plane, int64_t v, int64_t size, int64_t groups) {
  float lanes[L];
  for (int64_t i = 0; i < L; ++i) lanes[i] = spatial[std::min((v + i) / size, groups - 1) * plane];
  return V::load(lanes);
}

template <int Mode>
FF_INLINE V gated(V value, V channel_gate, V spatial_gate, V residual) {
  const V y = value * channel_gate;
  if constexpr (Mode == 0) return y * spatial_gate;
  const V sum = fma(y, spatial_gate, residual);
  return Mode == 2 ? activate<kRelu>(sum, sum) : sum;
}

template <int Mode>
void gate_row(const float *x, int64_t columns, int64_t cs, const float *channel_gate, const float *spatial,
              int64_t plane, int64_t size, int64_t groups, const float *residual, float *out, int64_t stride) {
  for (int64_t v = 0; v < cs; v += L) {
    const V gate = V::load(channel_gate + v);
    // Channels of one group share a vector's gate.
    const float *shared = groups == 1 ? spatial : size % L == 0 ? spatial + v / size * plane : nullptr;
    for (int64_t i = 0; i < columns; ++i) {
      const V s = shared ? V(shared[i]) : lane_gates(spatial + i, plane, v, size, groups);
      const int64_t at = i * cs + v;
      gated<Mode>(V::load(x + at), gate, s, V::load(residual + at)).store(out + i * stride + v);
    }
  }
}

}  // namespace

void gate_pixels(const Context &ctx, int64_t y, int64_t x, int64_t columns, const float *spatial, float *out,
                 int64_t stride) {
  const Block &b = *ctx.block;
  const int64_t plane = b.maps_row / (2 * b.groups), cs = ctx.a.cs;
  const float *in = ctx.a.at(y) + (x + 1) * cs;
  const float *residual = ctx.b.base ? ctx.b.at(y) + (x + 1) * cs : in;
  const auto run = b.mode == 0 ? gate_row<0> : b.mode == 1 ? gate_row<1> : gate_row<2>;
  run(in, columns, cs, ctx.arena + b.gate, spatial + x, plane, ctx.a.c / b.groups, b.groups, residual, out, stride);
}

void apply(const Context &ctx, int64_t y, int64_t n) {
  float *spatial = ctx.own();
  const int64_t row = ctx.block->maps_row / 2;
  spatial_rows(ctx, y, n, spatial);
  for (int64_t r = 0; r < n; ++r) {
    gate_pixels(ctx, y + r, 0, ctx.o.w, spatial + r * row, ctx.o.at(y + r) + ctx.o.cs, ctx.o.cs);
    pool_tile(ctx, y + r, 1, 0, ctx.o.w);
    clear_border(ctx.o, y + r);
  }
}

}  // namespace ff::engine

// CBAM in the engine: channel gate from pooled rows, spatial gate from mean and maximum maps, both applied by whoever
// reads the gated map next.
#include <algorithm>
#include <cmath>

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

// Up to L pixels of cs channels -> (cs, plane); missing pixels are zero. `spare` holds L * cs floats.
void transpose_pixels(const float *in, int64_t pixels, int64_t cs, float *out, int64_t plane, float *spare) {
  if (pixels < L) {
    std::memcpy(spare, in, pixels * cs * sizeof(float));
    std::memset(spare + pixels * cs, 0, (L - pixels) * cs * sizeof(float));
    in = spare;
  }
  for (int64_t v = 0; v < cs; v += L) transpose(in + v, cs, out + v * plane, plane);
}

// Row y: for each of `groups` groups its mean, then its maximum (p0 = 1: maximum first), over the group's channels of
// a * gate; planes of p1 floats with zeros outside the image.
void maps(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t groups = b.groups, size = b.a_c / groups, plane = b.p1, cs = ctx.a.cs;
  const float *channel_gate = ctx.arena + b.gate;
  float *planar = ctx.own();  // (cs, L), then room for L pixels
  const V scale = V(static_cast<float>(size));
  for (int64_t r = 0; r < n; ++r) {
    const float *row = ctx.a.at(y + r) + cs;
    float *out = ctx.o.at(y + r);
    for (int64_t x = 0; x < ctx.o.w; x += L) {
      transpose_pixels(row + x * cs, std::min<int64_t>(L, ctx.o.w - x), cs, planar, L, planar + cs * L);
      for (int64_t g = 0; g < groups; ++g) {
        const float *value = planar + g * size * L, *weight = channel_gate + g * size;
        V sum = V::load(value) * V(weight[0]), most = sum;
        for (int64_t i = 1; i < size; ++i) {
          const V gated = V::load(value + i * L) * V(weight[i]);
          sum += gated;
          most = max_keep(most, gated);
        }
        float *mean_out = out + (2 * g + b.p0) * plane + L + x, *max_out = out + (2 * g + 1 - b.p0) * plane + L + x;
        (sum / scale).store(mean_out);
        most.store(max_out);
      }
    }
    for (int64_t m = 0; m < 2 * groups; ++m) {
      float *line = out + m * plane;
      std::memset(line, 0, L * sizeof(float));
      std::memset(line + L + ctx.o.w, 0, (plane - L - ctx.o.w) * sizeof(float));
    }
  }
}

namespace {

// X vectors of sigmoid(bias + 7x7 convolution of two planes); `lines` is the first of rows lo .. hi of the window.
template <int X>
FF_INLINE void spatial_tile(const float *lines, int64_t row, int64_t plane, int lo, int hi, const float *w, float bias,
                            float *out) {
  V even[X], odd[X];  // two chains hide the latency of FMA
#pragma GCC unroll 5
  for (int i = 0; i < X; ++i) even[i] = V(bias), odd[i] = V::zero();
  for (int m = 0; m < 2; ++m)
    for (int ky = lo; ky < hi; ++ky) {
      const float *line = lines + (ky - lo) * row + m * plane, *weight = w + m * 49 + ky * 7;
#pragma GCC unroll 7
      for (int kx = 0; kx < 7; ++kx) {
        const V tap(weight[kx]);
#pragma GCC unroll 5
        for (int i = 0; i < X; ++i) {
          V &acc = kx % 2 ? odd[i] : even[i];
          acc = fma(V::load(line + kx + i * L), tap, acc);
        }
      }
    }
#pragma GCC unroll 5
  for (int i = 0; i < X; ++i) sigmoid(even[i] + odd[i]).store(out + i * L);
}

}  // namespace

void spatial_rows(const Context &ctx, int64_t y, int64_t n, float *out) {
  const Block &b = *ctx.block;
  const int64_t plane = b.maps_row / (2 * b.groups), height = ctx.a.h, width = ctx.a.w;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t top = y + r - 3;
    const int lo = static_cast<int>(std::max<int64_t>(0, -top)),
              hi = static_cast<int>(std::min<int64_t>(7, height - top));
    for (int64_t g = 0; g < b.groups; ++g) {
      const float *w = ctx.weight(b.spatial) + g * 99;
      const float *lines = ctx.arena + b.maps + (top + lo) * b.maps_row + 2 * g * plane + L - 3;
      float *line = out + (r * b.groups + g) * plane;
      for (int64_t x = 0; x < width; x += 5 * L) {
        const int64_t vectors = std::min<int64_t>(5, (width - x + L - 1) / L);
        if (vectors == 5)
          spatial_tile<5>(lines + x, b.maps_row, plane, lo, hi, w, w[98], line + x);
        else if (vectors == 4)
          spatial_tile<4>(lines + x, b.maps_row, plane, lo, hi, w, w[98], line + x);
        else if (vectors == 3)
          spatial_tile<3>(lines + x, b.maps_row, plane, lo, hi, w, w[98], line + x);
        else if (vectors == 2)
          spatial_tile<2>(lines + x, b.maps_row, plane, lo, hi, w, w[98], line + x);
        else
          spatial_tile<1>(lines + x, b.maps_row, plane, lo, hi, w, w[98], line + x);
      }
    }
  }
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

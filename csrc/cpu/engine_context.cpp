// The context block and the heads on planar rows: with few channels per group, pixels are the better vectors.
#include <algorithm>
#include <cmath>

#include "engine.h"
#include "engine_gemm.h"
#include "engine_rows.h"

namespace ff::engine {
namespace {

constexpr int kPlanarVectors = kRegisters == 32 ? 5 : 2;
constexpr int64_t kRunChannels = 8;  // kRun, in channels of nine taps

void clear_margins(float *row, int64_t channels, int64_t plane, int64_t width) {
  for (int64_t c = 0; c < channels; ++c, row += plane) {
    row[L - 1] = 0;
    std::memset(row + L + width, 0, (plane - L - width) * sizeof(float));
  }
}

// O output channels of X vectors of pixels: 3x3 over `channels` planes. `w` is (channels, 3, 3, O).
template <int O, int X>
void planar_tile(const float *const (&rows)[3], int64_t channels, int64_t plane, const float *w, const float *bias,
                 int act, V slope, float *const *out) {
  V acc[O][X], total[O][X];
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 5
    for (int i = 0; i < X; ++i) {
      acc[o][i] = V(bias[o]);
      total[o][i] = V::zero();
    }
  for (int64_t c = 0; c < channels; ++c) {
    if (c > 0 && c % kRunChannels == 0) {
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o)
#pragma GCC unroll 5
        for (int i = 0; i < X; ++i) {
          total[o][i] += acc[o][i];
          acc[o][i] = V::zero();
        }
    }
    for (int ky = 0; ky < 3; ++ky) {
      const float *weight = w + (c * 3 + ky) * 3 * O;
      if (rows[ky] == nullptr) continue;
      const float *line = rows[ky] + c * plane - 1;
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        V value[X];
#pragma GCC unroll 5
        for (int i = 0; i < X; ++i) value[i] = V::load(line + kx + i * L);
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) {
          const V tap(weight[kx * O + o]);
#pragma GCC unroll 5
          for (int i = 0; i < X; ++i) acc[o][i] = fma(value[i], tap, acc[o][i]);
        }
      }
    }
  }
  if (channels > kRunChannels) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 5
      for (int i = 0; i < X; ++i) acc[o][i] += total[o][i];
  }
  with_activation(act, slope, [&](auto activation) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 5
      for (int i = 0; i < X; ++i) activation(acc[o][i]).store(out[o] + i * L);
  });
}

template <int O>
void planar_vectors(int vectors, const float *const (&rows)[3], int64_t channels, int64_t plane, const float *w,
                    const float *bias, int act, V slope, float *const *out) {
  switch (vectors) {
    case 1:
      return planar_tile<O, 1>(rows, channels, plane, w, bias, act, slope, out);
    case 2:
      return planar_tile<O, 2>(rows, channels, plane, w, bias, act, slope, out);
    default:
      break;
  }
  if constexpr (kPlanarVectors > 2) switch (vectors) {
      case 3:
        return planar_tile<O, 3>(rows, channels, plane, w, bias, act, slope, out);
      case 4:
        return planar_tile<O, 4>(rows, channels, plane, w, bias, act, slope, out);
      default:
        return planar_tile<O, 5>(rows, channels, plane, w, bias, act, slope, out);
    }
}

}  // namespace

void load_planar(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t plane = ctx.o.cs, cs = ctx.a.cs, channels = ctx.a.c;
  float *block = ctx.own(), *spare = block + cs * L, *spatial = spare + cs * L;
  const float *gate = b.gate >= 0 ? ctx.arena + b.gate : nullptr;
  if (gate) spatial_rows(ctx, y, n, spatial);
  for (int64_t r = 0; r < n; ++r) {
    const float *in = ctx.a.at(y + r) + cs;
    float *out = ctx.o.at(y + r);
    for (int64_t x = 0; x < ctx.o.w; x += L) {
      transpose_pixels(in + x * cs, std::min<int64_t>(L, ctx.o.w - x), cs, block, L, spare);
      float *at = out + L + x;
      if (b.gate < 0) {
        for (int64_t c = 0; c < channels; ++c) V::load(block + c * L).store(at + c * plane);
        continue;
      }
      const int64_t size = channels / b.groups;
      for (int64_t g = 0; g < b.groups; ++g) {
        const V s = V::load(spatial + (r * b.groups + g) * (b.maps_row / (2 * b.groups)) + x);
        for (int64_t c = g * size; c < (g + 1) * size; ++c) {
          const V value = V::load(block + c * L), gated = value * V(gate[c]);
          V y = b.mode == 0 ? gated * s : fma(gated, s, value);
          if (b.mode == 2) y = activate<kRelu>(y, y);
          y.store(at + c * plane);
        }
      }
    }
    clear_margins(out, channels, plane, ctx.o.w);
  }
}

// Up to three convolutions, one per input. w0 is a table of 6 per part: input channels and output channels per group,
// groups, offsets of weights and bias, offset of the table of output channels.
void conv_planar(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const V slope(ctx.slope());
  const int64_t plane = ctx.o.cs;
  const Map *inputs[3] = {&ctx.a, &ctx.b, &ctx.c};
  for (int64_t r = 0; r < n; ++r) {
    float *row = ctx.o.at(y + r) + L;
    for (int64_t part = 0; part < b.p0; ++part) {
      const int32_t *shape = ctx.table(b.w0) + part * 6;
      const Map &in = *inputs[part];
      const int64_t channels = shape[0], outputs = shape[1];
      // Of many channels, fewer vectors at a time: what a tile reads is to stay in the L1 cache for the next one.
      const int64_t vectors = (ctx.o.w + L - 1) / L, most = channels > 16 && L == 16 ? 3 : kPlanarVectors;
      for (int64_t v = 0, width; v < vectors; v += width) {
        width = std::min(most, vectors - v);
        const float *w = ctx.weight(shape[3]), *bias = ctx.weight(shape[4]);
        const int32_t *order = ctx.table(shape[5]);
        for (int64_t g = 0; g < shape[2]; ++g) {
          const float *rows[3];
          for (int ky = 0; ky < 3; ++ky) {
            const int64_t i = y + r + ky - 1;
            rows[ky] = i < 0 || i >= in.h ? nullptr : in.at(i) + g * channels * plane + L + v * L;
          }
          for (int64_t first = 0, count; first < outputs; first += count) {
            count = outputs - first >= 4 ? 4 : outputs - first >= 2 ? 2 : 1;
            float *out[4];
            for (int64_t o = 0; o < count; ++o) out[o] = row + order[o] * plane + v * L;
            const auto run = count == 4 ? planar_vectors<4> : count == 2 ? planar_vectors<2> : planar_vectors<1>;
            run(static_cast<int>(width), rows, channels, plane, w, bias, static_cast<int>(b.act), slope, out);
            w += channels * 9 * count;
            bias += count;
            order += count;
          }
        }
      }
    }
    clear_margins(ctx.o.at(y + r), ctx.o.c, plane, ctx.o.w);
  }
}

namespace {

// store(m, acc[m]) with acc[m][n] = bias[n] + sum over k of a[m * Pixel + k * step] * w[n][k] for M pixels and N
// vectors; Pixel 0: `pixel` between pixels.
template <int M, int N, int64_t Pixel, class Store>
FF_INLINE void head_tile(const float *a, int64_t channels, int64_t pixel, int64_t step, const float *w,
                         const float *bias, int64_t first, const Store &store) {
  V acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[m][n] = V::load(bias + n * L);
  for (int64_t k = 0; k < channels; ++k) {
    V weight[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) weight[n] = V::load(w + (n * channels + k) * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V value(a[m * (Pixel ? Pixel : pixel) + k * step]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) acc[m][n] = fma(value, weight[n], acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store(first + m, acc[m]);
}

template <int N, int64_t Pixel, class Store>
void head_pixels(int64_t pixels, const float *a, int64_t channels, int64_t pixel, int64_t step, const float *w,
                 const float *bias, const Store &store) {
  constexpr int kMost = kRegisters == 32 ? 8 : 4;
  int64_t m = 0;
  const int64_t apart = Pixel ? Pixel : pixel;
  for (; m + kMost <= pixels; m += kMost)
    head_tile<kMost, N, Pixel>(a + m * apart, channels, pixel, step, w, bias, m, store);
  for (; m < pixels; ++m) head_tile<1, N, Pixel>(a + m * apart, channels, pixel, step, w, bias, m, store);
}

// In place, for pairs of logits: e^x / (e^x + e^y) = sigmoid(x - y).
void softmax_pairs(float *x, int64_t count) {
  const auto pairs = [](V value) {
#if defined(__AVX512F__)
    const V other = _mm512_permute_ps(value.v, 0xb1);
#elif defined(__AVX2__)
    const V other = _mm256_permute_ps(value.v, 0xb1);
#else
    V other = value;
    for (int j = 0; j < L; ++j) other.v[j] = value.v[j ^ 1];
#endif
    return sigmoid(value - other);
  };
  int64_t i = 0;
  for (; i + L <= count; i += L) pairs(V::load(x + i)).store(x + i);
  const int rest = static_cast<int>(count - i);
  if (rest > 0) pairs(V::load_first(x + i, rest)).store_first(x + i, rest);
}

}  // namespace

void write_predictions(const Context &ctx, int64_t anchor, int64_t count, const float *in, int64_t lanes) {
  const int64_t anchors = ctx.block->p0;
  for (int64_t m = 0; m < count; ++m, in += lanes, anchor += anchors) {
    std::memcpy(ctx.bbox + anchor * 4, in, anchors * 4 * sizeof(float));
    std::memcpy(ctx.cls + anchor * 2, in + anchors * 4, anchors * 2 * sizeof(float));
    std::memcpy(ctx.landmarks + anchor * 10, in + anchors * 6, anchors * 10 * sizeof(float));
  }
}

void finish_predictions(const Context &ctx, int64_t anchor) {
  if (ctx.block->p2) softmax_pairs(ctx.cls + anchor * 2, ctx.a.w * ctx.block->p0 * 2);
}

namespace {

// The outputs of pixels from anchor `first` on, stored as they are computed: two vectors are two anchors.
#if defined(__AVX512F__)
template <int64_t Pixel>
void head_pairs(const Context &ctx, const float *row, int64_t pixel, int64_t step, int64_t first) {
  const Block &b = *ctx.block;
  float *bbox = ctx.bbox + first * 4, *cls = ctx.cls + first * 2, *landmarks = ctx.landmarks + first * 10;
  const auto store = [&](int64_t x, const V(&outputs)[2]) {
    _mm256_storeu_ps(bbox + x * 8, _mm512_castps512_ps256(outputs[0].v));
    _mm_storeu_ps(cls + x * 4, _mm512_extractf32x4_ps(outputs[0].v, 2));
    _mm_storeu_ps(landmarks + x * 20, _mm512_extractf32x4_ps(outputs[0].v, 3));
    outputs[1].store(landmarks + x * 20 + 4);
  };
  head_pixels<2, Pixel>(ctx.a.w, row, ctx.a.c, pixel, step, ctx.weight(b.w0), ctx.weight(b.w1), store);
}
#endif

// The same for any number of anchors, by way of `buffer`.
template <int64_t Pixel>
void head_any(const Context &ctx, const float *row, int64_t pixel, int64_t step, int64_t first, float *buffer) {
  const Block &b = *ctx.block;
  const int64_t anchors = b.p0, lanes = (anchors * 16 + L - 1) / L * L, channels = ctx.a.c;
  for (int64_t x = 0; x < ctx.a.w; x += 16) {
    const int64_t pixels = std::min<int64_t>(16, ctx.a.w - x);
    for (int64_t v = 0; v < lanes; v += 2 * L) {
      const float *w = ctx.weight(b.w0) + v * channels, *bias = ctx.weight(b.w1) + v,
                  *at = row + x * (Pixel ? Pixel : pixel);
      const auto store = [&](int64_t m, const auto &outputs) {
        for (const V &output : outputs) output.store(buffer + m * lanes + v + (&output - &outputs[0]) * L);
      };
      if (v + L < lanes)
        head_pixels<2, Pixel>(pixels, at, channels, pixel, step, w, bias, store);
      else
        head_pixels<1, Pixel>(pixels, at, channels, pixel, step, w, bias, store);
    }
    write_predictions(ctx, first + x * anchors, pixels, buffer, lanes);
  }
}

template <int64_t Pixel>
void head_row(const Context &ctx, const float *row, int64_t pixel, int64_t step, int64_t first) {
#if defined(__AVX512F__)
  if (ctx.block->p0 == 2) return head_pairs<Pixel>(ctx, row, pixel, step, first);
#endif
  head_any<Pixel>(ctx, row, pixel, step, first, ctx.own());
}

}  // namespace

// w0 weights (vectors, channels, L) and w1 bias of p0 anchors times [4 box, 2 class, 10 landmark] outputs, boxes of all
// anchors first; p1 the first anchor of the level; p2 softmax of the classes; mode 1: the input is planar.
void head(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t anchors = b.p0, width = ctx.a.w, cs = ctx.a.cs;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t first = b.p1 + (y + r) * width * anchors;
    if (b.mode == 1)
      head_row<1>(ctx, ctx.a.at(y + r) + L, 1, cs, first);
    else
      head_row<0>(ctx, ctx.a.at(y + r) + cs, cs, 1, first);
    finish_predictions(ctx, first);
  }
}

// Planar rows: gate >= 0: g * a + (1 - g) * relu(b), g the scalar there; p0 steps of x += 0.1 tanh(x), x *= 1 + 0.1 i;
// channel c goes to table w0[c].
void mix(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t plane = ctx.o.cs;
  const int32_t *order = ctx.table(b.w0);
  const V g(b.gate >= 0 ? ctx.arena[b.gate] : 1.0f), rest = V(1.0f) - g;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < ctx.a.c; ++c) {
      const float *in = ctx.a.at(y + r) + c * plane + L;
      const float *other = b.gate >= 0 ? ctx.b.at(y + r) + c * plane + L : nullptr;
      float *out = ctx.o.at(y + r) + order[c] * plane + L;
      for (int64_t x = 0; x < ctx.o.w; x += L) {
        V value = V::load(in + x);
        if (other) {
          const V raw = V::load(other + x);
          value = fma(g, value, rest * activate<kRelu>(raw, raw));
        }
        enhanced(value, b.p0).store(out + x);
      }
    }
    clear_margins(ctx.o.at(y + r), ctx.o.c, plane, ctx.o.w);
  }
}

}  // namespace ff::engine

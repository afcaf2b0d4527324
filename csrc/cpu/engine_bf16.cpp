// Convolutions of the engine in bfloat16, on NHWC rows.
#include "engine_bf16.h"

#include <algorithm>

#include "engine_bf16_rows.h"
#include "engine_rows.h"

namespace ff::engine {
namespace {

#if !defined(FF_ENGINE_DOTS)
constexpr int64_t kPanelChannels = 2 * kTileChannels;

// M strips times N tiles of channels, into (M, 16, 32) floats.
template <int M, int N>
void panel(const TileLayer &layer, const Strip *strips, const bf16 *w, const float *bias, float *out) {
  constexpr int64_t kRow = kTileDepth * sizeof(bf16);
  tile_load<0>(bias, 0);
  if constexpr (N > 1) tile_load<1>(bias + kTileChannels, 0);
  if constexpr (M > 1) tile_load<2>(bias, 0);
  if constexpr (M > 1 && N > 1) tile_load<3>(bias + kTileChannels, 0);
  for (int64_t s = 0; s < layer.steps; ++s, w += N * kTileWeights) {
    const int64_t stride = layer.strides[s] * sizeof(bf16);
    tile_load<4>(strips[0].a[s], stride);
    tile_load<6>(w, kRow);
    tile_multiply<0, 4, 6>();
    if constexpr (N > 1) {
      tile_load<7>(w + kTileWeights, kRow);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (M > 1) {
      tile_load<5>(strips[1].a[s], stride);
      tile_multiply<2, 5, 6>();
      if constexpr (N > 1) tile_multiply<3, 5, 7>();
    }
  }
  constexpr int64_t kOut = kPanelChannels * sizeof(float);
  tile_store<0>(out, kOut);
  if constexpr (N > 1) tile_store<1>(out + kTileChannels, kOut);
  if constexpr (M > 1) tile_store<2>(out + kTilePixels * kPanelChannels, kOut);
  if constexpr (M > 1 && N > 1) tile_store<3>(out + kTilePixels * kPanelChannels + kTileChannels, kOut);
}

template <class Activation>
FF_INLINE void finish(const float *in, int pixels, int channels, bf16 *out, int64_t stride, Activation act) {
  if (channels == kPanelChannels) {
    for (int p = 0; p < pixels; ++p, in += kPanelChannels, out += stride)
#pragma GCC unroll 4
      for (int i = 0; i < kPanelChannels; i += 2 * L) narrow(act(V::load(in + i)), act(V::load(in + i + L)), out + i);
  } else if (channels == kTileChannels) {
    for (int p = 0; p < pixels; ++p, in += kPanelChannels, out += stride)
#pragma GCC unroll 4
      for (int i = 0; i < kTileChannels; i += L) narrow(act(V::load(in + i)), out + i);
  } else if (channels == 8) {
    for (int p = 0; p < pixels; ++p, in += kPanelChannels, out += stride) {
      bf16 row[kTileChannels];
#pragma GCC unroll 4
      for (int i = 0; i < kTileChannels; i += L) narrow(act(V::load(in + i)), row + i);
      std::memcpy(out, row, 8 * sizeof(bf16));
    }
  } else {
    for (int p = 0; p < pixels; ++p, in += kPanelChannels, out += stride) {
      bf16 row[kPanelChannels];
#pragma GCC unroll 8
      for (int i = 0; i < kPanelChannels; i += L) narrow(act(V::load(in + i)), row + i);
      std::memcpy(out, row, channels * sizeof(bf16));
    }
  }
}

template <class Activation>
FF_INLINE void finish(const float *in, int pixels, int channels, float *out, int64_t stride, Activation act) {
  for (int p = 0; p < pixels; ++p, in += kPanelChannels, out += stride)
    for (int i = 0; i < channels; i += L) act(V::load(in + i)).store_first(out + i, std::min(L, channels - i));
}

// Activates and stores what panel() has left for `count` strips.
void finish_strips(const TileLayer &layer, const Strip *strips, int count, int64_t tile, const float *sums) {
  const int channels = tile + 2 >= layer.tiles ? layer.last : kPanelChannels;
  const int64_t at = tile * kTileChannels;
  with_activation(layer.act, layer.slope, [&](auto act) {
    for (int m = 0; m < count; ++m) {
      const float *in = sums + m * kTilePixels * kPanelChannels;
      if (layer.as_float)
        finish(in, strips[m].pixels, channels, static_cast<float *>(strips[m].out) + at, layer.out_stride, act);
      else
        finish(in, strips[m].pixels, channels, static_cast<bf16 *>(strips[m].out) + at, layer.out_stride, act);
    }
  });
}

#endif

}  // namespace

#if !defined(FF_ENGINE_DOTS)
void multiply_tiles(const TileLayer &layer, const Strip *strips, int count) {
  alignas(64) float sums[2 * kTilePixels * kPanelChannels];
  const bf16 *w = layer.weights;
  for (int64_t tile = 0; tile < layer.tiles; tile += 2) {
    const bool two = tile + 1 < layer.tiles;
    const float *bias = layer.bias + tile * kTileChannels;
    for (int i = 0; i < count; i += 2) {
      if (i + 1 < count)
        (two ? panel<2, 2> : panel<2, 1>)(layer, strips + i, w, bias, sums);
      else
        (two ? panel<1, 2> : panel<1, 1>)(layer, strips + i, w, bias, sums);
      finish_strips(layer, strips + i, std::min(2, count - i), tile, sums);
    }
    w += layer.steps * (two ? 2 : 1) * kTileWeights;
  }
}
#endif

namespace {

TileLayer layer_of(const Context &ctx) {
  const Block &b = *ctx.block;
  return TileLayer{0,
                   nullptr,
                   nullptr,
                   reinterpret_cast<const bf16 *>(ctx.weight(b.w1)),
                   ctx.weight(b.w2),
                   b.p0,
                   static_cast<int>(b.act),
                   V(ctx.slope()),
                   ctx.o.cs,
                   static_cast<int>(b.p2),
                   b.p5 == 1};
}

void *output(const Context &ctx, int64_t y, int64_t x) {
  const int64_t at = (x + 1) * ctx.o.cs + ctx.block->p1;
  float *row = ctx.o.at(y);
  return ctx.block->p5 == 1 ? static_cast<void *>(row + at) : static_cast<void *>(reinterpret_cast<bf16 *>(row) + at);
}

// Pixel x of row i of a map; outside there are zeros.
const bf16 *input(const Context &ctx, const Map &map, int64_t i, int64_t x) {
  if (i >= 0 && i < map.h) return pixels(map, i) + x * map.cs;
  return reinterpret_cast<const bf16 *>(ctx.weight(ctx.block->w3));
}

void finish_rows(const Context &ctx, int64_t y, int64_t n) {
  if (ctx.block->p5 == 1) {
    for (int64_t r = 0; r < n; ++r) clear_border(ctx.o, y + r);
    return;
  }
  for (int64_t r = 0; r < n; ++r) {
    pool_row_bf16(ctx, y + r);
    clear_border_bf16(ctx.o, y + r);
  }
}

#if !defined(FF_ENGINE_DOTS)
// Depthwise 3x3 of the even or odd channels of R rows and four pixels per row.
template <int Odd, int S, int R>
FF_INLINE void depthwise_tile(const bf16 *const *rows, int64_t offset, int64_t cs, const float *weights, bf16 *out,
                              int64_t out_row, int64_t out_pixel, int act, V slope) {
  constexpr int kColumns = 4;
  V w[9], acc[R][kColumns];
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) w[i] = V::load(weights + i * L);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < kColumns; ++x) acc[r][x] = V::load(weights + 9 * L);
#pragma GCC unroll 8
  for (int i = 0; i < (R - 1) * S + 3; ++i) {
    const bf16 *row = rows[i] + offset;
#pragma GCC unroll 16
    for (int j = 0; j < (kColumns - 1) * S + 3; ++j) {
      const V value = widen_every_other<Odd>(row + j * cs);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int ky = i - r * S;
        if (ky < 0 || ky > 2) continue;
#pragma GCC unroll 4
        for (int x = 0; x < kColumns; ++x) {
          const int kx = j - x * S;
          if (kx >= 0 && kx <= 2) acc[r][x] = fma(value, w[ky * 3 + kx], acc[r][x]);
        }
      }
    }
  }
  with_activation(act, slope, [&](auto activation) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int x = 0; x < kColumns; ++x) narrow(activation(acc[r][x]), out + r * out_row + x * out_pixel + Odd * L);
  });
}

// R rows of up to 16 pixels. `weights` is (channels / 2 L, 2, 10, L): nine taps and the bias of the even channels of a
// block, then of the odd; so is the output's order of channels.
template <int S, int R>
void depthwise(const bf16 *const *rows, int columns, int64_t cs, int64_t unit, const float *weights, bf16 *out,
               int64_t out_row, int act, V slope) {
  for (int64_t v = 0; v < cs; v += 2 * L, weights += 20 * L)
    for (int x = 0; x < columns; x += 4) {
      bf16 *at = out + x * unit + v;
      depthwise_tile<0, S, R>(rows, v + x * S * cs, cs, weights, at, out_row, unit, act, slope);
      depthwise_tile<1, S, R>(rows, v + x * S * cs, cs, weights + 10 * L, at, out_row, unit, act, slope);
    }
}

// The depthwise half of a separable block for strips of 16 pixels from `x` on, `joined` of the map's in each, into
// (n, 16, depth). Few channels: the depthwise convolution is a dense one of tiles (w0, bias p3).
void depthwise_strips(const Context &ctx, int64_t y, int64_t n, int64_t x, int columns, int64_t depth, bf16 *out) {
  const Block &b = *ctx.block;
  const int64_t s = b.stride, cs = ctx.a.cs, joined = std::max<int64_t>(b.p4, 1), row_size = kTilePixels * depth;
  const int act = static_cast<int>(b.mode);
  const V slope(ctx.slope());
  const bf16 *rows[2 * kMaxRows + 1];
  for (int64_t i = 0; i < (n - 1) * s + 3; ++i) rows[i] = input(ctx, ctx.a, y * s - 1 + i, x * joined * s - 1);
  if (b.p4 > 0) {
    const int64_t steps = (((joined - 1) * s + 3) * cs + kTileDepth - 1) / kTileDepth;
    Strip strips[kMaxRows];
    const bf16 *taps[kMaxRows][6];
    int64_t strides[6];
    std::fill(strides, strides + 6, joined * s * cs);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = 0; i < 3 * steps; ++i) taps[r][i] = rows[r * s + i / steps] + i % steps * kTileDepth;
      strips[r] = Strip{taps[r], out + r * row_size, columns};
    }
    const TileLayer layer{3 * steps,
                          strides,
                          nullptr,
                          reinterpret_cast<const bf16 *>(ctx.weight(b.w0)),
                          ctx.weight(b.p3),
                          1,
                          act,
                          slope,
                          depth,
                          kTileChannels,
                          false};
    multiply_tiles(layer, strips, static_cast<int>(n));
    return;
  }
  const float *w = ctx.weight(b.w0);
  int64_t r = 0;
  if (s == 1) {
    for (; r + 4 <= n; r += 4)
      depthwise<1, 4>(rows + r, columns, cs, depth, w, out + r * row_size, row_size, act, slope);
    for (; r + 2 <= n; r += 2)
      depthwise<1, 2>(rows + r, columns, cs, depth, w, out + r * row_size, row_size, act, slope);
    for (; r < n; ++r) depthwise<1, 1>(rows + r, columns, cs, depth, w, out + r * row_size, row_size, act, slope);
  } else {
    for (; r + 2 <= n; r += 2)
      depthwise<2, 2>(rows + 2 * r, columns, cs, depth, w, out + r * row_size, row_size, act, slope);
    for (; r < n; ++r) depthwise<2, 1>(rows + 2 * r, columns, cs, depth, w, out + r * row_size, row_size, act, slope);
  }
}
#endif

}  // namespace

#if defined(FF_ENGINE_DOTS)
void separable_bf16(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t s = b.stride, cs = ctx.a.cs, row_size = kTilePixels * cs;
  const bool packed = cs == 8 && s == 1;
  auto *buffer = reinterpret_cast<bf16 *>(ctx.own());  // (n, 16, cs); packed: (n, 2, 16, 4)
  TileLayer layer = layer_of(ctx);
  const int64_t strides[2] = {packed ? 4 : cs, 4}, pairs[2] = {packed ? 2 : cs / 2, 2};
  layer.steps = packed ? 2 : 1, layer.strides = strides, layer.pairs = pairs;
  const bf16 *rows[2 * kMaxRows + 1];
  for (int64_t i = 0; i < (n - 1) * s + 3; ++i) rows[i] = input(ctx, ctx.a, y * s - 1 + i, -1);
  const Depthwise depthwise{ctx.weight(b.w0), cs, s, static_cast<int>(b.mode), V(ctx.slope())};
  for (int64_t x = 0; x < ctx.o.w; x += kTilePixels) {
    const int columns = static_cast<int>(std::min<int64_t>(kTilePixels, ctx.o.w - x));
    const bf16 *from[2 * kMaxRows + 1];
    for (int64_t i = 0; i < (n - 1) * s + 3; ++i) {
      const int64_t row = y * s - 1 + i;
      from[i] = rows[i] + (row >= 0 && row < ctx.a.h ? x * s * cs : 0);
    }
    multiply_depthwise(depthwise, from, n, columns, buffer, row_size);
    Strip strips[kMaxRows];
    const bf16 *taps[kMaxRows][2];
    for (int64_t r = 0; r < n; ++r) {
      taps[r][0] = buffer + r * row_size, taps[r][1] = taps[r][0] + row_size / 2;
      strips[r] = Strip{taps[r], output(ctx, y + r, x), columns};
      if (b.p5 > 1) multiply_permuted(layer, b.p5 / 2, strips[r]);
    }
    if (b.p5 == 0) multiply_tiles(layer, strips, static_cast<int>(n));
  }
  finish_rows(ctx, y, n);
}
#else
// Few channels: p4 pixels make one of 16 numbers.
void separable_bf16(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t joined = std::max<int64_t>(b.p4, 1), depth = std::max<int64_t>(ctx.a.cs, kTileDepth);
  const int64_t columns = (ctx.o.w + joined - 1) / joined, row_size = kTilePixels * depth;
  auto *buffer = reinterpret_cast<bf16 *>(ctx.own());  // (n, 16, depth)
  if (b.p4 > 0) std::memset(buffer, 0, n * row_size * sizeof(bf16));
  TileLayer layer = layer_of(ctx);
  int64_t strides[8];
  std::fill(strides, strides + 8, depth);
  layer.steps = depth / kTileDepth, layer.strides = strides, layer.out_stride = joined * ctx.o.cs;
  for (int64_t x = 0; x < columns; x += kTilePixels) {
    const int count = static_cast<int>(std::min<int64_t>(kTilePixels, columns - x));
    depthwise_strips(ctx, y, n, x, count, depth, buffer);
    Strip strips[kMaxRows];
    const bf16 *taps[kMaxRows][8];
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = 0; i < layer.steps; ++i) taps[r][i] = buffer + r * row_size + i * kTileDepth;
      strips[r] = Strip{taps[r], output(ctx, y + r, x * joined), count};
    }
    multiply_tiles(layer, strips, static_cast<int>(n));
  }
  finish_rows(ctx, y, n);
}
#endif

#if defined(FF_ENGINE_DOTS)
namespace {

void conv_grouped(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t cs = ctx.a.cs;
  const Grouped layer{static_cast<Grouping>(b.p4),
                      reinterpret_cast<const bf16 *>(ctx.weight(b.w1)),
                      ctx.weight(b.w2),
                      static_cast<int>(b.act),
                      V(ctx.slope()),
                      ctx.o.cs,
                      b.p3 == 1};
  for (int64_t r = 0; r < n; ++r) {
    const bf16 *rows[3];
    int64_t next[3];
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t row = y + r - 1 + ky;
      rows[ky] = input(ctx, ctx.a, row, -1);
      next[ky] = row < 0 || row >= ctx.a.h ? 0 : kGroupedPixels * cs;
    }
    for (int64_t x = 0; x < ctx.o.w; x += kGroupedPixels) {
      const int count = static_cast<int>(std::min<int64_t>(kGroupedPixels, ctx.o.w - x));
      multiply_groups(layer, rows, count, static_cast<bf16 *>(output(ctx, y + r, x)));
      for (int ky = 0; ky < 3; ++ky) rows[ky] += next[ky];
    }
  }
  finish_rows(ctx, y, n);
}

}  // namespace
#endif

// Of up to three inputs side by side; of one that is gated as it is read, if it is 1x1. Pixels of a row of the kernel
// are one run of numbers, cut into steps of 32.
void conv_bf16(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
#if defined(FF_ENGINE_DOTS)
  if (b.p4 != kDense) return conv_grouped(ctx, y, n);
#endif
  const int64_t s = b.stride, k = b.kernel;
  TileLayer layer = layer_of(ctx);
  const bool gated = b.gate >= 0;
  const int64_t gated_row = kTilePixels * ctx.a.cs;
  float *spatial = ctx.own();
  auto *buffer = reinterpret_cast<bf16 *>(spatial + (gated ? n * b.maps_row : 0));
  if (gated) spatial_rows_bf16(ctx, y, n, spatial);
  const Map *inputs[3] = {&ctx.a, gated ? nullptr : &ctx.b, gated ? nullptr : &ctx.c};
  int64_t strides[kMaxSteps], pairs[kMaxSteps], next[kMaxRows][kMaxSteps];  // from one strip to the next
  const bf16 *taps[kMaxRows][kMaxSteps];
  layer.strides = strides, layer.pairs = pairs;
  for (int64_t r = 0; r < n; ++r) {
    int64_t steps = 0;
    for (const Map *in : inputs) {
      if (in == nullptr || in->base == nullptr) continue;
      for (int64_t ky = 0; ky < k; ++ky) {
        const int64_t row = (y + r) * s - k / 2 + ky;
        const bf16 *run = gated ? buffer + r * gated_row : input(ctx, *in, row, -(k / 2));
        for (int64_t i = 0; i < k * in->cs; i += kMaxRun, ++steps) {
          taps[r][steps] = run + i;
          pairs[steps] = std::min(kMaxRun, k * in->cs - i) / 2;
          strides[steps] = s * in->cs;
          next[r][steps] = gated || row < 0 || row >= in->h ? 0 : kTilePixels * strides[steps];
        }
      }
    }
    layer.steps = steps;
  }
  for (int64_t x = 0; x < ctx.o.w; x += kTilePixels) {
    const int columns = static_cast<int>(std::min<int64_t>(kTilePixels, ctx.o.w - x));
    Strip strips[kMaxRows];
    for (int64_t r = 0; r < n; ++r) {
      if (gated) gate_pixels_bf16(ctx, y + r, x, columns, spatial + r * b.maps_row, buffer + r * gated_row);
      strips[r] = Strip{taps[r], output(ctx, y + r, x), columns};
    }
    multiply_tiles(layer, strips, static_cast<int>(n));
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < layer.steps; ++i) taps[r][i] += next[r][i];
  }
  finish_rows(ctx, y, n);
}

}  // namespace ff::engine

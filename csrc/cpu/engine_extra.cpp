// Deformable convolution and the mixing of maps between levels.
#include <algorithm>
#include <cmath>

#include "engine.h"
#include "engine_gemm.h"
#include "engine_rows.h"

namespace ff::engine {
namespace {

// What one tap of one output pixel reads: four neighbours, those outside the image being a pixel of zeros.
struct Sample {
  const float *pixel[4];
  float weight[4];
};

Sample bilinear(const Map &map, float row, float column, float mask) {
  const float top = std::floor(row), left = std::floor(column), down = row - top, right = column - left;
  // The comparisons are false for NaN, whose weights then make the result NaN.
  const int64_t y = top >= -1 && top < float(map.h) ? int64_t(top) : -2;
  const int64_t x = left >= -1 && left < float(map.w) ? int64_t(left) : -2;
  Sample s;
  for (int i = 0; i < 4; ++i) {
    const int64_t yi = y + i / 2, xi = x + i % 2;
    const bool inside = y > -2 && x > -2 && yi >= 0 && yi < map.h && xi >= 0 && xi < map.w;
    s.pixel[i] = inside ? map.at(yi) + (xi + 1) * map.cs : map.base;
    s.weight[i] = (i / 2 ? down : 1 - down) * (i % 2 ? right : 1 - right) * mask;
  }
  return s;
}

}  // namespace

// a: the image; b: its offsets, channels p4 + 2 k (dy) and p4 + 2 k + 1 (dx), and modulators, p5 + k, before the
// sigmoid.
void deform(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t cs = ctx.a.cs, stride = 9 * cs;
  float *buffer = ctx.own();
  for (int64_t r = 0; r < n; ++r) {
    float *row;
    output_rows(ctx, y + r, 1, &row);
    for (int64_t x = 0; x < ctx.o.w; x += b.tile) {
      const int columns = static_cast<int>(std::min(b.tile, ctx.o.w - x));
      for (int i = 0; i < columns; ++i) {
        const float *field = ctx.b.at(y + r) + (x + i + 1) * ctx.b.cs, *offset = field + b.p4;
        float mask[2 * L + 16];
        for (int k = 0; k < 9; k += L) {
          const V raw = V::load_first(field + b.p5 + k, std::min(L, 9 - k));
          (V(2.0f) * sigmoid(raw)).store(mask + k);
        }
        for (int k = 0; k < 9; ++k) {
          const Sample s = bilinear(ctx.a, float(y + r + k / 3 - 1) + offset[2 * k],
                                    float(x + i + k % 3 - 1) + offset[2 * k + 1], mask[k]);
          float *out = buffer + i * stride + k * cs;
          for (int64_t v = 0; v < cs; v += L) {
            V value = V::load(s.pixel[0] + v) * V(s.weight[0]);
            for (int j = 1; j < 4; ++j) value = fma(V::load(s.pixel[j] + v), V(s.weight[j]), value);
            value.store(out + v);
          }
        }
      }
      const float *taps[9];
      for (int k = 0; k < 9; ++k) taps[k] = buffer + k * cs;
      store_panels(ctx, taps, 1, 0, 9, ctx.a.c, stride, &row, x, columns);
      pool_tile(ctx, y + r, 1, x, columns);
    }
    clear_border(ctx.o, y + r);
  }
}

// Channel c: a[c] + w0[0] * mean of the channels c k .. c k + k - 1 of b.
void reuse(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const int64_t channels = ctx.a.c, cs = ctx.a.cs, chunk = ctx.b.c / channels;
  const float scale = ctx.weight(b.w0)[0] / float(chunk);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t x = 0; x < ctx.o.w; ++x) {
      const float *in = ctx.a.at(y + r) + (x + 1) * cs, *raw = ctx.b.at(y + r) + (x + 1) * ctx.b.cs;
      float *out = ctx.o.at(y + r) + (x + 1) * ctx.o.cs;
      for (int64_t c = 0; c < channels; ++c) {
        float sum = 0;
        for (int64_t i = 0; i < chunk; ++i) sum += raw[c * chunk + i];
        out[c] = in[c] + scale * sum;
      }
      for (int64_t c = channels; c < cs; ++c) out[c] = 0;
    }
    pool_tile(ctx, y + r, 1, 0, ctx.o.w);
    clear_border(ctx.o, y + r);
  }
}

namespace {

// Neighbours and weight of the second, as torch interpolates bilinearly with align_corners=False, in float32.
struct Between {
  int64_t low, high;
  float part;
  Between(int64_t at, int64_t in, int64_t out) {
    const float source = std::max(float(in) / float(out) * (float(at) + 0.5f) - 0.5f, 0.0f);
    low = std::min<int64_t>(int64_t(source), in - 1);
    high = std::min(low + 1, in - 1);
    part = std::min(std::max(source - float(low), 0.0f), 1.0f);
  }
};

void add_bilinear(const Map &in, float scale, const Map &out, int64_t y, float *row) {
  const Between rows(y, in.h, out.h);
  const float *top = in.at(rows.low) + in.cs, *bottom = in.at(rows.high) + in.cs;
  for (int64_t x = 0; x < out.w; ++x) {
    const Between columns(x, in.w, out.w);
    const int64_t left = columns.low * in.cs, right = columns.high * in.cs;
    const V w00((1 - rows.part) * (1 - columns.part)), w01((1 - rows.part) * columns.part);
    const V w10(rows.part * (1 - columns.part)), w11(rows.part * columns.part);
    for (int64_t v = 0; v < out.cs; v += L) {
      V value = V::load(top + left + v) * w00;
      value = fma(V::load(top + right + v), w01, value);
      value = fma(V::load(bottom + left + v), w10, value);
      value = fma(V::load(bottom + right + v), w11, value);
      float *at = row + x * out.cs + v;
      fma(value, V(scale), V::load(at)).store(at);
    }
  }
}

}  // namespace

// a + w0[0] * b resized to a + w0[1] * c resized to a.
void blend(const Context &ctx, int64_t y, int64_t n) {
  const Block &b = *ctx.block;
  const float *scale = ctx.weight(b.w0);
  for (int64_t r = 0; r < n; ++r) {
    float *row = ctx.o.at(y + r) + ctx.o.cs;
    std::memcpy(row, ctx.a.at(y + r) + ctx.a.cs, ctx.o.w * ctx.o.cs * sizeof(float));
    add_bilinear(ctx.b, scale[0], ctx.o, y + r, row);
    if (ctx.c.base) add_bilinear(ctx.c, scale[1], ctx.o, y + r, row);
    pool_tile(ctx, y + r, 1, 0, ctx.o.w);
    clear_border(ctx.o, y + r);
  }
}

}  // namespace ff::engine

// Pieces that several kinds of blocks share.
#pragma once
#include "engine.h"

namespace ff::engine {

// Rows that a block makes at a time, at most.
constexpr int64_t kMaxRows = 4;

// Zeros for the pixels x = -1 and x = w of row y.
void clear_border(const Map &map, int64_t y);

// Where rows [y, y + n) of the output begin, at pixel 0 and the block's first channel (p1).
void output_rows(const Context &ctx, int64_t y, int64_t n, float **rows);

// Multiplies tiles with the block's packed 1x1 or k x k weights and stores them from pixel x of the rows `out` on. Row
// r reads tap t at a[t + r * p3] + r * a_row; pixels are `stride` apart. Fields: p0 vectors of output channels, p2
// lanes stored of the last vector, w1 weights, w2 bias.
void store_panels(const Context &ctx, const float *const *a, int64_t rows, int64_t a_row, int64_t taps,
                  int64_t channels, int64_t stride, float *const *out, int64_t x, int columns);

// Adds the tile to the sum and maximum of each row and channel, where the block is asked for them.
void pool_tile(const Context &ctx, int64_t y, int64_t n, int64_t x, int64_t columns);

// The spatial gate of rows [y, y + n): sigmoid(conv7x7(maps)), (n, groups, plane).
void spatial_rows(const Context &ctx, int64_t y, int64_t n, float *out);

// x * channel gate * spatial gate, or relu of that plus x, for pixels [x, x + columns) of row y of input a.
void gate_pixels(const Context &ctx, int64_t y, int64_t x, int64_t columns, const float *spatial, float *out,
                 int64_t stride);

// Up to L pixels of cs channels -> (cs, plane); missing pixels are zero. `spare` holds L * cs floats.
void transpose_pixels(const float *in, int64_t pixels, int64_t cs, float *out, int64_t plane, float *spare);

// Copies what a head predicts for `count` pixels, `lanes` floats each, into the outputs from an anchor on.
void write_predictions(const Context &ctx, int64_t anchor, int64_t count, const float *in, int64_t lanes);

// Softmax of a row of the outputs, from its first anchor on, where the block is asked for it.
void finish_predictions(const Context &ctx, int64_t anchor);

}  // namespace ff::engine

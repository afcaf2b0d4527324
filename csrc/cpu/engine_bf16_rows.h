// Pieces that several kinds of bfloat16 blocks share.
#pragma once
#include "engine_bf16.h"

namespace ff::engine {

// Sum and maximum of each channel over row y of the output, where the block is asked for them.
void pool_row_bf16(const Context &ctx, int64_t y);

// Distance of two planes of the maps behind a spatial gate, in bfloat16, and of two planes of gates, in float32. Pixel
// x of a map is at kMapMargin + x.
constexpr int64_t kMapMargin = 3;
inline int64_t map_plane(const Block &b) { return b.maps_row / b.groups; }

// The spatial gate of rows [y, y + n): sigmoid(conv7x7(maps)), (n, groups, plane).
void spatial_rows_bf16(const Context &ctx, int64_t y, int64_t n, float *out);

// x * channel gate * spatial gate, that plus a residual, or relu of that, for pixels [x, x + columns) of row y of
// input a; spatial is (groups, plane).
void gate_pixels_bf16(const Context &ctx, int64_t y, int64_t x, int64_t columns, const float *spatial, bf16 *out);

}  // namespace ff::engine

// A plan as the executor sees it: rows of int64_t, one per block. See docs/engine.md.
//
// A block makes rows of one map from rows of others. Consecutive blocks form a step, run depth first: each thread owns
// a band of the rows of the step's last block and pulls from the blocks before it what these rows need, a few rows at a
// time, through ring buffers in its own scratch. Only the last block of a step writes where other steps read.
//
// Maps are NHWC with a border: pixel (y, x) of a map is at base + (y % ring) * row + (x + 1) * cs, its channels padded
// with zeros to cs, and the pixels x = -1 and x = w are zero. Planar rows keep channel c at c * plane, x at L + x.
// Offsets and strides count floats, cs numbers of the map's type; those into `weights` too, where tables of int32_t are
// stored by their bits.
#pragma once
#include <cstdint>
#include <cstring>

namespace ff::engine {

enum Kind {
  kStem,        // image -> 3x3 stride 2 convolution, activation
  kSeparable,   // 3x3 depthwise, activation, 1x1, activation
  kConv,        // k x k convolution, activation; 1x1 may gate its input first
  kFuse,        // silu of the weighted sum of up to three resampled maps
  kGate,        // pooled rows -> channel gate (one task, not rows)
  kMaps,        // mean and maximum over each group of gated channels, as planar rows
  kApply,       // gated map
  kLoadPlanar,  // NHWC rows, gated or not -> planar rows
  kConvPlanar,  // grouped 3x3 on planar rows
  kHead,        // 1x1 predictors -> rows of the outputs
  kDeform,      // DCNv2
  kReuse,       // a + scale * mean of channel chunks of b
  kBlend,       // a + weighted bilinear resampling of up to two others
  kMix,         // g * a + (1 - g) * relu(b), and progressive enhancement
  kStemBf16,    // the same with bfloat16 maps
  kSeparableBf16,
  kConvBf16,  // of up to three inputs side by side
  kFuseBf16,
  kMapsBf16,
  kApplyBf16,
  kHeadBf16,
  kMixBf16,
  kToFloat,  // a bfloat16 map as float32, and back
  kToBf16,
  kKinds
};

#define FF_ENGINE_MAP(X, m) X(m##_block) X(m##_base) X(m##_row) X(m##_ring) X(m##_h) X(m##_w) X(m##_c) X(m##_cs)

// a, b, c: inputs; m_block is the index of the block that makes it, counted from the step's first, or -1 for a map in
// the arena. o: the output; o_block is 1 for a ring in scratch, 0 for a map in the arena.
// clang-format off
#define FF_ENGINE_FIELDS(X)                                                                                           \
  X(kind) X(last) X(sync) X(rows) X(tile) X(stride) X(kernel) X(pad) X(act) X(slope)                                  \
  FF_ENGINE_MAP(X, a) FF_ENGINE_MAP(X, b) FF_ENGINE_MAP(X, c) FF_ENGINE_MAP(X, o)                                     \
  X(w0) X(w1) X(w2) X(w3) X(scratch) X(pool) X(gate) X(maps) X(maps_row) X(groups) X(spatial) X(mode)                 \
  X(p0) X(p1) X(p2) X(p3) X(p4) X(p5)
// clang-format on

struct Block {
#define FF_ENGINE_FIELD(name) int64_t name;
  FF_ENGINE_FIELDS(FF_ENGINE_FIELD)
#undef FF_ENGINE_FIELD
};

struct Map {
  float *base;
  int64_t row, ring, h, w, c, cs;
  float *at(int64_t y) const { return base + (y % ring) * row; }
};

// Where the pixels of an image lie, in bytes and pixels: images `image_bytes` apart, rows `row_bytes` apart; the
// network's input is zero beyond the h x w pixels from (top, left) on.
struct Picture {
  int64_t image_bytes, row_bytes, h, w, top, left;
};

// What a block's rows are made with: one thread's view of one image.
struct Context {
  const Block *block;
  float *arena, *scratch;
  const float *weights;
  const char *image;
  const Picture *picture;
  float *bbox, *cls, *landmarks;
  Map a, b, c, o;

  const float *weight(int64_t offset) const { return weights + offset; }
  const int32_t *table(int64_t offset) const { return reinterpret_cast<const int32_t *>(weights + offset); }
  float *own() const { return scratch + block->scratch; }
  float slope() const {
    double value;
    std::memcpy(&value, &block->slope, sizeof value);
    return static_cast<float>(value);
  }
};

// Rows [y, y + n) of the block's output.
using Produce = void (*)(const Context &, int64_t y, int64_t n);
void stem(const Context &, int64_t y, int64_t n);
void separable(const Context &, int64_t y, int64_t n);
void conv(const Context &, int64_t y, int64_t n);
void fuse(const Context &, int64_t y, int64_t n);
void gate(const Context &, int64_t y, int64_t n);
void maps(const Context &, int64_t y, int64_t n);
void apply(const Context &, int64_t y, int64_t n);
void load_planar(const Context &, int64_t y, int64_t n);
void conv_planar(const Context &, int64_t y, int64_t n);
void head(const Context &, int64_t y, int64_t n);
void deform(const Context &, int64_t y, int64_t n);
void reuse(const Context &, int64_t y, int64_t n);
void blend(const Context &, int64_t y, int64_t n);
void mix(const Context &, int64_t y, int64_t n);
void stem_bf16(const Context &, int64_t y, int64_t n);
void separable_bf16(const Context &, int64_t y, int64_t n);
void conv_bf16(const Context &, int64_t y, int64_t n);
void fuse_bf16(const Context &, int64_t y, int64_t n);
void maps_bf16(const Context &, int64_t y, int64_t n);
void apply_bf16(const Context &, int64_t y, int64_t n);
void head_bf16(const Context &, int64_t y, int64_t n);
void mix_bf16(const Context &, int64_t y, int64_t n);
void to_float(const Context &, int64_t y, int64_t n);
void to_bf16(const Context &, int64_t y, int64_t n);

}  // namespace ff::engine

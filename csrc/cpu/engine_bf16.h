// bfloat16 in the engine: conversions, and products with float32 sums. With AMX (libffcpu_amx) these are products of
// tiles, which are registers. With AVX512-BF16 alone (libffcpu_avx512_bf16) they are dot products of pairs of numbers.
// Elsewhere the code for tiles runs on arrays, slowly, so that every machine can test it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "engine.h"
#include "engine_math.h"

namespace ff::engine {

using bf16 = uint16_t;  // the upper half of a float32

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define FF_ENGINE_DOTS
constexpr bool kDots = true;
#else
constexpr bool kDots = false;
#endif

constexpr int kTilePixels = 16, kTileDepth = 32, kTileChannels = 16;
constexpr int64_t kTileWeights = kTileDepth * kTileChannels;

namespace detail {
typedef uint32_t Words __attribute__((vector_size(FF_VECTOR_BYTES)));
typedef uint32_t WordsInMemory __attribute__((vector_size(FF_VECTOR_BYTES), aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(FF_VECTOR_BYTES / 2)));
typedef uint16_t HalvesInMemory __attribute__((vector_size(FF_VECTOR_BYTES / 2), aligned(2), may_alias));

// Rounded to the nearest, ties to even; a NaN stays one.
FF_INLINE Halves rounded(V x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh(x.v);
#else
  const Words bits = (Words)x.v;
  const Words near = bits + 0x7fff + ((bits >> 16) & 1);
  const Words kept = x.v == x.v ? near : (bits | 0x400000);
  return __builtin_convertvector(kept >> 16, Halves);
#endif
}
}  // namespace detail

// L numbers.
FF_INLINE V widen(const bf16 *p) {
  const auto halves = (detail::Halves) * reinterpret_cast<const detail::HalvesInMemory *>(p);
  return (V::Native)(__builtin_convertvector(halves, detail::Words) << 16);
}
FF_INLINE void narrow(V x, bf16 *p) { *reinterpret_cast<detail::HalvesInMemory *>(p) = detail::rounded(x); }

// 2 L numbers.
FF_INLINE void narrow(V first, V second, bf16 *p) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
#else
  narrow(first, p);
  narrow(second, p + L);
#endif
}

// Those of even or of odd index among 2 L numbers: cheaper than two of widen().
template <int Odd>
FF_INLINE V widen_every_other(const bf16 *p) {
  const auto words = (detail::Words) * reinterpret_cast<const detail::WordsInMemory *>(p);
  return (V::Native)(Odd ? words & 0xffff0000u : words << 16);
}

inline bf16 *pixels(const Map &map, int64_t y) { return reinterpret_cast<bf16 *>(map.at(y)) + map.cs; }

// Zeros for the pixel x = -1 and for 64 bytes or one pixel from x = w on, which tiles may read.
inline void clear_border_bf16(const Map &map, int64_t y) {
  bf16 *row = pixels(map, y);
  std::memset(row - map.cs, 0, map.cs * sizeof(bf16));
  std::memset(row + map.w * map.cs, 0, std::max<int64_t>(64, map.cs * 2));
}

// Eight tiles: 0 to 3 sums of 16 pixels x 16 channels, 4 and 5 pixels of 32 numbers, 6 and 7 weights of 32 x 16
// numbers, stored as 16 rows of pairs. While an object lives its thread may use them.
#if defined(FF_ENGINE_DOTS)

struct Tiles {
  static void configure(int = kTileDepth, int = kTilePixels) {}
};

#elif defined(__AMX_BF16__)

class Tiles {
 public:
  Tiles() { configure(); }
  ~Tiles() { asm volatile("tilerelease"); }
  // `pixels` of `depth` numbers, 16 or 32; weights have half as many rows of pairs.
  static void configure(int depth = kTileDepth, int pixels = kTilePixels) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int i = 0; i < 8; ++i) layout.bytes[i] = 64, layout.rows[i] = 16;
    for (int i = 0; i < 6; ++i) layout.rows[i] = static_cast<uint8_t>(pixels);
    for (int i = 4; i < 6; ++i) layout.bytes[i] = static_cast<uint16_t>(2 * depth);
    for (int i = 6; i < 8; ++i) layout.rows[i] = static_cast<uint8_t>(depth / 2);
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }
};

template <int T>
FF_INLINE void tile_load(const void *p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride_bytes), "i"(T) : "memory");
}
template <int T>
FF_INLINE void tile_store(float *p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
FF_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

struct TileArrays {
  int depth, pixels_used;
  float sums[4][kTilePixels][kTileChannels];
  bf16 pixels[2][kTilePixels][kTileDepth];
  bf16 weights[2][kTileDepth / 2][kTileChannels][2];
};
inline TileArrays &tile_arrays() {
  static thread_local TileArrays arrays;
  return arrays;
}

class Tiles {
 public:
  Tiles() { configure(); }
  static void configure(int depth = kTileDepth, int pixels = kTilePixels) {
    tile_arrays().depth = depth;
    tile_arrays().pixels_used = pixels;
  }
};

template <int T>
void tile_load(const void *p, int64_t stride_bytes) {
  TileArrays &t = tile_arrays();
  const auto *from = static_cast<const char *>(p);
  for (int row = 0; row < (T < 6 ? t.pixels_used : t.depth / 2); ++row, from += stride_bytes) {
    if constexpr (T < 4) std::memcpy(t.sums[T][row], from, sizeof t.sums[0][0]);
    if constexpr (T == 4 || T == 5) std::memcpy(t.pixels[T - 4][row], from, t.depth * sizeof(bf16));
    if constexpr (T > 5) std::memcpy(t.weights[T - 6][row], from, sizeof t.weights[0][0]);
  }
}
template <int T>
void tile_store(float *p, int64_t stride_bytes) {
  for (int row = 0; row < tile_arrays().pixels_used; ++row)
    std::memcpy(reinterpret_cast<char *>(p) + row * stride_bytes, tile_arrays().sums[T][row],
                kTileChannels * sizeof(float));
}
template <int C, int A, int B>
void tile_multiply() {
  const auto wide = [](bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  TileArrays &t = tile_arrays();
  for (int row = 0; row < t.pixels_used; ++row)
    for (int k = 0; k < t.depth; ++k) {
      const float value = wide(t.pixels[A - 4][row][k]);
      for (int o = 0; o < kTileChannels; ++o) t.sums[C][row][o] += value * wide(t.weights[B - 6][k / 2][o][k % 2]);
    }
}

#endif

// A dense layer of strips of 16 pixels, each of `steps` runs of 2 pairs[s] numbers; in tiles, of 32. Pixels of run a[s]
// are strides[s] numbers apart. Weights are panels of up to two tiles of channels, each (pairs, tiles, 16, 2).
constexpr int kMaxSteps = 72;
constexpr int64_t kMaxRun = kDots ? INT64_MAX / 2 : kTileDepth;
struct Strip {
  const bf16 *const *a;
  void *out;
  int pixels;  // that are stored
};
struct TileLayer {
  int64_t steps;
  const int64_t *strides, *pairs;
  const bf16 *weights;
  const float *bias;  // 16 per tile of channels
  int64_t tiles;      // of channels
  int act;
  V slope;
  int64_t out_stride;  // between pixels
  int last;            // channels stored of the last panel
  bool as_float;       // the output is float32
};
void multiply_tiles(const TileLayer &layer, const Strip *strips, int count);

#if defined(FF_ENGINE_DOTS)
// A grouped 1x1 of one strip of pixels of 32 numbers to two tiles of channels, whose lane l belongs to the same group
// in both. The layer's weights are the places of `pairs` pairs of each lane's group, int32 (pairs, 16), then their
// weights (pairs, 2, 16, 2).
void multiply_permuted(const TileLayer &layer, int64_t pairs, const Strip &strip);

// A depthwise 3x3 convolution as dot products of rows. Channels are taken in blocks of 32 (or cs); a half of a block is
// every other four of them. Weights are, for every half, (12, lanes, 2) pairs and the bias: for the taps of a row of
// the kernel pairs of weights of rows (0, 1), (2, -), (-, 0), (1, 2).
struct Depthwise {
  const float *weights;
  int64_t cs, stride;
  int act;
  V slope;
};
// Rows of up to 16 pixels, `rows` from pixel -1 on, into rows of `row_size` numbers. A pixel's channels are in the
// order of the halves; where a map of stride 1 has 8 channels, the first halves of all pixels come before the second.
void multiply_depthwise(const Depthwise &layer, const bf16 *const *rows, int64_t n, int columns, bf16 *out,
                        int64_t row_size);

// A 3x3 convolution of four groups of channels. Weights are (3, 3, pairs, 16, 2), lane by lane of the sums.
enum Grouping {
  kDense,
  kQuads,   // 32 channels to 16: a pixel's sums are a vector, a group's a quarter of it
  kTwins,   // 32 to 8: two sums of a group for two pixels are a quarter
  kDoubled  // 8 to 8 from a map that has every pair of numbers twice; two pixels' sums are a vector
};
struct Grouped {
  Grouping grouping;
  const bf16 *weights;
  const float *bias;
  int act;
  V slope;
  int64_t out_stride;
  bool doubled;  // the output has every pair twice
};
constexpr int kGroupedPixels = 8;
// Pixels 0 to 7 of a row, from three rows of the input from pixel -1 on.
void multiply_groups(const Grouped &layer, const bf16 *const (&rows)[3], int pixels, bf16 *out);
#endif

}  // namespace ff::engine

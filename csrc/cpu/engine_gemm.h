// The matrix product under every dense layer of the engine: a few pixels times a panel of output channels.
#pragma once
#include "engine_math.h"

namespace ff::engine {

// Pixels per tile: kTile x kPanel accumulators, kPanel weights and one pixel fill the registers.
constexpr int kTile = kRegisters == 32 ? 14 : 6;
constexpr int kPanel = 2;
// Distance of pixels in tile buffers. Known to the compiler, so all pixels of a tile are addressed from one register;
// an odd number of cache lines, so they spread over the sets of the L1 cache.
constexpr int64_t kTileStride = 272;
// Products are added up in runs of about this many, and the runs' sums then added: a single sum of several hundred
// would round more than PyTorch's does.
constexpr int64_t kRun = 64;

struct Epilogue {
  const float *bias;
  float *out;
  int64_t stride;  // between pixels
  int act;
  V slope;
  int lanes;  // of the last vector that are stored
};

template <int M, int N, class Finish>
FF_INLINE void finish_tile(V (&acc)[M][N], const Epilogue &e, Finish act) {
  // Copies, because what is stored could be the fields themselves for all the compiler knows.
  float *const out = e.out;
  const int64_t stride = e.stride;
  const int lanes = e.lanes;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const V y = act(acc[m][n]);
      float *to = out + m * stride + n * L;
      if (n < N - 1 || lanes == L)
        y.store(to);
      else
        y.store_first(to, lanes);
    }
  }
}

// out[m][n] = act(bias[n] + sum over taps t and channels k of a[t][m * stride + k] * w[t][k][n]) for M pixels and N
// vectors of channels. Stride is the distance between pixels where it is known to the compiler, else 0.
template <int M, int N, int64_t Stride>
void gemm_tile(const float *const *a, int64_t taps, int64_t channels, int64_t stride, const float *w,
               const Epilogue &e) {
  const int64_t step = Stride ? Stride : stride;
  V acc[M][N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    const V bias = V::load(e.bias + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[m][n] = bias;
  }
  V total[M][N];
  bool several = false;
  int64_t pending = 0;
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t first = 0; first < channels; first += kRun) {
      if (pending >= kRun) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) {
            total[m][n] = several ? total[m][n] + acc[m][n] : acc[m][n];
            acc[m][n] = V::zero();
          }
        several = true;
        pending = 0;
      }
      const float *x = a[t];
      const int64_t end = first + kRun < channels ? first + kRun : channels;
      pending += end - first;
#pragma GCC unroll 2
      for (int64_t k = first; k < end; ++k) {
        V weight[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) weight[n] = V::load(w + n * L);
        w += N * L;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const V pixel(x[m * step + k]);
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) acc[m][n] = fma(pixel, weight[n], acc[m][n]);
        }
      }
    }
  if (several) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) acc[m][n] += total[m][n];
  }
  with_activation(e.act, e.slope, [&](auto act) { finish_tile(acc, e, act); });
}

template <int N, int64_t Stride>
inline void gemm_pixels(int pixels, const float *const *a, int64_t taps, int64_t channels, int64_t stride,
                        const float *w, const Epilogue &e) {
#define FF_CASE(M) \
  case M:          \
    return gemm_tile<M, N, Stride>(a, taps, channels, stride, w, e);
  if constexpr (kTile == 14) {
    switch (pixels) {
      FF_CASE(1)
      FF_CASE(2)
      FF_CASE(3)
      FF_CASE(4)
      FF_CASE(5) FF_CASE(6) FF_CASE(7) FF_CASE(8) FF_CASE(9) FF_CASE(10) FF_CASE(11) FF_CASE(12) FF_CASE(13) FF_CASE(14)
    }
  } else {
    switch (pixels) { FF_CASE(1) FF_CASE(2) FF_CASE(3) FF_CASE(4) FF_CASE(5) FF_CASE(6) }
  }
#undef FF_CASE
}

// One panel of `vectors` (1 or 2) vectors of output channels for `pixels` <= kTile pixels.
template <int64_t Stride>
inline void gemm_panel(int vectors, int pixels, const float *const *a, int64_t taps, int64_t channels, int64_t stride,
                       const float *w, const Epilogue &e) {
  if (vectors == 2)
    gemm_pixels<2, Stride>(pixels, a, taps, channels, stride, w, e);
  else
    gemm_pixels<1, Stride>(pixels, a, taps, channels, stride, w, e);
}

// Channels of a map of which one vector holds two pixels.
constexpr int kPacked = L / 2;

// The weights of one vector of outputs, in registers.
struct PackedWeights {
  V bias, weight[kPacked];
  FF_INLINE PackedWeights(const float *w, int64_t step, const float *bias) : bias(V::load(bias)) {
#pragma GCC unroll 8
    for (int k = 0; k < kPacked; ++k) weight[k] = V::load(w + k * step);
  }
};

// A 1x1 of kPacked channels: starting and finishing tiles of gemm_tile would cost as much as so few products.
template <int M, class Finish>
FF_INLINE void packed_tile(const float *a, const PackedWeights &w, float *out, int64_t stride, Finish act) {
  V acc[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[m] = w.bias;
#pragma GCC unroll 8
  for (int k = 0; k < kPacked; ++k)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m] = fma(V(a[m * kPacked + k]), w.weight[k], acc[m]);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) act(acc[m]).store(out + m * stride);
}

}  // namespace ff::engine

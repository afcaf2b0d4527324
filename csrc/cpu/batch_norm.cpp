// Batch normalisation apart from a convolution: coefficients, application, and the reductions of its backward pass.
#include <cstring>

#include "conv.h"
#include "ff_api.h"

namespace {

using namespace ff;

template <class T>
int coefficients(const T *mean, const T *var, const T *weight, const T *bias, double eps, int64_t channels, T *stats) {
  for (int64_t i = 0; i < channels; ++i) write_stats(i, mean[i], var[i], weight, bias, eps, channels, stats);
  return FF_OK;
}

template <class T>
int gradients(const double *sums, int64_t sums_row, const T *stats, int64_t stats_row, double eps, int64_t channels,
              T *grad_weight, T *grad_bias, T *grad_conv_bias) {
  for (int64_t i = 0; i < channels; ++i) {
    if (grad_weight) grad_weight[i] = T(sums[sums_row + i] / std::sqrt(stats[stats_row + i] + eps));
    if (grad_bias) grad_bias[i] = T(sums[i]);
    if (grad_conv_bias) grad_conv_bias[i] = T(stats ? sums[i] * stats[2 * stats_row + i] : sums[i]);
  }
  return FF_OK;
}

template <class T>
int update(const T *mean, const T *var, T correction, T momentum, T *running_mean, T *running_var, int64_t channels) {
  // Near a momentum of one, the batch's value is the better start: with one, it is the result.
  const auto lerp = [&](T from, T to) {
    return momentum < T(0.5) ? from + momentum * (to - from) : to - (to - from) * (T(1) - momentum);
  };
  for (int64_t i = 0; i < channels; ++i) {
    running_mean[i] = lerp(running_mean[i], mean[i]);
    running_var[i] = lerp(running_var[i], var[i] * correction);
  }
  return FF_OK;
}

template <class T>
struct Plan {
  int64_t period;
  AffineMemory<T> affine;
  GradientSums *sums;

  Plan(Arena &arena, int64_t channels, int threads) : period(period_of<T>(channels)), affine(arena, period) {
    sums = arena.take<GradientSums>(threads);
    for (int i = 0; i < threads; ++i) {
      const GradientSums one = GradientSums::take<T>(arena, period);
      if (sums != nullptr) sums[i] = one;
    }
  }
};

constexpr int64_t kGrainElements = 16 * 1024;

template <class T>
int apply(const T *z, const T *stats, int activation, double slope, T *y, int64_t pixels, int64_t channels,
          void *workspace, int threads) {
  Arena arena(workspace);
  const Plan<T> plan(arena, channels, threads);
  const Affine<T> affine = plan.affine.set(stats, channels, activation, slope);
  const int64_t tiles = (pixels + kTile - 1) / kTile;
  parallel_for(tiles, kGrainElements / (kTile * channels) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kTile; first < std::min(end * kTile, pixels); first += kTile) {
      const int64_t count = std::min(kTile, pixels - first);
      apply_affine(z + first * channels, count * channels, plan.period, affine, y + first * channels);
    }
  });
  return FF_OK;
}

template <class T>
int reduce(const T *grad, const T *z, const T *stats, int activation, double slope, T *g, double *sums, int64_t pixels,
           int64_t channels, void *workspace, int threads) {
  Arena arena(workspace);
  const Plan<T> plan(arena, channels, threads);
  const Affine<T> affine = plan.affine.set(stats, channels, activation, slope);
  const int64_t tiles = (pixels + kTile - 1) / kTile;
  const int64_t grain = kGrainElements / (kTile * channels) + 1;
  const int ranks = parallel_ranks(tiles, grain, threads, [&](int rank, int64_t begin, int64_t end) {
    plan.sums[rank].template clear<T>(plan.period);
    for (int64_t first = begin * kTile; first < std::min(end * kTile, pixels); first += kTile) {
      const int64_t count = std::min(kTile, pixels - first), at = first * channels;
      activation_backward(grad + at, z + at, count * channels, plan.period, affine, g ? g + at : nullptr,
                          &plan.sums[rank]);
    }
  });
  join_sums(ranks, channels, plan.period, [&](int rank) { return plan.sums[rank]; }, sums);
  return FF_OK;
}

}  // namespace

extern "C" int ff_cpu_batch_norm_coefficients(const void *mean, const void *var, const void *weight, const void *bias,
                                              double eps, int64_t channels, void *stats, int dtype) {
#define FF_CALL(T)                                                                                        \
  coefficients(static_cast<const T *>(mean), static_cast<const T *>(var), static_cast<const T *>(weight), \
               static_cast<const T *>(bias), eps, channels, static_cast<T *>(stats))
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_batch_norm_gradients(const double *sums, int64_t sums_row, const void *stats, int64_t stats_row,
                                           double eps, int64_t channels, void *grad_weight, void *grad_bias,
                                           void *grad_conv_bias, int dtype) {
#define FF_CALL(T)                                                                                                  \
  gradients(sums, sums_row, static_cast<const T *>(stats), stats_row, eps, channels, static_cast<T *>(grad_weight), \
            static_cast<T *>(grad_bias), static_cast<T *>(grad_conv_bias))
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_copy_rows(const void *from, int64_t from_row, int64_t rows, int64_t row_bytes, void *to,
                                int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(static_cast<char *>(to) + i * to_row, static_cast<const char *>(from) + i * from_row, row_bytes);
  return FF_OK;
}

extern "C" int ff_cpu_from_double(const double *from, int64_t count, void *to, int dtype) {
  if (dtype == FF_FLOAT32) return std::copy_n(from, count, static_cast<float *>(to)), FF_OK;
  if (dtype == FF_FLOAT64) return std::copy_n(from, count, static_cast<double *>(to)), FF_OK;
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_batch_norm_update(const void *mean, const void *var, double correction, double momentum,
                                        void *running_mean, void *running_var, int64_t channels, int dtype) {
#define FF_CALL(T)                                                                              \
  update(static_cast<const T *>(mean), static_cast<const T *>(var), T(correction), T(momentum), \
         static_cast<T *>(running_mean), static_cast<T *>(running_var), channels)
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int64_t ff_cpu_batch_norm_workspace(int64_t channels, int dtype, int threads) {
  Arena arena;
  dtype == FF_FLOAT32 ? void(Plan<float>(arena, channels, threads)) : void(Plan<double>(arena, channels, threads));
  return arena.bytes();
}

extern "C" int ff_cpu_batch_norm_apply(const void *z, const void *stats, int activation, double slope, void *y,
                                       int64_t pixels, int64_t channels, void *workspace, int dtype, int threads) {
#define FF_CALL(T)                                                                                                \
  apply(static_cast<const T *>(z), static_cast<const T *>(stats), activation, slope, static_cast<T *>(y), pixels, \
        channels, workspace, threads)
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_batch_norm_reduce(const void *grad, const void *z, const void *stats, int activation,
                                        double slope, void *g, double *sums, int64_t pixels, int64_t channels,
                                        void *workspace, int dtype, int threads) {
#define FF_CALL(T)                                                                                                  \
  reduce(static_cast<const T *>(grad), static_cast<const T *>(z), static_cast<const T *>(stats), activation, slope, \
         static_cast<T *>(g), sums, pixels, channels, workspace, threads)
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

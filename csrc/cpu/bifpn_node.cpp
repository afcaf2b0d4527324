// The fusion in front of a BiFPN node, on NHWC tensors: v = sum over inputs of w_i * resampled(x_i), forward and
// backward. The activation and the convolutions behind it read v as it is (ff_cpu_conv_forward).
#include <cmath>
#include <limits>

#include "arena.h"
#include "channels.h"
#include "ff_api.h"
#include "parallel.h"

namespace {

using namespace ff;

constexpr int kInputs = 3;
constexpr int64_t kGrainElements = 16 * 1024;

// Index of the nearest source pixel, in the arithmetic of torch.nn.functional.interpolate.
struct Nearest {
  float scale;
  int64_t last;

  Nearest(int64_t source, int64_t target) : scale(float(source) / float(target)), last(source - 1) {}
  int64_t operator()(int64_t i) const { return std::min(static_cast<int64_t>(std::floor(float(i) * scale)), last); }
};

// Maximum and its place in a 3x3 window of stride 2. The first of equal values wins and the last NaN, as in
// torch.nn.functional.max_pool2d. With `same`, the image is padded with zeros that take part.
struct Pool {
  int64_t height, width;
  bool same;

  int64_t first(int64_t size) const { return same ? size % 2 : 1; }  // pixels of padding ahead
  int64_t top(int64_t y) const { return 2 * y - first(height); }
  int64_t left(int64_t x) const { return 2 * x - first(width); }

  // body(k, inside, pixel) for the places of the window at (y, x) that take part, k = 3 * row + column.
  template <class Body>
  FF_INLINE void over_window(int64_t y, int64_t x, const Body &body) const {
    for (int k = 0; k < 9; ++k) {
      const int64_t row = top(y) + k / 3, column = left(x) + k % 3;
      const bool inside = row >= 0 && row < height && column >= 0 && column < width;
      if (inside || same) body(k, inside, row * width + column);
    }
  }

  template <class T, class Mask>
  FF_INLINE Vec<T> maximum(const T *image, int64_t channels, int64_t y, int64_t x, int64_t c, Mask mask) const {
    Vec<T> largest(-std::numeric_limits<T>::infinity());
    over_window(y, x, [&](int, bool inside, int64_t pixel) {
      const Vec<T> value = inside ? load(image + pixel * channels + c, mask) : Vec<T>::zero();
      largest = Vec<T>::larger(largest, value);
    });
    return largest;
  }
};

// w_i = relu(p_i) / (sum of relu(p) + epsilon)
struct Weights {
  double total, value[kInputs];

  template <class T>
  Weights(const T *p, int64_t count, double epsilon) : total(epsilon) {
    for (int64_t i = 0; i < count; ++i) total += positive(p[i]);
    for (int64_t i = 0; i < kInputs; ++i) value[i] = i < count ? positive(p[i]) / total : 0.0;
  }
  static double positive(double v) { return v < 0 ? 0.0 : v; }
};

struct Arguments {
  const void *x[kInputs];
  int resample[kInputs];
  int64_t height[kInputs], width[kInputs];
  const void *fusion_weight;
  int64_t weights;
  double epsilon;
  bool same;
  int64_t batch, channels, out_height, out_width;
};

template <class T>
int forward(const Arguments &in, T *v, int threads) {
  const Weights weights(static_cast<const T *>(in.fusion_weight), in.weights, in.epsilon);
  const int64_t channels = in.channels, row_elements = in.out_width * channels;
  parallel_for(in.batch * in.out_height, kGrainElements / row_elements + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / in.out_height, y = line % in.out_height;
      T *out = v + line * row_elements;
      for (int i = 0; i < kInputs && in.x[i] != nullptr; ++i) {
        const int64_t height = in.height[i], width = in.width[i];
        const T *x = static_cast<const T *>(in.x[i]) + image * height * width * channels;
        const Vec<T> w(T(weights.value[i]));
        const auto add = [&](T *target, Vec<T> value, auto mask) {
          store(target, i == 0 ? value * w : load(target, mask) + value * w, mask);
        };
        if (in.resample[i] == FF_RESAMPLE_NONE) {
          const T *row = x + y * row_elements;
          over_channels<T>(row_elements, [&](int64_t e, auto mask) { add(out + e, load(row + e, mask), mask); });
        } else if (in.resample[i] == FF_RESAMPLE_UP) {
          const Nearest row(height, in.out_height), column(width, in.out_width);
          const T *source = x + row(y) * width * channels;
          for (int64_t p = 0; p < in.out_width; ++p) {
            const T *pixel = source + column(p) * channels;
            over_channels<T>(channels,
                             [&](int64_t c, auto mask) { add(out + p * channels + c, load(pixel + c, mask), mask); });
          }
        } else {
          const Pool pool{height, width, in.same};
          for (int64_t p = 0; p < in.out_width; ++p)
            over_channels<T>(channels, [&](int64_t c, auto mask) {
              const Vec<T> value = pool.maximum(x, channels, y, p, c, mask);
              add(out + p * channels + c, value, mask);
            });
        }
      }
    }
  });
  return FF_OK;
}

// Gradient of one input, a row at a time; returns the row's sum of dv * resampled(x).
template <class T>
struct InputGradient {
  const T *x, *dv;  // of one image
  T *dx;
  int64_t channels, height, width, out_height, out_width;
  Vec<T> w;

  double none(int64_t row) const {
    const int64_t elements = width * channels, at = row * elements;
    Vec<T> sum = Vec<T>::zero();
    over_channels<T>(elements, [&](int64_t e, auto mask) {
      const Vec<T> g = load(dv + at + e, mask);
      sum += g * load(x + at + e, mask);
      if (dx != nullptr) store(dx + at + e, g * w, mask);
    });
    return sum.sum();
  }

  double up(int64_t row) const {
    const Nearest nearest_row(height, out_height), nearest_column(width, out_width);
    int64_t top = first_of(nearest_row, row, out_height), bottom = first_of(nearest_row, row + 1, out_height);
    Vec<T> total = Vec<T>::zero();
    int64_t begin = 0;
    for (int64_t column = 0; column < width; ++column) {
      int64_t end = begin;
      while (end < out_width && nearest_column(end) == column) ++end;
      const int64_t pixel = (row * width + column) * channels;
      over_channels<T>(channels, [&](int64_t c, auto mask) {
        Vec<T> sum = Vec<T>::zero();
        for (int64_t y = top; y < bottom; ++y)
          for (int64_t p = begin; p < end; ++p) sum += load(dv + (y * out_width + p) * channels + c, mask);
        total += sum * load(x + pixel + c, mask);
        if (dx != nullptr) store(dx + pixel + c, sum * w, mask);
      });
      begin = end;
    }
    return total.sum();
  }

  double down(int64_t row, bool same) const {
    const Pool pool{height, width, same};
    T *out = dx == nullptr ? nullptr : dx + row * width * channels;
    if (out != nullptr) std::fill_n(out, width * channels, T(0));
    Vec<T> total = Vec<T>::zero();
    // Windows start at 2 y - padding and are three rows high, so a row lies in at most two of them.
    const int64_t last = std::min(out_height - 1, (row + pool.first(height)) / 2);
    for (int64_t y = std::max<int64_t>(0, last - 1); y <= last; ++y) {
      const int64_t place = row - pool.top(y);
      if (place < 0 || place > 2) continue;
      const bool counts = row == std::max<int64_t>(0, pool.top(y));
      for (int64_t p = 0; p < out_width; ++p)
        over_channels<T>(channels, [&](int64_t c, auto mask) {
          using Native = typename Vec<T>::Native;
          Native largest = Vec<T>(-std::numeric_limits<T>::infinity()).v, where = Vec<T>(T(-1)).v;
          pool.over_window(y, p, [&](int k, bool inside, int64_t pixel) {
            const Native value = inside ? load(x + pixel * channels + c, mask).v : Native{};
            const auto wins = (value > largest) | (value != value);
            largest = wins ? value : largest;
            where = wins | (where < Native{}) ? Vec<T>(T(k)).v : where;
          });
          const Vec<T> g = load(dv + (y * out_width + p) * channels + c, mask);
          if (counts) total += g * keep(Vec<T>(largest), mask);
          if (out == nullptr) return;
          for (int64_t k = 3 * place; k < 3 * place + 3; ++k) {
            const int64_t column = pool.left(p) + k % 3;
            if (column < 0 || column >= width) continue;
            T *target = out + column * channels + c;
            const Vec<T> share = where == Vec<T>(T(k)).v ? (g * w).v : Native{};
            store(target, load(target, mask) + share, mask);
          }
        });
    }
    return total.sum();
  }

 private:
  static int64_t first_of(const Nearest &nearest, int64_t source, int64_t target) {
    int64_t i = std::min<int64_t>(target, static_cast<int64_t>(source / nearest.scale));
    while (i > 0 && nearest(i - 1) >= source) --i;
    while (i < target && nearest(i) < source) ++i;
    return i;
  }
};

template <class T>
int backward(const Arguments &in, const T *dv, void *const *grads, double *grad_weight, double *sums, int threads) {
  const T *p = static_cast<const T *>(in.fusion_weight);
  const Weights weights(p, in.weights, in.epsilon);
  const int64_t channels = in.channels;
  double dot[kInputs] = {};
  for (int i = 0; i < kInputs && in.x[i] != nullptr; ++i) {
    const int64_t height = in.height[i], width = in.width[i], image_size = height * width * channels;
    const int64_t grain = kGrainElements / (width * channels) + 1;
    const int ranks = parallel_ranks(in.batch * height, grain, threads, [&](int rank, int64_t begin, int64_t end) {
      double total = 0;
      for (int64_t line = begin; line < end; ++line) {
        const int64_t image = line / height, row = line % height;
        const InputGradient<T> gradient{static_cast<const T *>(in.x[i]) + image * image_size,
                                        dv + image * in.out_height * in.out_width * channels,
                                        grads[i] ? static_cast<T *>(grads[i]) + image * image_size : nullptr,
                                        channels,
                                        height,
                                        width,
                                        in.out_height,
                                        in.out_width,
                                        Vec<T>(T(weights.value[i]))};
        total += in.resample[i] == FF_RESAMPLE_NONE ? gradient.none(row)
                 : in.resample[i] == FF_RESAMPLE_UP ? gradient.up(row)
                                                    : gradient.down(row, in.same);
      }
      sums[rank] = total;
    });
    for (int rank = 0; rank < ranks; ++rank) dot[i] += sums[rank];
  }
  if (grad_weight == nullptr) return FF_OK;
  double mean = 0;
  for (int i = 0; i < kInputs; ++i) mean += dot[i] * weights.value[i];
  for (int64_t i = 0; i < in.weights; ++i)
    grad_weight[i] = p[i] <= 0 ? 0.0 : ((i < kInputs ? dot[i] : 0.0) - mean) / weights.total;
  return FF_OK;
}

}  // namespace

#define FF_ARGUMENTS                                                                                        \
  const Arguments in {                                                                                      \
    {x0, x1, x2}, {resample0, resample1, resample2}, {height0, height1, height2}, {width0, width1, width2}, \
        fusion_weight, weights, epsilon, same != 0, batch, channels, height, width                          \
  }

extern "C" int ff_cpu_bifpn_fuse(const void *x0, const void *x1, const void *x2, int resample0, int resample1,
                                 int resample2, int64_t height0, int64_t width0, int64_t height1, int64_t width1,
                                 int64_t height2, int64_t width2, const void *fusion_weight, int64_t weights,
                                 double epsilon, int same, int64_t batch, int64_t channels, int64_t height,
                                 int64_t width, void *v, int dtype, int threads) {
  FF_ARGUMENTS;
  if (dtype == FF_FLOAT32) return forward<float>(in, static_cast<float *>(v), threads);
  if (dtype == FF_FLOAT64) return forward<double>(in, static_cast<double *>(v), threads);
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int64_t ff_cpu_bifpn_fuse_workspace(int threads) { return threads * int64_t(sizeof(double)); }

extern "C" int ff_cpu_bifpn_fuse_backward(const void *x0, const void *x1, const void *x2, int resample0, int resample1,
                                          int resample2, int64_t height0, int64_t width0, int64_t height1,
                                          int64_t width1, int64_t height2, int64_t width2, const void *fusion_weight,
                                          int64_t weights, double epsilon, int same, int64_t batch, int64_t channels,
                                          int64_t height, int64_t width, const void *grad, void *grad0, void *grad1,
                                          void *grad2, double *grad_weight, void *workspace, int dtype, int threads) {
  FF_ARGUMENTS;
  void *const grads[] = {grad0, grad1, grad2};
  double *sums = static_cast<double *>(workspace);
  if (dtype == FF_FLOAT32)
    return backward<float>(in, static_cast<const float *>(grad), grads, grad_weight, sums, threads);
  if (dtype == FF_FLOAT64)
    return backward<double>(in, static_cast<const double *>(grad), grads, grad_weight, sums, threads);
  return FF_UNSUPPORTED_DTYPE;
}

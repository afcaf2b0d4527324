// Modulated deformable convolution (DCNv2) on NHWC tensors, forward and backward.
//
// A tile of output pixels at a time: the positions of its taps are computed together, every tap gathers its four
// neighbours as whole vectors of channels into a row of a small matrix, and one product with the weights follows. The
// backward pass forms the same matrix again. Neighbours outside the image read a row of zeros, each on its own.
#include <cmath>

#include "conv.h"
#include "ff_api.h"

namespace {

using namespace ff;

constexpr int64_t kTilePixels = 16;
constexpr int64_t kTilesPerFlush = 64;  // sums of weight gradients move from T to double this often

struct Shape {
  int64_t batch, channels, height, width, out_channels, kernel_h, kernel_w, stride, padding;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t out_height() const { return (height + 2 * padding - kernel_h) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - kernel_w) / stride + 1; }
  int64_t out_pixels() const { return out_height() * out_width(); }  // of one image
  bool valid() const {
    return batch >= 0 && channels > 0 && out_channels > 0 && kernel_h > 0 && kernel_w > 0 && stride > 0 &&
           padding >= 0 && height + 2 * padding >= kernel_h && width + 2 * padding >= kernel_w &&
           height * width < INT32_MAX;
  }
};

template <class T>
int64_t whole_vectors(int64_t n) {
  return (n + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
}

// Where the taps of a tile read: one entry per pixel and tap.
template <class T>
struct Positions {
  T *row_part, *column_part;  // distance from the upper and left neighbour
  int32_t *neighbour[4];      // pixel of the image, or -1 outside: upper left, upper right, lower left, lower right

  Positions() = default;
  Positions(Arena &arena, int64_t entries) : row_part(arena.take<T>(entries)), column_part(arena.take<T>(entries)) {
    for (auto &n : neighbour) n = arena.take<int32_t>(entries);
  }

  // offset: (count, taps, 2) of the pixels from `first` on.
  void set(const Shape &s, const T *offset, int64_t first, int64_t count) const {
    const int64_t taps = s.taps(), out_width = s.out_width();
    int64_t y = first / out_width, x = first % out_width, i = 0;
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t ky = 0; ky < s.kernel_h; ++ky)
        for (int64_t kx = 0; kx < s.kernel_w; ++kx, ++i) {
          row_part[i] = T(y * s.stride - s.padding + ky);
          column_part[i] = T(x * s.stride - s.padding + kx);
        }
      if (++x == out_width) x = 0, ++y;
    }
    T *__restrict rows = row_part, *__restrict columns = column_part;
    int32_t *__restrict n0 = neighbour[0], *__restrict n1 = neighbour[1];
    int32_t *__restrict n2 = neighbour[2], *__restrict n3 = neighbour[3];
    const T height = T(s.height), width = T(s.width);
    const int32_t step = static_cast<int32_t>(s.width), last = static_cast<int32_t>(s.height);
    for (i = 0; i < count * taps; ++i) {
      const T row = rows[i] + offset[2 * i], column = columns[i] + offset[2 * i + 1];
      const T top = std::floor(row), left = std::floor(column);
      rows[i] = row - top;
      columns[i] = column - left;
      // NaN becomes -2, which is outside; its weights stay NaN.
      T bounded_top = top > T(-2) ? top : T(-2), bounded_left = left > T(-2) ? left : T(-2);
      bounded_top = bounded_top < height ? bounded_top : height;
      bounded_left = bounded_left < width ? bounded_left : width;
      const int32_t iy = static_cast<int32_t>(bounded_top), ix = static_cast<int32_t>(bounded_left);
      const int32_t upper = iy >= 0 && iy < last, lower = iy >= -1 && iy < last - 1;
      const int32_t before = ix >= 0 && ix < step, after = ix >= -1 && ix < step - 1;
      const int32_t pixel = iy * step + ix;
      n0[i] = upper & before ? pixel : -1;
      n1[i] = upper & after ? pixel + 1 : -1;
      n2[i] = lower & before ? pixel + step : -1;
      n3[i] = lower & after ? pixel + step + 1 : -1;
    }
  }

  // The four bilinear weights of entry i.
  FF_INLINE void weights(int64_t i, T *w) const {
    const T below = row_part[i], right = column_part[i];
    w[0] = (1 - below) * (1 - right);
    w[1] = (1 - below) * right;
    w[2] = below * (1 - right);
    w[3] = below * right;
  }

  FF_INLINE const T *read(int neighbour_index, int64_t i, const T *image, int64_t channels, const T *zeros) const {
    const int32_t pixel = neighbour[neighbour_index][i];
    return pixel < 0 ? zeros : image + pixel * channels;
  }
};

// body(channel, mask) for every vector of channels.
template <class T, class Body>
FF_INLINE void over_channels(int64_t channels, const Body &body) {
  int64_t c = 0;
  for (; c + Vec<T>::kLanes <= channels; c += Vec<T>::kLanes) body(c, AllLanes{});
  if (c < channels) body(c, FirstLanes{static_cast<int>(channels - c)});
}

// columns (entries, channels) = bilinear samples of image times factor[i] (all ones where it is nullptr).
template <class T>
void sample(const Positions<T> &at, const T *image, const T *factor, int64_t entries, int64_t channels, const T *zeros,
            T *columns) {
  for (int64_t i = 0; i < entries; ++i) {
    T w[4];
    at.weights(i, w);
    const T scale = factor ? factor[i] : T(1);
    const Vec<T> w0(w[0] * scale), w1(w[1] * scale), w2(w[2] * scale), w3(w[3] * scale);
    const T *x0 = at.read(0, i, image, channels, zeros), *x1 = at.read(1, i, image, channels, zeros);
    const T *x2 = at.read(2, i, image, channels, zeros), *x3 = at.read(3, i, image, channels, zeros);
    T *out = columns + i * channels;
    over_channels<T>(channels, [&](int64_t c, auto mask) {
      const Vec<T> upper = load(x0 + c, mask) * w0 + load(x1 + c, mask) * w1;
      store(out + c, load(x2 + c, mask) * w2 + (load(x3 + c, mask) * w3 + upper), mask);
    });
  }
}

// weight (O, C, taps) -> [tap][input][output], outputs padded to whole vectors.
template <class T>
void pack_forward(const Shape &s, const T *weight, T *packed) {
  const int64_t columns = whole_vectors<T>(s.out_channels), taps = s.taps();
  std::fill_n(packed, taps * s.channels * columns, T(0));
  for (int64_t o = 0; o < s.out_channels; ++o)
    for (int64_t i = 0; i < s.channels; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        packed[(tap * s.channels + i) * columns + o] = weight[(o * s.channels + i) * taps + tap];
}

// weight (O, C, taps) -> [output][tap][input].
template <class T>
void pack_backward(const Shape &s, const T *weight, T *packed) {
  const int64_t taps = s.taps();
  for (int64_t o = 0; o < s.out_channels; ++o)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = 0; i < s.channels; ++i)
        packed[(o * taps + tap) * s.channels + i] = weight[(o * s.channels + i) * taps + tap];
}

// ---- forward

template <class T>
struct Forward {
  struct Thread {
    Positions<T> at;
    T *columns;
    Moments moments;
  };

  int64_t period;
  T *zeros, *packed, *bias;
  AffineMemory<T> y_affine;
  Thread *threads;

  Forward(Arena &arena, const Shape &s, int thread_count)
      : period(period_of<T>(s.out_channels)),
        zeros(arena.take<T>(s.channels)),
        packed(arena.take<T>(s.taps() * s.channels * whole_vectors<T>(s.out_channels))),
        bias(arena.take<T>(s.out_channels)),
        y_affine(arena, period),
        threads(arena.take<Thread>(thread_count)) {
    for (int i = 0; i < thread_count; ++i) {
      Thread thread;
      thread.at = Positions<T>(arena, kTilePixels * s.taps());
      thread.columns = arena.take<T>(kTilePixels * s.taps() * s.channels);
      thread.moments = Moments::take<T>(arena, period);
      if (threads != nullptr) threads[i] = thread;
    }
  }
};

struct ForwardArguments {
  const void *x, *offset, *mask, *weight, *bias;
  void *z, *stats;
  const void *bn_weight, *bn_bias;
  double eps;
  const void *y_stats;
  int y_activation;
  double y_slope;
  void *workspace;
};

int64_t grain(const Shape &s) { return kGrainProducts / (s.taps() * s.channels * s.out_channels * kTilePixels) + 1; }

template <class T>
int forward(const ForwardArguments &in, const Shape &s, int thread_count) {
  const auto at = [](const void *p, int64_t i) { return p ? static_cast<const T *>(p) + i : nullptr; };
  Arena arena(in.workspace);
  Forward<T> plan(arena, s, thread_count);
  std::fill_n(plan.zeros, s.channels, T(0));
  pack_forward(s, at(in.weight, 0), plan.packed);
  if (in.bias != nullptr) std::copy_n(at(in.bias, 0), s.out_channels, plan.bias);
  const int64_t outputs = s.out_channels, taps = s.taps(), pixels = s.out_pixels();
  const Affine<T> after = plan.y_affine.set(in.y_stats, outputs, in.y_activation, in.y_slope);
  const int64_t per_image = (pixels + kTilePixels - 1) / kTilePixels;
  const int ranks =
      parallel_ranks(s.batch * per_image, grain(s), thread_count, [&](int rank, int64_t begin, int64_t end) {
        const typename Forward<T>::Thread &thread = plan.threads[rank];
        thread.moments.template clear<T>(plan.period);
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t image = tile / per_image, first = tile % per_image * kTilePixels;
          const int64_t count = std::min(kTilePixels, pixels - first), pixel = image * pixels + first;
          thread.at.set(s, at(in.offset, pixel * taps * 2), first, count);
          sample(thread.at, at(in.x, image * s.height * s.width * s.channels), at(in.mask, pixel * taps), count * taps,
                 s.channels, plan.zeros, thread.columns);
          const T *segments[1] = {thread.columns};
          T *z = static_cast<T *>(in.z) + pixel * outputs;
          Product<T> p;
          p.a = segments;
          p.a_row = p.length = taps * s.channels;
          p.b = plan.packed;
          p.b_step = whole_vectors<T>(outputs);
          p.c = z;
          p.c_row = outputs;
          p.initial = in.bias ? plan.bias : nullptr;
          multiply(p, count, outputs);
          if (in.stats != nullptr) thread.moments.add(z, count * outputs, plan.period);
          if (!after.identity()) apply_affine(z, count * outputs, plan.period, after, z);
        }
      });
  if (in.stats != nullptr) {
    for (int64_t i = 0; i < outputs; ++i) {
      MeanAndM2 total;
      for (int rank = 0; rank < ranks; ++rank)
        for (int64_t j = i; j < plan.period; j += outputs) total.join(plan.threads[rank].moments, j);
      write_stats(i, total.mean, total.m2 / total.count, at(in.bn_weight, 0), at(in.bn_bias, 0), in.eps, outputs,
                  static_cast<T *>(in.stats));
    }
  }
  return FF_OK;
}

// ---- backward

template <class T>
struct Backward {
  struct Thread {
    Positions<T> at;
    T *columns, *grad_columns, *dz, *scratch, *weight_part, *dx;
    double *weight_sums;
  };

  int64_t period;
  T *zeros, *packed;
  AffineMemory<T> affine;
  T *b, *c, *coefficients;
  Thread *threads;

  Backward(Arena &arena, const Shape &s, int thread_count)
      : period(period_of<T>(s.out_channels)),
        zeros(arena.take<T>(s.channels)),
        packed(arena.take<T>(s.out_channels * s.taps() * s.channels)),
        affine(arena, period),
        b(arena.take<T>(period + Vec<T>::kLanes)),
        c(arena.take<T>(period + Vec<T>::kLanes)),
        coefficients(arena.take<T>(2 * s.out_channels)),
        threads(arena.take<Thread>(thread_count)) {
    const int64_t matrix = kTilePixels * s.taps() * s.channels, weights = s.out_channels * s.taps() * s.channels;
    for (int i = 0; i < thread_count; ++i) {
      Thread thread;
      thread.at = Positions<T>(arena, kTilePixels * s.taps());
      thread.columns = arena.take<T>(matrix);
      thread.grad_columns = arena.take<T>(matrix);
      thread.dz = arena.take<T>(kTilePixels * s.out_channels);
      thread.scratch = arena.take<T>(kTilePixels * s.out_channels);
      thread.weight_part = arena.take<T>(weights);
      thread.weight_sums = arena.take<double>(weights);
      thread.dx = thread_count > 1 ? arena.take<T>(s.height * s.width * s.channels) : nullptr;
      if (threads != nullptr) threads[i] = thread;
    }
  }
};

struct BackwardArguments {
  const void *grad, *z, *stats;
  const double *sums;
  int training, activation;
  double slope, eps;
  const void *x, *offset, *mask, *weight;
  void *grad_x, *grad_offset, *grad_mask, *grad_weight;
  void *workspace;
};

// Gradients of the samples (entries, channels) to those of image, offset and mask; grad pointers may be nullptr.
template <class T>
void scatter(const Positions<T> &at, const T *image, const T *mask, const T *grad_columns, int64_t entries,
             int64_t channels, const T *zeros, T *grad_image, T *grad_offset, T *grad_mask) {
  for (int64_t i = 0; i < entries; ++i) {
    T w[4];
    at.weights(i, w);
    const T *x[4];
    for (int n = 0; n < 4; ++n) x[n] = at.read(n, i, image, channels, zeros);
    const T *g = grad_columns + i * channels;
    if (grad_offset != nullptr || grad_mask != nullptr) {
      Vec<T> sum[4] = {Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero()};
      over_channels<T>(channels, [&](int64_t c, auto lanes) {
        const Vec<T> value = load(g + c, lanes);
        for (int n = 0; n < 4; ++n) sum[n] = sum[n] + value * load(x[n] + c, lanes);
      });
      const T s0 = sum[0].sum(), s1 = sum[1].sum(), s2 = sum[2].sum(), s3 = sum[3].sum();
      const T below = at.row_part[i], right = at.column_part[i];
      if (grad_mask != nullptr) grad_mask[i] = s0 * w[0] + s1 * w[1] + s2 * w[2] + s3 * w[3];
      if (grad_offset != nullptr) {
        grad_offset[2 * i] = mask[i] * ((1 - right) * (s2 - s0) + right * (s3 - s1));
        grad_offset[2 * i + 1] = mask[i] * ((1 - below) * (s1 - s0) + below * (s3 - s2));
      }
    }
    if (grad_image == nullptr) continue;
    for (int n = 0; n < 4; ++n) {
      const int32_t pixel = at.neighbour[n][i];
      if (pixel < 0) continue;
      T *out = grad_image + pixel * channels;
      const Vec<T> factor(w[n] * mask[i]);
      over_channels<T>(channels, [&](int64_t c, auto lanes) {
        store(out + c, load(g + c, lanes) * factor + load(out + c, lanes), lanes);
      });
    }
  }
}

// sums += part, which is cleared.
template <class T>
void flush(T *part, int64_t count, double *sums) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += part[i];
    part[i] = T(0);
  }
}

template <class T>
int backward(const BackwardArguments &in, const Shape &s, int thread_count) {
  const auto at = [](const void *p, int64_t i) { return p ? static_cast<const T *>(p) + i : nullptr; };
  const auto out = [](void *p, int64_t i) { return p ? static_cast<T *>(p) + i : nullptr; };
  Arena arena(in.workspace);
  Backward<T> plan(arena, s, thread_count);
  std::fill_n(plan.zeros, s.channels, T(0));
  pack_backward(s, at(in.weight, 0), plan.packed);
  const int64_t outputs = s.out_channels, taps = s.taps(), pixels = s.out_pixels(), inputs = s.channels;
  const int64_t weights = outputs * taps * inputs, image_size = s.height * s.width * s.channels;

  OutputGradient<T> gradient;
  gradient.grad = {at(in.grad, 0), outputs, outputs};
  gradient.z = {at(in.z, 0), outputs, outputs};
  gradient.period = plan.period;
  gradient.affine = plan.affine.set(in.stats, outputs, in.activation, in.slope);
  gradient.activated = in.activation != FF_NONE;
  if (in.stats != nullptr && in.training) {
    T *b = plan.coefficients, *c = plan.coefficients + outputs;
    const double n = double(s.batch * pixels);
    for (int64_t i = 0; i < outputs; ++i) {
      b[i] = T(in.sums[i] / n);
      c[i] = T(in.sums[outputs + i] / n / (double(at(in.stats, outputs)[i]) + in.eps));
    }
    repeat(b, outputs, plan.period, plan.b);
    repeat(c, outputs, plan.period, plan.c);
    gradient.b = plan.b;
    gradient.c = plan.c;
  }

  for (int i = 0; i < thread_count; ++i) {
    std::fill_n(plan.threads[i].weight_part, weights, T(0));
    std::fill_n(plan.threads[i].weight_sums, weights, 0.0);
  }
  const int64_t per_image = (pixels + kTilePixels - 1) / kTilePixels;
  for (int64_t image = 0; image < s.batch; ++image) {
    const T *x = at(in.x, image * image_size);
    T *grad_x = out(in.grad_x, image * image_size);
    if (grad_x != nullptr && thread_count == 1) std::fill_n(grad_x, image_size, T(0));
    const int ranks = parallel_ranks(per_image, grain(s), thread_count, [&](int rank, int64_t begin, int64_t end) {
      const typename Backward<T>::Thread &thread = plan.threads[rank];
      T *dx = grad_x == nullptr ? nullptr : thread_count == 1 ? grad_x : thread.dx;
      if (dx != nullptr && thread_count > 1) std::fill_n(dx, image_size, T(0));
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * kTilePixels, count = std::min(kTilePixels, pixels - first);
        const int64_t pixel = image * pixels + first;
        const T *mask = at(in.mask, pixel * taps);
        gradient.read(pixel, count, thread.dz, thread.scratch);
        thread.at.set(s, at(in.offset, pixel * taps * 2), first, count);
        if (in.grad_weight != nullptr) {
          // (taps * inputs, outputs) += columns^T dz
          sample(thread.at, x, mask, count * taps, inputs, plan.zeros, thread.columns);
          const T *segments[1] = {thread.columns};
          Product<T> p;
          p.a = segments;
          p.a_row = 1;
          p.a_step = taps * inputs;
          p.length = count;
          p.b = thread.dz;
          p.b_step = p.c_row = outputs;
          p.c = thread.weight_part;
          p.accumulate = true;
          multiply(p, taps * inputs, outputs);
          if ((tile - begin) % kTilesPerFlush == kTilesPerFlush - 1 || tile == end - 1)
            flush(thread.weight_part, weights, thread.weight_sums);
        }
        if (grad_x == nullptr && in.grad_offset == nullptr && in.grad_mask == nullptr) continue;
        const T *segments[1] = {thread.dz};
        Product<T> p;
        p.a = segments;
        p.a_row = p.length = outputs;
        p.b = plan.packed;
        p.b_step = p.c_row = taps * inputs;
        p.c = thread.grad_columns;
        multiply(p, count, taps * inputs);
        scatter(thread.at, x, mask, thread.grad_columns, count * taps, s.channels, plan.zeros, dx,
                out(in.grad_offset, pixel * taps * 2), out(in.grad_mask, pixel * taps));
      }
    });
    if (grad_x != nullptr && thread_count > 1)
      parallel_for(image_size, kGrainProducts, thread_count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          T total = plan.threads[0].dx[i];
          for (int rank = 1; rank < ranks; ++rank) total += plan.threads[rank].dx[i];
          grad_x[i] = total;
        }
      });
  }
  if (in.grad_weight != nullptr) {
    T *grad_weight = out(in.grad_weight, 0);
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = 0; i < inputs; ++i)
        for (int64_t o = 0; o < outputs; ++o) {
          double total = 0;
          for (int rank = 0; rank < thread_count; ++rank)
            total += plan.threads[rank].weight_sums[(tap * inputs + i) * outputs + o];
          grad_weight[(o * inputs + i) * taps + tap] = T(total);
        }
  }
  return FF_OK;
}

}  // namespace

#define FF_SHAPE \
  const Shape shape { batch, channels, height, width, out_channels, kernel_h, kernel_w, stride, padding }

extern "C" int64_t ff_cpu_deform_conv_workspace(int is_backward, int64_t batch, int64_t channels, int64_t height,
                                                int64_t width, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                                int64_t stride, int64_t padding, int dtype, int threads) {
  FF_SHAPE;
  Arena arena;
  if (dtype == FF_FLOAT32)
    is_backward ? void(Backward<float>(arena, shape, threads)) : void(Forward<float>(arena, shape, threads));
  else
    is_backward ? void(Backward<double>(arena, shape, threads)) : void(Forward<double>(arena, shape, threads));
  return arena.bytes();
}

extern "C" int ff_cpu_deform_conv_forward(const void *x, const void *offset, const void *mask, const void *weight,
                                          const void *bias, void *z, void *stats, const void *bn_weight,
                                          const void *bn_bias, double eps, const void *y_stats, int y_activation,
                                          double y_slope, int64_t batch, int64_t channels, int64_t height,
                                          int64_t width, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                          int64_t stride, int64_t padding, void *workspace, int dtype, int threads) {
  FF_SHAPE;
  if (!shape.valid()) return FF_BAD_ARGUMENT;
  const ForwardArguments arguments{x,         offset,  mask, weight,  bias,         z,       stats,
                                   bn_weight, bn_bias, eps,  y_stats, y_activation, y_slope, workspace};
  if (dtype == FF_FLOAT32) return forward<float>(arguments, shape, threads);
  if (dtype == FF_FLOAT64) return forward<double>(arguments, shape, threads);
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_deform_conv_backward(const void *grad, const void *z, const void *stats, const double *sums,
                                           int training, int activation, double slope, double eps, const void *x,
                                           const void *offset, const void *mask, const void *weight, void *grad_x,
                                           void *grad_offset, void *grad_mask, void *grad_weight, int64_t batch,
                                           int64_t channels, int64_t height, int64_t width, int64_t out_channels,
                                           int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
                                           void *workspace, int dtype, int threads) {
  FF_SHAPE;
  if (!shape.valid()) return FF_BAD_ARGUMENT;
  const BackwardArguments arguments{grad,   z,    stats,  sums,   training,    activation, slope,       eps,      x,
                                    offset, mask, weight, grad_x, grad_offset, grad_mask,  grad_weight, workspace};
  if (dtype == FF_FLOAT32) return backward<float>(arguments, shape, threads);
  if (dtype == FF_FLOAT64) return backward<double>(arguments, shape, threads);
  return FF_UNSUPPORTED_DTYPE;
}

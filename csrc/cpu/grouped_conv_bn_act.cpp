// One convolution with what surrounds it in training, forward and backward, on NHWC tensors.
//
// Normalisation is deferred: the forward pass reads its input as act((x - mean) * scale + shift), x being the raw
// output of the convolution before, writes its own raw output z once and gathers the batch statistics of z on the way.
// The backward pass takes g, the gradient of the batch normalisation's output, forms dz as it loads, and hands g of the
// convolution before it to the next call, together with the two sums per channel that that call needs.
//
// A work item is one row of the image, or a tile of pixels for a 1x1 convolution. Sums are kept per thread and joined
// in the order of the threads, so results do not depend on timing.
#include <cmath>

#include "conv.h"
#include "ff_api.h"
#include "planar.h"

namespace {

using namespace ff;

// Grouped convolutions with few outputs per group are run as fewer, larger groups with zeros in the weights, so that
// outputs fill a vector. A block is one of these larger groups.
struct Blocks {
  int64_t count, inputs, outputs;  // channels per block

  template <class T>
  static Blocks of(const ConvShape &s) {
    if (s.split < s.out_channels) return {1, s.channels, s.out_channels};
    const int64_t outputs = s.out_channels / s.groups;
    int64_t merged = 1;
    while (merged < s.groups && (s.groups % merged != 0 || merged * outputs < Vec<T>::kLanes)) ++merged;
    return {s.groups / merged, s.channels / s.groups * merged, outputs * merged};
  }
};

// Whether rows of planes (planar.h) take fewer multiplications than blocks with zeros, transposes included.
template <class T>
bool planar(const ConvShape &s) {
  if (s.kernel != 3 || s.stride != 1 || s.padding != 1 || s.groups == 1 || s.depthwise()) return false;
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const Blocks blocks = Blocks::of<T>(s);
  const int64_t vectors = (blocks.outputs + kLanes - 1) / kLanes, whole = (s.width + kLanes - 1) / kLanes * kLanes;
  const int64_t products = blocks.count * 9 * blocks.inputs * vectors * s.width;
  return 9 * (s.channels / s.groups) * s.out_channels * whole / kLanes +
             2 * (s.channels + s.out_channels) * whole / kLanes <
         products;
}

template <class T>
int64_t whole_vectors(int64_t n) {
  return (n + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
}

// weight (O, I / groups, k, k) -> per block [ky][kx][input][output], outputs padded to whole vectors.
template <class T>
void pack_forward(const T *weight, const ConvShape &s, const Blocks &blocks, T *packed) {
  const int64_t columns = whole_vectors<T>(blocks.outputs), area = s.kernel * s.kernel;
  const int64_t in = s.channels / s.groups;
  std::fill_n(packed, blocks.count * area * blocks.inputs * columns, T(0));
  for (int64_t o = 0; o < s.out_channels; ++o) {
    const int64_t block = o / blocks.outputs, first = s.group_of(o) * in - block * blocks.inputs;
    for (int64_t tap = 0; tap < area; ++tap)
      for (int64_t i = 0; i < in; ++i)
        packed[((block * area + tap) * blocks.inputs + first + i) * columns + o % blocks.outputs] =
            weight[(o * in + i) * area + tap];
  }
}

// The same for the gradient of the input: taps reversed, [ky][kx][output][input], inputs padded.
template <class T>
void pack_backward(const T *weight, const ConvShape &s, const Blocks &blocks, T *packed) {
  const int64_t columns = whole_vectors<T>(blocks.inputs), area = s.kernel * s.kernel;
  const int64_t in = s.channels / s.groups;
  std::fill_n(packed, blocks.count * area * blocks.outputs * columns, T(0));
  for (int64_t o = 0; o < s.out_channels; ++o) {
    const int64_t block = o / blocks.outputs, first = s.group_of(o) * in - block * blocks.inputs;
    for (int64_t tap = 0; tap < area; ++tap)
      for (int64_t i = 0; i < in; ++i)
        packed[((block * area + tap) * blocks.outputs + o % blocks.outputs) * columns + first + i] =
            weight[(o * in + i) * area + area - 1 - tap];
  }
}

// weight (C, 1, k, k) -> [tap][period], reversed taps for the gradient of the input.
template <class T>
void pack_depthwise(const T *weight, int64_t channels, int64_t area, int64_t period, bool reversed, T *packed) {
  const int64_t step = period + Vec<T>::kLanes;
  for (int64_t tap = 0; tap < area; ++tap)
    for (int64_t i = 0; i < step; ++i)
      packed[tap * step + i] = i < period ? weight[i % channels * area + (reversed ? area - 1 - tap : tap)] : T(0);
}

// Geometry of a depthwise row. With stride 1, pixels may share a vector (see channels.h); otherwise they may not.
template <class T>
struct DepthwiseRow {
  int64_t pixels, channels, stride;

  int64_t period() const { return stride == 1 ? period_of<T>(channels) : channels; }

  // body(output element, input element, mask) along the row for channel vector c.
  template <class Body>
  FF_INLINE void along(int64_t c, const Body &body) const {
    if (stride == 1) {
      along_pixels<T>(pixels * channels, period(), c, [&](int64_t i, auto mask) { body(i, i, mask); });
    } else if (channels - c >= Vec<T>::kLanes) {
      for (int64_t x = 0; x < pixels; ++x) body(x * channels + c, x * stride * channels + c, AllLanes{});
    } else {
      const FirstLanes mask{static_cast<int>(channels - c)};
      for (int64_t x = 0; x < pixels; ++x) body(x * channels + c, x * stride * channels + c, mask);
    }
  }
};

// out (+)= bias + sum over rows r and taps t of rows[r][pixel * stride + t] * weights[r][t], channel by channel.
template <class T, int Rows, int Taps>
void depthwise_row(const DepthwiseRow<T> &row, const T *const *rows, const T *const *weights, const T *bias,
                   bool accumulate, T *out) {
  const int64_t period = row.period(), step = period + Vec<T>::kLanes;
  for (int64_t c = 0; c < period; c += Vec<T>::kLanes) {
    Vec<T> w[Rows][Taps];
    for (int r = 0; r < Rows; ++r)
      for (int t = 0; t < Taps; ++t) w[r][t] = Vec<T>::load(weights[r] + t * step + c);
    const Vec<T> first = bias ? Vec<T>::load(bias + c) : Vec<T>::zero();
    const auto run = [&](auto added) {
      row.along(c, [&](int64_t o, int64_t i, auto mask) {
        Vec<T> sum = first;
        if constexpr (added.value) sum += load(out + o, mask);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int t = 0; t < Taps; ++t) sum = sum + Vec<T>::load(rows[r] + i + t * row.channels) * w[r][t];
        store(out + o, sum, mask);
      });
    };
    accumulate ? run(std::true_type{}) : run(std::false_type{});
  }
}

// A whole k x k depthwise convolution of one row; `count` rows with the taps from weights[r] on.
template <class T>
void depthwise(const DepthwiseRow<T> &row, int64_t kernel, int64_t count, const T *const *rows, const T *const *weights,
               const T *bias, T *out) {
  if (kernel == 3 && count == 3) return depthwise_row<T, 3, 3>(row, rows, weights, bias, false, out);
  if (count == 0) std::fill_n(out, row.pixels * row.channels, T(0));
  const int64_t step = row.period() + Vec<T>::kLanes;
  for (int64_t r = 0; r < count; ++r) {
    if (kernel == 3) {
      depthwise_row<T, 1, 3>(row, rows + r, weights + r, r == 0 ? bias : nullptr, r > 0, out);
      continue;
    }
    for (int64_t t = 0; t < kernel; ++t) {
      const T *shifted = rows[r] + t * row.channels, *w = weights[r] + t * step;
      depthwise_row<T, 1, 1>(row, &shifted, &w, r + t == 0 ? bias : nullptr, r + t > 0, out);
    }
  }
}

// out[m * out_step] = sum over n of in[n][m * channels] * weights[n], for `pixels` pixels m, channel by channel.
template <class T, int Count>
void depthwise_taps(const T *const *in, const T *const *weights, int64_t count, int64_t pixels, int64_t channels,
                    int64_t out_step, T *out) {
  const int64_t taps = Count > 0 ? Count : count;
  for (int64_t c = 0; c < channels; c += Vec<T>::kLanes) {
    const auto run = [&](auto mask) {
      for (int64_t m = 0; m < pixels; ++m) {
        Vec<T> sum = Vec<T>::zero();
        for (int64_t n = 0; n < taps; ++n)
          sum = sum + Vec<T>::load(in[n] + m * channels + c) * Vec<T>::load(weights[n] + c);
        store(out + m * out_step + c, sum, mask);
      }
    };
    if (channels - c >= Vec<T>::kLanes)
      run(AllLanes{});
    else
      run(FirstLanes{static_cast<int>(channels - c)});
  }
}

// Gradient of one input row of a depthwise convolution with stride > 1: pixel x takes the taps t for which
// x + padding - t is a multiple of the stride. rows[i] are rows of dz behind `before` zero pixels, weights[i] the
// reversed filter row of each, its taps `step` apart.
template <class T>
void depthwise_strided_gradient(const ConvShape &s, const T *const *rows, const T *const *weights, int64_t count,
                                int64_t before, int64_t step, T *dx) {
  const T *in[kMaxKernel * kMaxKernel], *taps[kMaxKernel * kMaxKernel];
  for (int64_t first = 0; first < std::min(s.stride, s.width); ++first) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t t = 0; t < s.kernel; ++t) {
        const int64_t reach = first + s.padding - t;
        if ((reach % s.stride + s.stride) % s.stride != 0) continue;
        in[n] = rows[i] + (before + reach / s.stride) * s.channels;
        taps[n++] = weights[i] + (s.kernel - 1 - t) * step;
      }
    const int64_t pixels = (s.width - first + s.stride - 1) / s.stride, out_step = s.stride * s.channels;
    T *out = dx + first * s.channels;
    if (n == 1)
      depthwise_taps<T, 1>(in, taps, n, pixels, s.channels, out_step, out);
    else if (n == 2)
      depthwise_taps<T, 2>(in, taps, n, pixels, s.channels, out_step, out);
    else if (n == 4)
      depthwise_taps<T, 4>(in, taps, n, pixels, s.channels, out_step, out);
    else
      depthwise_taps<T, 0>(in, taps, n, pixels, s.channels, out_step, out);
  }
}

// sums[t] += sum over pixels of dz[pixel] * x[pixel * stride + t], channel by channel.
template <class T, int Taps>
void depthwise_weight_row(const DepthwiseRow<T> &row, const T *x, const T *dz, double *sums) {
  const int64_t period = row.period(), step = period + Vec<T>::kLanes;
  for (int64_t c = 0; c < period; c += Vec<T>::kLanes) {
    Vec<T> total[Taps];
    for (int t = 0; t < Taps; ++t) total[t] = Vec<T>::zero();
    row.along(c, [&](int64_t o, int64_t i, auto mask) {
      const Vec<T> d = load(dz + o, mask);
#pragma GCC unroll 8
      for (int t = 0; t < Taps; ++t) total[t] = total[t] + d * load(x + i + t * row.channels, mask);
    });
    for (int t = 0; t < Taps; ++t)
      for (int lane = 0; lane < Vec<T>::kLanes; ++lane) sums[t * step + c + lane] += total[t].v[lane];
  }
}

int64_t grain_rows(const ConvShape &s, int64_t pixels) {
  const int64_t products = s.channels / s.groups * s.out_channels * s.kernel * s.kernel;
  return kGrainProducts / (products * pixels + 1) + 1;
}

// Fills a padded row: `pixels` pixels from `first` on, `dilation` pixels apart, after `padding` zero pixels.
template <class Source, class T>
void fill_row(const Source &read, int64_t pixels, int64_t channels, int64_t padding, int64_t dilation, T *row,
              T *scratch) {
  T *out = row + padding * channels;
  if (dilation == 1) return read(out);
  read(scratch);
  for (int64_t i = 0; i < pixels; ++i) copy(scratch + i * channels, channels, out + i * dilation * channels);
}

// ---- forward

template <class T>
struct Forward {
  struct Thread {
    RowCache<T> rows;
    T *tile, *z_planes;
    Moments moments;
  };

  ConvShape shape;
  Blocks blocks;
  bool flat;
  PlanarGroups planes;
  PlanarRow<T> planar_row;
  int64_t in_period, out_period;
  DepthwiseRow<T> row;
  T *packed, *bias;
  AffineMemory<T> x_affine, y_affine;
  Thread *threads;

  Forward(Arena &arena, const ConvShape &s, int thread_count)
      : shape(s),
        blocks(Blocks::of<T>(s)),
        flat(s.kernel == 1 && s.stride == 1 && s.padding == 0),
        planes(planar<T>(s) ? PlanarGroups::of(arena, s) : PlanarGroups{}),
        planar_row{s.width},
        in_period(period_of<T>(s.channels)),
        out_period(period_of<T>(s.out_channels)),
        row{s.out_width(), s.channels, s.stride},
        packed(arena.take<T>(s.depthwise() ? s.kernel * s.kernel * (row.period() + Vec<T>::kLanes)
                                           : blocks.count * s.kernel * s.kernel * blocks.inputs *
                                                 whole_vectors<T>(blocks.outputs))),
        bias(arena.take<T>(std::max(row.period(), s.out_channels) + Vec<T>::kLanes)),
        x_affine(arena, in_period),
        y_affine(arena, out_period),
        threads(arena.take<Thread>(thread_count)) {
    for (int i = 0; i < thread_count; ++i) {
      Thread thread;
      if (flat)
        thread.tile = arena.take<T>(kTile * s.channels);
      else
        thread.rows = RowCache<T>(
            arena, s.kernel, planes.groups ? s.channels * planar_row.step() : (s.width + 2 * s.padding) * s.channels);
      if (planes.groups) {
        thread.tile = arena.take<T>(s.width * s.channels);
        thread.z_planes = arena.take<T>(s.out_channels * planar_row.step());
      }
      thread.moments = Moments::take<T>(arena, out_period);
      if (threads != nullptr) threads[i] = thread;
    }
  }

  void pack(const T *weight, const T *source_bias) {
    if (shape.depthwise())
      pack_depthwise(weight, shape.channels, shape.kernel * shape.kernel, row.period(), false, packed);
    else if (planes.groups)
      planes.pack(weight, false, packed);
    else
      pack_forward(weight, shape, blocks, packed);
    if (source_bias == nullptr)
      bias = nullptr;
    else
      repeat(source_bias, shape.out_channels, shape.depthwise() ? row.period() : shape.out_channels, bias);
  }

  // z = conv of one row; rows[ky] are padded input rows.
  void convolve(const T *const *rows, int64_t pixels, T *z) const {
    const int64_t k = shape.kernel, columns = whole_vectors<T>(blocks.outputs);
    if (shape.depthwise()) {
      const T *weights[kMaxKernel];
      for (int64_t ky = 0; ky < k; ++ky) weights[ky] = packed + ky * k * (row.period() + Vec<T>::kLanes);
      DepthwiseRow<T> part = row;
      part.pixels = pixels;
      return depthwise(part, k, k, rows, weights, bias, z);
    }
    const T *taps[kMaxKernel * kMaxKernel];
    Product<T> p;
    p.a_row = shape.stride * shape.channels;
    p.a_step = 1;
    p.b_step = columns;
    p.c_row = shape.out_channels;
    if (blocks.count == 1) {
      p.a = rows;
      p.segments = k;
      p.length = k * shape.channels;
    } else {
      for (int64_t tap = 0; tap < k * k; ++tap) taps[tap] = rows[tap / k] + tap % k * shape.channels;
      p.a = taps;
      p.segments = k * k;
      p.length = blocks.inputs;
    }
    p.b_segment = p.length * columns;
    for (int64_t block = 0; block < blocks.count; ++block) {
      p.a_offset = block * blocks.inputs;
      p.b = packed + block * k * k * blocks.inputs * columns;
      p.c = z + block * blocks.outputs;
      p.initial = bias ? bias + block * blocks.outputs : nullptr;
      multiply(p, pixels, blocks.outputs);
    }
  }

  template <class Finish>
  int run(const Input<T> &input, T *z, int thread_count, const Finish &finish) {
    return flat ? run_tiles(input, z, thread_count, finish) : run_rows(input, z, thread_count, finish);
  }

  template <class Finish>
  int run_tiles(const Input<T> &input, T *z, int thread_count, const Finish &finish) {
    const int64_t pixels = shape.out_pixels(), tiles = (pixels + kTile - 1) / kTile;
    const bool direct = input.affine.identity() && input.x.dense();
    return parallel_ranks(tiles, grain_rows(shape, kTile), thread_count, [&](int rank, int64_t begin, int64_t end) {
      const Thread &thread = threads[rank];
      thread.moments.template clear<T>(out_period);
      for (int64_t first = begin * kTile; first < std::min(end * kTile, pixels); first += kTile) {
        const int64_t count = std::min(kTile, pixels - first);
        const T *tile = direct && !shape.depthwise() ? input.x.data + first * shape.channels : thread.tile;
        if (tile == thread.tile) input.read(first, count, thread.tile);
        T *out = z + first * shape.out_channels;
        convolve(&tile, count, out);
        finish(thread, out, count);
      }
    });
  }

  template <class Finish>
  int run_rows(const Input<T> &input, T *z, int thread_count, const Finish &finish) {
    const int64_t height = shape.out_height(), width = shape.out_width();
    const int64_t rows = shape.batch * height;
    return parallel_ranks(rows, grain_rows(shape, width), thread_count, [&](int rank, int64_t begin, int64_t end) {
      Thread thread = threads[rank];
      thread.moments.template clear<T>(out_period);
      thread.rows.clear();
      for (int64_t r = begin; r < end; ++r) {
        const int64_t image = r / height, y = r % height;
        if (y == 0) thread.rows.forget();
        const T *taps[kMaxKernel];
        for (int64_t ky = 0; ky < shape.kernel; ++ky) {
          const int64_t source = y * shape.stride - shape.padding + ky;
          taps[ky] = source < 0 || source >= shape.height
                         ? thread.rows.zeros()
                         : thread.rows.get(
                               source,
                               [&](T *out) {
                                 T *row = planes.groups ? thread.tile : out + shape.padding * shape.channels;
                                 input.read((image * shape.height + source) * shape.width, shape.width, row);
                                 if (planes.groups) to_planes(planar_row, row, shape.channels, out);
                               });
        }
        T *out = z + r * width * shape.out_channels;
        if (planes.groups) {
          planes.convolve(planar_row, taps, packed, bias, thread.z_planes);
          from_planes(planar_row, thread.z_planes, shape.out_channels, out);
        } else {
          convolve(taps, width, out);
        }
        finish(thread, out, width);
      }
    });
  }
};

struct ForwardArguments {
  const void *x;
  int64_t x_pixel;
  const void *x_stats;
  int x_activation;
  double x_slope;
  const void *weight, *bias;
  void *z, *stats;
  const void *bn_weight, *bn_bias;
  double eps;
  const void *y_stats;
  int y_activation;
  double y_slope;
  void *workspace;
};

template <class T>
int forward(const ForwardArguments &in, const ConvShape &shape, int threads) {
  const auto at = [](const void *p, int64_t i) { return p ? static_cast<const T *>(p) + i : nullptr; };
  Arena arena(in.workspace);
  Forward<T> plan(arena, shape, threads);
  plan.pack(at(in.weight, 0), at(in.bias, 0));
  Input<T> input;
  input.x = {at(in.x, 0), shape.channels, in.x_pixel};
  input.period = plan.in_period;
  input.affine = plan.x_affine.set(in.x_stats, shape.channels, in.x_activation, in.x_slope);
  const int64_t outputs = shape.out_channels, period = plan.out_period;
  const Affine<T> after = plan.y_affine.set(in.y_stats, outputs, in.y_activation, in.y_slope);
  const bool gather_moments = in.stats != nullptr;
  const int ranks = plan.run(input, static_cast<T *>(in.z), threads, [&](const auto &thread, T *z, int64_t pixels) {
    if (gather_moments) thread.moments.add(z, pixels * outputs, period);
    if (!after.identity()) apply_affine(z, pixels * outputs, period, after, z);
  });
  if (gather_moments) {
    for (int64_t i = 0; i < outputs; ++i) {
      MeanAndM2 total;
      for (int rank = 0; rank < ranks; ++rank)
        for (int64_t j = i; j < period; j += outputs) total.join(plan.threads[rank].moments, j);
      write_stats(i, total.mean, total.m2 / total.count, at(in.bn_weight, 0), at(in.bn_bias, 0), in.eps, outputs,
                  static_cast<T *>(in.stats));
    }
  }
  return FF_OK;
}

// ---- backward

// Rows of planes whose weight gradient is summed up at once.
constexpr int64_t kBand = 8;

template <class T>
struct Backward {
  struct Thread {
    RowCache<T> x_rows, dz_rows;
    T *x_tile, *dz_tile, *scratch, *dx, *dx_planes;
    T *weight_sums;          // dense: per block [output][ky][kx][input]
    double *depthwise_sums;  // depthwise: [tap][period]
    GradientSums sums;
  };

  ConvShape shape;
  Blocks blocks;
  bool flat;
  PlanarGroups planes;
  PlanarRow<T> planar_row;
  int64_t in_period, out_period;
  DepthwiseRow<T> dx_row, weight_row;
  T *packed;
  AffineMemory<T> x_affine, z_affine;
  T *b, *c;
  Thread *threads;

  // A dense convolution reads the gradient of a larger stride through zeros between its pixels.
  int64_t dilation() const { return shape.depthwise() ? 1 : shape.stride; }
  int64_t weight_length() const {
    return planes.groups ? planes.sums_length<T>() : blocks.count * blocks.outputs * weight_step();
  }
  int64_t weight_step() const { return shape.kernel * shape.kernel * blocks.inputs; }

  Backward(Arena &arena, const ConvShape &s, int thread_count)
      : shape(s),
        blocks(Blocks::of<T>(s)),
        flat(s.kernel == 1 && s.stride == 1 && s.padding == 0),
        planes(planar<T>(s) ? PlanarGroups::of(arena, s) : PlanarGroups{}),
        planar_row{s.width},
        in_period(period_of<T>(s.channels)),
        out_period(period_of<T>(s.out_channels)),
        dx_row{s.width, s.channels, 1},
        weight_row{s.out_width(), s.channels, s.stride},
        packed(arena.take<T>(s.depthwise() ? s.kernel * s.kernel * (dx_row.period() + Vec<T>::kLanes)
                                           : blocks.count * s.kernel * s.kernel * blocks.outputs *
                                                 whole_vectors<T>(blocks.inputs))),
        x_affine(arena, in_period),
        z_affine(arena, out_period),
        b(arena.take<T>(out_period + Vec<T>::kLanes)),
        c(arena.take<T>(out_period + Vec<T>::kLanes)),
        threads(arena.take<Thread>(thread_count)) {
    const int64_t k = s.kernel;
    for (int i = 0; i < thread_count; ++i) {
      Thread t;
      if (flat) {
        t.x_tile = arena.take<T>(kTile * s.channels);
        t.dz_tile = arena.take<T>(kTile * s.out_channels);
      } else if (planes.groups) {
        t.x_rows = RowCache<T>(arena, kBand + 2, s.channels * planar_row.step());
        t.dz_rows = RowCache<T>(arena, kBand + 2, s.out_channels * planar_row.step());
        t.x_tile = arena.take<T>(s.width * s.channels);
        t.dz_tile = arena.take<T>(s.width * s.out_channels);
        t.dx_planes = arena.take<T>(s.channels * planar_row.step());
      } else {
        t.x_rows = RowCache<T>(arena, k, (s.width + 2 * s.padding) * s.channels);
        t.dz_rows = RowCache<T>(arena, k + 1, std::max(s.width + k - 1, s.out_width() * s.stride + k) * s.out_channels);
        t.x_tile = arena.take<T>(s.width * s.channels);
        t.dz_tile = arena.take<T>(s.out_width() * s.out_channels);
      }
      t.scratch = arena.take<T>((flat ? kTile : s.out_width()) * s.out_channels);
      t.dx = arena.take<T>((flat ? kTile : s.width) * s.channels);
      t.weight_sums = s.depthwise() ? nullptr : arena.take<T>(weight_length());
      t.depthwise_sums = s.depthwise() ? arena.take<double>(k * k * (weight_row.period() + Vec<T>::kLanes)) : nullptr;
      t.sums = GradientSums::take<T>(arena, in_period);
      if (threads != nullptr) threads[i] = t;
    }
  }

  void clear(Thread &t) const {
    t.sums.template clear<T>(in_period);
    if (t.weight_sums) std::fill_n(t.weight_sums, weight_length(), T(0));
    if (t.depthwise_sums)
      std::fill_n(t.depthwise_sums, shape.kernel * shape.kernel * (weight_row.period() + Vec<T>::kLanes), 0.0);
  }

  // dx = gradient of one input row; rows[i] are padded rows of dz, their pixels dilation() apart, and taps[i] the
  // reversed filter row of each.
  void input_row(const T *const *rows, const int64_t *taps, int64_t count, int64_t pixels, T *dx) const {
    const int64_t k = shape.kernel, columns = whole_vectors<T>(blocks.inputs);
    if (shape.depthwise()) {
      const T *weights[kMaxKernel];
      const int64_t step = dx_row.period() + Vec<T>::kLanes;
      for (int64_t i = 0; i < count; ++i) weights[i] = packed + taps[i] * k * step;
      if (shape.stride > 1)
        return depthwise_strided_gradient(shape, rows, weights, count, k - 1 - shape.padding, step, dx);
      DepthwiseRow<T> part = dx_row;
      part.pixels = pixels;
      return depthwise<T>(part, k, count, rows, weights, nullptr, dx);
    }
    const T *points[kMaxKernel];
    Product<T> p;
    p.a_row = shape.out_channels;
    p.a_step = 1;
    p.b_step = columns;
    p.c_row = shape.channels;
    p.a = points;
    p.length = blocks.count == 1 ? k * shape.out_channels : blocks.outputs;
    if (count == 0) std::fill_n(dx, pixels * shape.channels, T(0));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t kx = 0; kx < (blocks.count == 1 ? 1 : k); ++kx)
        for (int64_t block = 0; block < blocks.count; ++block) {
          points[0] = rows[i] + kx * shape.out_channels;
          p.accumulate = i + kx > 0;
          p.a_offset = block * blocks.outputs;
          p.b = packed + ((block * k + taps[i]) * k + kx) * blocks.outputs * columns;
          p.c = dx + block * blocks.inputs;
          multiply(p, pixels, blocks.inputs);
        }
  }

  // Adds the weight gradient of one output row: dz has its pixels `stride` apart, rows[ky] are padded input rows.
  void weight_row_sums(const Thread &t, const T *const *rows, const T *dz, int64_t pixels, int64_t stride) const {
    const int64_t k = shape.kernel;
    if (shape.depthwise()) {
      DepthwiseRow<T> part = weight_row;
      part.pixels = pixels;
      const int64_t step = part.period() + Vec<T>::kLanes;
      for (int64_t ky = 0; ky < k; ++ky) {
        if (k == 3) {
          depthwise_weight_row<T, 3>(part, rows[ky], dz, t.depthwise_sums + ky * 3 * step);
          continue;
        }
        for (int64_t kx = 0; kx < k; ++kx)
          depthwise_weight_row<T, 1>(part, rows[ky] + kx * shape.channels, dz, t.depthwise_sums + (ky * k + kx) * step);
      }
      return;
    }
    Product<T> p;
    p.a = &dz;
    p.a_row = 1;
    p.a_step = stride * shape.out_channels;
    p.length = pixels;
    p.b_step = shape.stride * shape.channels;
    p.c_row = weight_step();
    p.accumulate = true;
    const bool whole = blocks.count == 1;
    for (int64_t block = 0; block < blocks.count; ++block)
      for (int64_t ky = 0; ky < k; ++ky)
        for (int64_t kx = 0; kx < (whole ? 1 : k); ++kx) {
          p.a_offset = block * blocks.outputs;
          p.b = rows[ky] + kx * shape.channels + block * blocks.inputs;
          p.c = t.weight_sums + block * blocks.outputs * weight_step() + (ky * k + kx) * blocks.inputs;
          multiply(p, blocks.outputs, whole ? k * shape.channels : blocks.inputs);
        }
  }

  // dx(memory), then the gradient that leaves this convolution: dx itself, or through the activation and sums before
  // it.
  template <class Task, class Compute>
  void leave(const Thread &t, const Task &task, int64_t first, int64_t pixels, const Compute &compute) const {
    const bool dense = task.grad_x_pixel == shape.channels;
    T *dx = dense ? task.grad_x + first * shape.channels : t.dx;
    compute(dx);
    const Input<T> &input = task.input;
    if (input.affine.activation != FF_NONE || task.x_sums) {
      const T *raw = input.x.data + first * input.x.pixel;
      if (!input.x.dense()) gather(input.x, first, pixels, t.x_tile), raw = t.x_tile;
      activation_backward(dx, raw, pixels * shape.channels, in_period, input.affine, dx,
                          task.x_sums ? &t.sums : nullptr);
    }
    for (int64_t i = 0; i < pixels && !dense; ++i)
      copy(dx + i * shape.channels, shape.channels, task.grad_x + (first + i) * task.grad_x_pixel);
  }

  struct Task {
    const Input<T> &input;
    const OutputGradient<T> &gradient;
    T *grad_x;
    int64_t grad_x_pixel;
    bool x_sums, weight;
  };

  int run_tiles(const Task &task, int thread_count) {
    const int64_t pixels = shape.out_pixels(), tiles = (pixels + kTile - 1) / kTile;
    const bool in_place = !shape.depthwise();
    return parallel_ranks(tiles, grain_rows(shape, kTile), thread_count, [&](int rank, int64_t begin, int64_t end) {
      Thread &t = threads[rank];
      clear(t);
      const int64_t tap = 0;
      for (int64_t first = begin * kTile; first < std::min(end * kTile, pixels); first += kTile) {
        const int64_t count = std::min(kTile, pixels - first);
        const T *dz = in_place && task.gradient.identity() && task.gradient.grad.dense()
                          ? task.gradient.grad.data + first * shape.out_channels
                          : t.dz_tile;
        if (dz == t.dz_tile) task.gradient.read(first, count, t.dz_tile, t.scratch);
        if (task.weight) {
          // Whole vectors are read, and past the last pixel lies nothing.
          const bool direct =
              in_place && task.input.affine.identity() && task.input.x.dense() && blocks.inputs % Vec<T>::kLanes == 0;
          const T *x = direct ? task.input.x.data + first * shape.channels : t.x_tile;
          if (!direct) task.input.read(first, count, t.x_tile);
          weight_row_sums(t, &x, dz, count, 1);
        }
        if (task.grad_x != nullptr) leave(t, task, first, count, [&](T *dx) { input_row(&dz, &tap, 1, count, dx); });
      }
    });
  }

  int run_rows(const Task &task, int thread_count) {
    const int64_t k = shape.kernel, s = shape.stride, height = shape.height, width = shape.width;
    const int64_t out_height = shape.out_height(), out_width = shape.out_width();
    const int64_t before = k - 1 - shape.padding;
    return parallel_ranks(
        shape.batch * height, grain_rows(shape, out_width), thread_count, [&](int rank, int64_t begin, int64_t end) {
          Thread t = threads[rank];
          clear(t);
          t.x_rows.clear();
          t.dz_rows.clear();
          for (int64_t r = begin; r < end; ++r) {
            const int64_t image = r / height, y = r % height;
            if (y == 0) t.x_rows.forget(), t.dz_rows.forget();
            const auto gradient_row = [&](int64_t oy) -> const T * {
              return t.dz_rows.get(oy, [&](T *row) {
                const auto read = [&](T *out) {
                  task.gradient.read((image * out_height + oy) * out_width, out_width, out, t.scratch);
                };
                fill_row(read, out_width, shape.out_channels, before, dilation(), row, t.dz_tile);
              });
            };
            // An output row belongs to the input row at its centre tap, or to the last one.
            const int64_t last = y == height - 1 ? out_height : std::min(out_height, y / s + 1);
            for (int64_t oy = (y + s - 1) / s; task.weight && oy < last; ++oy) {
              const T *rows[kMaxKernel];
              for (int64_t ky = 0; ky < k; ++ky) {
                const int64_t source = oy * s - shape.padding + ky;
                rows[ky] = source < 0 || source >= height
                               ? t.x_rows.zeros()
                               : t.x_rows.get(
                                     source,
                                     [&](T *row) {
                                       task.input.read((image * height + source) * width, width,
                                                       row + shape.padding * shape.channels);
                                     });
              }
              weight_row_sums(t, rows, gradient_row(oy) + before * shape.out_channels, out_width, dilation());
            }
            if (task.grad_x == nullptr) continue;
            const T *rows[kMaxKernel];
            int64_t taps[kMaxKernel], count = 0;
            for (int64_t tap = 0; tap < k; ++tap) {
              const int64_t dilated = y - before + tap;
              const bool inside = dilated >= 0 && dilated % s == 0 && dilated / s < out_height;
              if (!inside && s > 1) continue;
              rows[count] = inside ? gradient_row(dilated / s) : t.dz_rows.zeros();
              taps[count++] = tap;
            }
            leave(t, task, r * width, width, [&](T *dx) { input_row(rows, taps, count, width, dx); });
          }
        });
  }

  int run_planes(const Task &task, int thread_count) {
    const int64_t height = shape.height, width = shape.width, grain = grain_rows(shape, width);
    return parallel_ranks(shape.batch * height, grain, thread_count, [&](int rank, int64_t begin, int64_t end) {
      Thread t = threads[rank];
      clear(t);
      t.x_rows.clear();
      t.dz_rows.clear();
      for (int64_t band = begin, count; band < end; band += count) {
        const int64_t image = band / height, y = band % height;
        count = std::min({kBand, height - y, end - band});
        if (y == 0) t.x_rows.forget(), t.dz_rows.forget();
        const T *x[kBand + 2], *dz[kBand + 2];
        for (int64_t i = 0; i < count + 2; ++i) {
          const int64_t row = y + i - 1, first = (image * height + row) * width;
          const bool inside = row >= 0 && row < height;
          x[i] = !inside || !task.weight ? t.x_rows.zeros() : t.x_rows.get(row, [&](T *out) {
            task.input.read(first, width, t.x_tile);
            to_planes(planar_row, t.x_tile, shape.channels, out);
          });
          dz[i] = !inside ? t.dz_rows.zeros() : t.dz_rows.get(row, [&](T *out) {
            task.gradient.read(first, width, t.dz_tile, t.scratch);
            to_planes(planar_row, t.dz_tile, shape.out_channels, out);
          });
        }
        if (task.weight) planes.add_weight_gradient(planar_row, x, dz + 1, count, t.weight_sums);
        for (int64_t i = 0; i < count && task.grad_x != nullptr; ++i)
          leave(t, task, (band + i) * width, width, [&](T *dx) {
            planes.convolve_back(planar_row, dz + i, packed, t.dx_planes);
            from_planes(planar_row, t.dx_planes, shape.channels, dx);
          });
      }
    });
  }

  void write_planar_weight_gradient(int ranks, T *grad) const {
    for (int64_t g = 0; g < planes.groups; ++g)
      for (int64_t j = 0; j < planes.outputs; ++j)
        for (int64_t i = 0; i < planes.inputs; ++i)
          for (int64_t tap = 0; tap < 9; ++tap) {
            double total = 0;
            for (int rank = 0; rank < ranks; ++rank)
              total += planes.weight_gradient(threads[rank].weight_sums, g, j, i, tap);
            grad[(planes.output[g * planes.outputs + j] * planes.inputs + i) * 9 + tap] = T(total);
          }
  }

  void write_weight_gradient(int ranks, T *grad) const {
    if (planes.groups) return write_planar_weight_gradient(ranks, grad);
    const int64_t in = shape.channels / shape.groups;
    const int64_t area = shape.kernel * shape.kernel;
    for (int64_t o = 0; o < shape.out_channels; ++o) {
      const int64_t block = o / blocks.outputs, first = shape.group_of(o) * in - block * blocks.inputs;
      for (int64_t i = 0; i < in; ++i)
        for (int64_t tap = 0; tap < area; ++tap) {
          double total = 0;
          for (int rank = 0; rank < ranks; ++rank) {
            if (shape.depthwise()) {
              const int64_t period = weight_row.period();
              for (int64_t j = o; j < period; j += shape.channels)
                total += threads[rank].depthwise_sums[tap * (period + Vec<T>::kLanes) + j];
            } else {
              total += threads[rank].weight_sums[o * weight_step() + tap * blocks.inputs + first + i];
            }
          }
          grad[(o * in + i) * area + tap] = T(total);
        }
    }
  }
};

struct BackwardArguments {
  const void *grad;
  int64_t grad_pixel;
  const void *z;
  int64_t z_pixel;
  const void *stats;
  const double *sums;
  int training, activation;
  double slope, eps;
  const void *x;
  int64_t x_pixel;
  const void *x_stats;
  int x_activation;
  double x_slope;
  const void *weight;
  void *grad_x;
  int64_t grad_x_pixel;
  double *x_sums;
  void *grad_weight, *workspace;
};

template <class T>
int backward(const BackwardArguments &in, const ConvShape &shape, int threads) {
  const auto at = [](const void *p, int64_t i) { return p ? static_cast<const T *>(p) + i : nullptr; };
  const int64_t inputs = shape.channels, outputs = shape.out_channels;
  Arena arena(in.workspace);
  Backward<T> plan(arena, shape, threads);

  Input<T> input;
  input.x = {at(in.x, 0), inputs, in.x_pixel};
  input.period = plan.in_period;
  input.affine = plan.x_affine.set(in.x_stats, inputs, in.x_activation, in.x_slope);

  OutputGradient<T> gradient;
  gradient.grad = {at(in.grad, 0), outputs, in.grad_pixel};
  gradient.z = {at(in.z, 0), outputs, in.z_pixel};
  gradient.affine = plan.z_affine.set(in.stats, outputs, in.activation, in.slope);
  gradient.activated = in.activation != FF_NONE;
  gradient.period = plan.out_period;
  if (in.training) {
    const double n = static_cast<double>(shape.out_pixels());
    std::fill_n(plan.b, plan.out_period + Vec<T>::kLanes, T(0));
    std::fill_n(plan.c, plan.out_period + Vec<T>::kLanes, T(0));
    for (int64_t i = 0; i < plan.out_period; ++i) {
      const int64_t o = i % outputs;
      plan.b[i] = T(in.sums[o] / n);
      plan.c[i] = T(in.sums[outputs + o] / (n * (*at(in.stats, outputs + o) + in.eps)));
    }
    gradient.b = plan.b;
    gradient.c = plan.c;
  }

  if (in.grad_x != nullptr) {
    if (shape.depthwise())
      pack_depthwise(at(in.weight, 0), inputs, shape.kernel * shape.kernel, plan.dx_row.period(), true, plan.packed);
    else if (plan.planes.groups)
      plan.planes.pack(at(in.weight, 0), true, plan.packed);
    else
      pack_backward(at(in.weight, 0), shape, plan.blocks, plan.packed);
  }
  const typename Backward<T>::Task task{
      input, gradient, static_cast<T *>(in.grad_x), in.grad_x_pixel, in.x_sums != nullptr, in.grad_weight != nullptr};
  const int ranks = plan.flat            ? plan.run_tiles(task, threads)
                    : plan.planes.groups ? plan.run_planes(task, threads)
                                         : plan.run_rows(task, threads);
  if (in.grad_weight != nullptr) plan.write_weight_gradient(ranks, static_cast<T *>(in.grad_weight));
  if (in.x_sums != nullptr)
    join_sums(ranks, inputs, plan.in_period, [&](int rank) { return plan.threads[rank].sums; }, in.x_sums);
  return FF_OK;
}

}  // namespace

extern "C" int64_t ff_cpu_conv_workspace(int is_backward, int64_t batch, int64_t channels, int64_t height,
                                         int64_t width, int64_t out_channels, int64_t kernel, int64_t stride,
                                         int64_t padding, int64_t groups, int64_t split, int dtype, int threads) {
  const ConvShape shape{batch, channels, height, width, out_channels, kernel, stride, padding, groups, split};
  if (!shape.valid()) return 0;
  Arena arena;
  if (dtype == FF_FLOAT32)
    is_backward ? void(Backward<float>(arena, shape, threads)) : void(Forward<float>(arena, shape, threads));
  else
    is_backward ? void(Backward<double>(arena, shape, threads)) : void(Forward<double>(arena, shape, threads));
  return arena.bytes();
}

extern "C" int ff_cpu_conv_forward(const void *x, int64_t x_pixel, const void *x_stats, int x_activation,
                                   double x_slope, const void *weight, const void *bias, void *z, void *stats,
                                   const void *bn_weight, const void *bn_bias, double eps, const void *y_stats,
                                   int y_activation, double y_slope, int64_t batch, int64_t channels, int64_t height,
                                   int64_t width, int64_t out_channels, int64_t kernel, int64_t stride, int64_t padding,
                                   int64_t groups, int64_t split, void *workspace, int dtype, int threads) {
  const ConvShape shape{batch, channels, height, width, out_channels, kernel, stride, padding, groups, split};
  if (!shape.valid() || batch == 0) return FF_BAD_ARGUMENT;
  const ForwardArguments in{x,     x_pixel,   x_stats, x_activation, x_slope, weight,       bias,    z,
                            stats, bn_weight, bn_bias, eps,          y_stats, y_activation, y_slope, workspace};
  if (dtype == FF_FLOAT32) return forward<float>(in, shape, threads);
  if (dtype == FF_FLOAT64) return forward<double>(in, shape, threads);
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_conv_backward(const void *grad, int64_t grad_pixel, const void *z, int64_t z_pixel,
                                    const void *stats, const double *sums, int training, int activation, double slope,
                                    double eps, const void *x, int64_t x_pixel, const void *x_stats, int x_activation,
                                    double x_slope, const void *weight, void *grad_x, int64_t grad_x_pixel,
                                    double *x_sums, void *grad_weight, int64_t batch, int64_t channels, int64_t height,
                                    int64_t width, int64_t out_channels, int64_t kernel, int64_t stride,
                                    int64_t padding, int64_t groups, int64_t split, void *workspace, int dtype,
                                    int threads) {
  const ConvShape shape{batch, channels, height, width, out_channels, kernel, stride, padding, groups, split};
  if (!shape.valid() || batch == 0) return FF_BAD_ARGUMENT;
  const BackwardArguments in{grad,   grad_pixel,   z,      z_pixel,     stats,    sums,         training, activation,
                             slope,  eps,          x,      x_pixel,     x_stats,  x_activation, x_slope,  weight,
                             grad_x, grad_x_pixel, x_sums, grad_weight, workspace};
  if (dtype == FF_FLOAT32) return backward<float>(in, shape, threads);
  if (dtype == FF_FLOAT64) return backward<double>(in, shape, threads);
  return FF_UNSUPPORTED_DTYPE;
}

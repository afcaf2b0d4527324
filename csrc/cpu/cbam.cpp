// One application of CBAM on NHWC tensors, forward and backward: y = activation(x * g * s + residual), g a gate per
// image and channel, s a gate per image, channel group and pixel.
//
// Forward reads x three times: for the sums and maxima per channel, for the mean and maximum maps of u = x * g, and for
// the result. The maps and everything made of them are planes (group, row, column), a few values per pixel.
#include <algorithm>
#include <cmath>
#include <limits>

#include "activation.h"
#include "arena.h"
#include "ff_api.h"
#include "parallel.h"

namespace {

using namespace ff;

constexpr int64_t kGrainElements = 16 * 1024;
constexpr int64_t kBlock = 64;  // pixels between two additions to sums in double

struct Shape {
  int64_t batch, channels, height, width, hidden, mlp_width, groups, kernel;
  bool max_first;

  int64_t pixels() const { return height * width; }
  int64_t per_group() const { return channels / groups; }
  int64_t padding() const { return kernel / 2; }
  int64_t mean_map(int64_t group) const { return 2 * group + (max_first ? 1 : 0); }
  int64_t max_map(int64_t group) const { return 2 * group + (max_first ? 0 : 1); }
};

template <class T, class Body>
FF_INLINE void over_channels(int64_t channels, const Body &body) {
  int64_t c = 0;
  for (; c + Vec<T>::kLanes <= channels; c += Vec<T>::kLanes) body(c, AllLanes{});
  if (c < channels) body(c, FirstLanes{static_cast<int>(channels - c)});
}

// Lanes beyond the mask become `other`.
template <class T>
FF_INLINE Vec<T> or_else(Vec<T> v, T, AllLanes) {
  return v;
}
template <class T>
FF_INLINE Vec<T> or_else(Vec<T> v, T other, FirstLanes mask) {
  for (int i = mask.count; i < Vec<T>::kLanes; ++i) v.v[i] = other;
  return v;
}

template <class T>
FF_INLINE T largest_lane(Vec<T> v) {
  T largest = v.v[0];
  for (int i = 1; i < Vec<T>::kLanes; ++i) {
    const T value = v.v[i];
    largest = largest != largest || value <= largest ? largest : value;
  }
  return largest;
}

// Splits `pixels` of every image over threads: body(rank, image, first, count) with count <= kBlock, image by image.
template <class Body>
int over_blocks(const Shape &s, int threads, const Body &body) {
  const int64_t per_image = (s.pixels() + kBlock - 1) / kBlock;
  return parallel_ranks(s.batch * per_image, kGrainElements / (kBlock * s.channels) + 1, threads,
                        [&](int rank, int64_t begin, int64_t end) {
                          for (int64_t block = begin; block < end; ++block) {
                            const int64_t first = block % per_image * kBlock;
                            body(rank, block / per_image, first, std::min(kBlock, s.pixels() - first));
                          }
                        });
}

// ---- channel gate

// The MLP on the chunks of one pooled vector (channels): out += fc2(relu(fc1(v))); hidden (chunks, hidden) keeps fc1's.
template <class T>
struct Mlp {
  const T *w1, *b1, *w2, *b2;
  int64_t width, hidden;

  void forward(const double *v, int64_t channels, double *kept, double *out) const {
    for (int64_t chunk = 0; chunk < channels / width; ++chunk) {
      const double *in = v + chunk * width;
      double *h = kept + chunk * hidden;
      for (int64_t i = 0; i < hidden; ++i) {
        double sum = b1 ? double(b1[i]) : 0.0;
        for (int64_t j = 0; j < width; ++j) sum += w1[i * width + j] * in[j];
        h[i] = sum < 0 ? 0.0 : sum;
      }
      for (int64_t j = 0; j < width; ++j) {
        double sum = b2 ? double(b2[j]) : 0.0;
        for (int64_t i = 0; i < hidden; ++i) sum += w2[j * hidden + i] * h[i];
        out[chunk * width + j] += sum;
      }
    }
  }

  // grad (channels) of the output -> grad_v; parameters' gradients are added to d*, each (may be nullptr).
  void backward(const double *v, int64_t channels, const double *kept, const double *grad, double *grad_v, double *dw1,
                double *db1, double *dw2, double *db2) const {
    std::fill_n(grad_v, channels, 0.0);
    for (int64_t chunk = 0; chunk < channels / width; ++chunk) {
      const double *g = grad + chunk * width, *h = kept + chunk * hidden, *in = v + chunk * width;
      for (int64_t j = 0; j < width; ++j) db2[j] += g[j];
      for (int64_t i = 0; i < hidden; ++i) {
        double dh = 0;
        for (int64_t j = 0; j < width; ++j) {
          dh += g[j] * w2[j * hidden + i];
          dw2[j * hidden + i] += g[j] * h[i];
        }
        if (h[i] <= 0) continue;
        db1[i] += dh;
        for (int64_t j = 0; j < width; ++j) {
          dw1[i * width + j] += dh * in[j];
          grad_v[chunk * width + j] += dh * w1[i * width + j];
        }
      }
    }
  }
};

double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }

struct Forward {
  const void *x, *w1, *b1, *w2, *b2, *conv;
  void *pooled, *gate, *maps, *z;
};

// Sums and maxima of `count` pixels added to sum (double) and largest.
template <class T>
void pool_block(const T *x, int64_t count, int64_t channels, double *sum, T *largest) {
  over_channels<T>(channels, [&](int64_t c, auto mask) {
    Vec<T> total = Vec<T>::zero(), most = load(largest + c, mask);
    for (int64_t p = 0; p < count; ++p) {
      const Vec<T> value = load(x + p * channels + c, mask);
      total += value;
      most = Vec<T>::larger(most, value);
    }
    store(largest + c, most, mask);
    for (int i = 0; i < Vec<T>::kLanes && c + i < channels; ++i) sum[c + i] += total.v[i];
  });
}

template <class T>
struct ForwardPlan {
  double *sums, *hidden, *mlp;  // sums (threads, batch, channels)
  T *largest, *padded;          // largest (threads, batch, channels)

  ForwardPlan(Arena &arena, const Shape &s, int threads)
      : sums(arena.take<double>(threads * s.batch * s.channels)),
        hidden(arena.take<double>(s.channels / s.mlp_width * s.hidden)),
        mlp(arena.take<double>(2 * s.channels)),
        largest(arena.take<T>(threads * s.batch * s.channels)),
        padded(arena.take<T>(s.batch * 2 * s.groups * padded_plane(s))) {}

  static int64_t padded_width(const Shape &s) { return s.width + 2 * s.padding() + Vec<T>::kLanes; }
  static int64_t padded_plane(const Shape &s) { return (s.height + 2 * s.padding()) * padded_width(s); }
};

// planes (count, height, width) -> padded by zeros on every side; rows are followed by room for a whole vector.
template <class T>
void pad_planes(const Shape &s, const T *planes, int64_t count, T *padded, int threads) {
  const int64_t step = ForwardPlan<T>::padded_width(s), plane = ForwardPlan<T>::padded_plane(s), pad = s.padding();
  parallel_for(count, kGrainElements / plane + 1, threads, [&](int64_t begin, int64_t end) {
    std::fill(padded + begin * plane, padded + end * plane, T(0));
    for (int64_t i = begin; i < end; ++i)
      for (int64_t y = 0; y < s.height; ++y)
        std::copy_n(planes + (i * s.height + y) * s.width, s.width, padded + i * plane + (y + pad) * step + pad);
  });
}

// out (height, width) (+)= correlation of a padded plane with a k x k filter, reversed for the transposed one.
template <class T>
void correlate(const Shape &s, const T *padded, const T *filter, bool reversed, bool accumulate, int64_t row_begin,
               int64_t row_end, T *out) {
  const int64_t step = ForwardPlan<T>::padded_width(s), k = s.kernel;
  for (int64_t y = row_begin; y < row_end; ++y)
    over_channels<T>(s.width, [&](int64_t x, auto mask) {
      Vec<T> sum = accumulate ? load(out + y * s.width + x, mask) : Vec<T>::zero();
      for (int64_t ky = 0; ky < k; ++ky) {
        const T *row = padded + (y + ky) * step + x;
        for (int64_t kx = 0; kx < k; ++kx)
          sum = sum + Vec<T>::load(row + kx) * Vec<T>(filter[reversed ? k * k - 1 - ky * k - kx : ky * k + kx]);
      }
      store(out + y * s.width + x, sum, mask);
    });
}

template <class T>
int forward(const Forward &in, const Shape &s, void *workspace, int threads) {
  Arena arena(workspace);
  const ForwardPlan<T> plan(arena, s, threads);
  const T *x = static_cast<const T *>(in.x);
  T *pooled = static_cast<T *>(in.pooled), *gate = static_cast<T *>(in.gate), *maps = static_cast<T *>(in.maps);
  const int64_t vectors = s.batch * s.channels, n = s.pixels();

  std::fill_n(plan.sums, threads * vectors, 0.0);
  std::fill_n(plan.largest, threads * vectors, -std::numeric_limits<T>::infinity());
  over_blocks(s, threads, [&](int rank, int64_t image, int64_t first, int64_t count) {
    const int64_t at = rank * vectors + image * s.channels;
    pool_block(x + (image * n + first) * s.channels, count, s.channels, plan.sums + at, plan.largest + at);
  });
  const Mlp<T> mlp{static_cast<const T *>(in.w1),
                   static_cast<const T *>(in.b1),
                   static_cast<const T *>(in.w2),
                   static_cast<const T *>(in.b2),
                   s.mlp_width,
                   s.hidden};
  for (int64_t image = 0; image < s.batch; ++image) {
    double *v = plan.mlp, *out = plan.mlp + s.channels;
    T *mean = pooled + image * s.channels, *largest = pooled + vectors + image * s.channels;
    std::fill_n(out, s.channels, 0.0);
    for (int64_t c = 0; c < s.channels; ++c) {
      double sum = 0;
      T most = plan.largest[image * s.channels + c];
      for (int rank = 0; rank < threads; ++rank) {
        const int64_t at = rank * vectors + image * s.channels + c;
        sum += plan.sums[at];
        const T value = plan.largest[at];
        most = most != most || value <= most ? most : value;
      }
      mean[c] = T(v[c] = sum / double(n));
      largest[c] = most;
    }
    mlp.forward(v, s.channels, plan.hidden, out);
    for (int64_t c = 0; c < s.channels; ++c) v[c] = largest[c];
    mlp.forward(v, s.channels, plan.hidden, out);
    for (int64_t c = 0; c < s.channels; ++c) gate[image * s.channels + c] = T(sigmoid(out[c]));
  }

  const int64_t per_group = s.per_group();
  over_blocks(s, threads, [&](int, int64_t image, int64_t first, int64_t count) {
    const T *g = gate + image * s.channels;
    for (int64_t group = 0; group < s.groups; ++group) {
      T *means = maps + (image * 2 * s.groups + s.mean_map(group)) * n + first;
      T *maxima = maps + (image * 2 * s.groups + s.max_map(group)) * n + first;
      for (int64_t p = 0; p < count; ++p) {
        const T *pixel = x + (image * n + first + p) * s.channels + group * per_group;
        Vec<T> sum = Vec<T>::zero(), most(-std::numeric_limits<T>::infinity());
        over_channels<T>(per_group, [&](int64_t c, auto mask) {
          const Vec<T> u = load(pixel + c, mask) * load(g + group * per_group + c, mask);
          sum += u;
          most = Vec<T>::larger(most, or_else(u, -std::numeric_limits<T>::infinity(), mask));
        });
        means[p] = sum.sum() / T(per_group);
        maxima[p] = largest_lane(most);
      }
    }
  });

  pad_planes(s, maps, s.batch * 2 * s.groups, plan.padded, threads);
  const T *conv = static_cast<const T *>(in.conv);
  const int64_t rows = s.batch * s.groups * s.height, area = s.kernel * s.kernel;
  parallel_for(rows, kGrainElements / (2 * area * s.width) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / s.height, y = row % s.height, group = plane % s.groups;
      for (int64_t m = 0; m < 2; ++m)
        correlate(s, plan.padded + (2 * plane + m) * ForwardPlan<T>::padded_plane(s), conv + (2 * group + m) * area,
                  false, m > 0, y, y + 1, static_cast<T *>(in.z) + plane * n);
    }
  });
  return FF_OK;
}

// y = x * g * s, plus residual, relu of that; spatial gate s (batch, groups, pixels).
template <class T>
int apply(const T *x, const T *gate, const T *spatial, const T *residual, bool relu, T *y, const Shape &s,
          int threads) {
  const int64_t n = s.pixels(), per_group = s.per_group();
  over_blocks(s, threads, [&](int, int64_t image, int64_t first, int64_t count) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t group = 0; group < s.groups; ++group) {
        const int64_t at = (image * n + first + p) * s.channels + group * per_group;
        const Vec<T> factor(spatial[(image * s.groups + group) * n + first + p]);
        const T *g = gate + image * s.channels + group * per_group;
        over_channels<T>(per_group, [&](int64_t c, auto mask) {
          Vec<T> value = load(x + at + c, mask) * load(g + c, mask) * factor;
          if (residual != nullptr) value = value + load(residual + at + c, mask);
          if (relu) value = Vec<T>::if_negative(value, Vec<T>::zero());
          store(y + at + c, value, mask);
        });
      }
  });
  return FF_OK;
}

// ---- backward

// Gradient of y in front of the ReLU, which is open where y is not at or below zero.
template <class T, class Mask>
FF_INLINE Vec<T> before_relu(const T *grad, const T *y, int64_t at, Mask mask) {
  const Vec<T> g = load(grad + at, mask);
  if (y == nullptr) return g;
  return load(y + at, mask).v <= typename Vec<T>::Native{} ? typename Vec<T>::Native{} : g.v;
}

// grad_s (batch, groups, pixels): sum over the group's channels of grad * x * g.
template <class T>
int spatial_gradient(const T *grad, const T *y, const T *x, const T *gate, T *grad_s, const Shape &s, int threads) {
  const int64_t n = s.pixels(), per_group = s.per_group();
  over_blocks(s, threads, [&](int, int64_t image, int64_t first, int64_t count) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t group = 0; group < s.groups; ++group) {
        const int64_t at = (image * n + first + p) * s.channels + group * per_group;
        const T *g = gate + image * s.channels + group * per_group;
        Vec<T> sum = Vec<T>::zero();
        over_channels<T>(per_group, [&](int64_t c, auto mask) {
          sum += before_relu(grad, y, at + c, mask) * (load(x + at + c, mask) * load(g + c, mask));
        });
        grad_s[(image * s.groups + group) * n + first + p] = sum.sum();
      }
  });
  return FF_OK;
}

struct Backward {
  const void *grad, *y, *x, *w1, *b1, *w2, *b2, *conv, *pooled, *gate, *maps, *spatial, *grad_z;
  int add_grad;
  void *grad_x;
  double *grad_w1, *grad_b1, *grad_w2, *grad_b2, *grad_conv;
};

template <class T>
struct BackwardPlan {
  double *dg, *ties;  // (threads, batch, channels)
  double *v, *out, *hidden, *grad_mean, *grad_max;
  T *padded_z, *padded_maps, *grad_maps, *coefficients;
  double *conv_sums;  // (threads, groups * 2 * kernel^2)

  BackwardPlan(Arena &arena, const Shape &s, int threads)
      : dg(arena.take<double>(threads * s.batch * s.channels)),
        ties(arena.take<double>(threads * s.batch * s.channels)),
        v(arena.take<double>(s.channels)),
        out(arena.take<double>(s.channels)),
        hidden(arena.take<double>(2 * s.channels / s.mlp_width * s.hidden)),
        grad_mean(arena.take<double>(s.channels)),
        grad_max(arena.take<double>(s.channels)),
        padded_z(arena.take<T>(s.batch * s.groups * ForwardPlan<T>::padded_plane(s))),
        padded_maps(arena.take<T>(s.batch * 2 * s.groups * ForwardPlan<T>::padded_plane(s))),
        grad_maps(arena.take<T>(s.batch * 2 * s.groups * s.pixels())),
        coefficients(arena.take<T>(2 * s.batch * s.channels)),
        conv_sums(arena.take<double>(threads * s.groups * 2 * s.kernel * s.kernel)) {}
};

template <class T>
int backward(const Backward &in, const Shape &s, void *workspace, int threads) {
  Arena arena(workspace);
  const BackwardPlan<T> plan(arena, s, threads);
  const auto at = [](const void *p) { return static_cast<const T *>(p); };
  const T *grad = at(in.grad), *y = at(in.y), *x = at(in.x), *gate = at(in.gate), *maps = at(in.maps);
  const T *spatial = at(in.spatial), *conv = at(in.conv), *pooled = at(in.pooled);
  T *grad_x = static_cast<T *>(in.grad_x);
  const int64_t n = s.pixels(), per_group = s.per_group(), vectors = s.batch * s.channels;
  const int64_t area = s.kernel * s.kernel, padded = ForwardPlan<T>::padded_plane(s);
  const int64_t step = ForwardPlan<T>::padded_width(s);

  // Through the spatial convolution: gradients of its filter and of the maps.
  pad_planes(s, at(in.grad_z), s.batch * s.groups, plan.padded_z, threads);
  const int64_t planes = s.batch * s.groups;
  if (in.grad_conv != nullptr) {
    pad_planes(s, maps, 2 * planes, plan.padded_maps, threads);
    std::fill_n(plan.conv_sums, threads * s.groups * 2 * area, 0.0);
    const int64_t rows = planes * s.height;
    const int ranks = parallel_ranks(
        rows, kGrainElements / (2 * area * s.width) + 1, threads, [&](int rank, int64_t begin, int64_t end) {
          double *sums = plan.conv_sums + rank * s.groups * 2 * area;
          for (int64_t line = begin; line < end; ++line) {
            const int64_t plane = line / s.height, row = line % s.height, group = plane % s.groups;
            const T *dz = at(in.grad_z) + plane * n + row * s.width;
            for (int64_t m = 0; m < 2; ++m)
              for (int64_t tap = 0; tap < area; ++tap) {
                const T *source =
                    plan.padded_maps + (2 * plane + m) * padded + (row + tap / s.kernel) * step + tap % s.kernel;
                Vec<T> sum = Vec<T>::zero();
                over_channels<T>(
                    s.width, [&](int64_t i, auto mask) { sum = sum + load(dz + i, mask) * load(source + i, mask); });
                sums[(2 * group + m) * area + tap] += sum.sum();
              }
          }
        });
    for (int64_t i = 0; i < s.groups * 2 * area; ++i) {
      in.grad_conv[i] = 0;
      for (int rank = 0; rank < ranks; ++rank) in.grad_conv[i] += plan.conv_sums[rank * s.groups * 2 * area + i];
    }
  }
  parallel_for(2 * planes, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t map = begin; map < end; ++map)
      correlate(s, plan.padded_z + map / 2 * padded, conv + map % (2 * s.groups) * area, true, false, 0, s.height,
                plan.grad_maps + map * n);
  });

  // du = grad * s + grad_mean / K + (u is the maximum ? grad_max / ties : 0); dg += du * x; grad_x = du * g.
  std::fill_n(plan.dg, threads * vectors, 0.0);
  std::fill_n(plan.ties, threads * vectors, 0.0);
  const int ranks = over_blocks(s, threads, [&](int rank, int64_t image, int64_t first, int64_t count) {
    const T *g = gate + image * s.channels, *channel_max = pooled + vectors + image * s.channels;
    double *dg = plan.dg + rank * vectors + image * s.channels, *ties = plan.ties + rank * vectors + image * s.channels;
    for (int64_t group = 0; group < s.groups; ++group) {
      const int64_t plane = image * s.groups + group, base = group * per_group;
      const T *gate_s = spatial + plane * n + first;
      const T *maximum = maps + (image * 2 * s.groups + s.max_map(group)) * n + first;
      const T *d_mean = plan.grad_maps + (image * 2 * s.groups + s.mean_map(group)) * n + first;
      const T *d_max = plan.grad_maps + (image * 2 * s.groups + s.max_map(group)) * n + first;
      T share[kBlock];
      for (int64_t p = 0; p < count; ++p) {
        const T *pixel = x + (image * n + first + p) * s.channels + base;
        const Vec<T> most(maximum[p]);
        Vec<T> equal = Vec<T>::zero();
        over_channels<T>(per_group, [&](int64_t c, auto mask) {
          const Vec<T> u = load(pixel + c, mask) * load(g + base + c, mask);
          equal += keep(Vec<T>(u.v == most.v ? Vec<T>(T(1)).v : typename Vec<T>::Native{}), mask);
        });
        share[p] = d_max[p] / equal.sum();
      }
      over_channels<T>(per_group, [&](int64_t c, auto mask) {
        const Vec<T> channel_gate = load(g + base + c, mask), largest = load(channel_max + base + c, mask);
        Vec<T> sum = Vec<T>::zero(), equal = Vec<T>::zero();
        for (int64_t p = 0; p < count; ++p) {
          const int64_t i = (image * n + first + p) * s.channels + base + c;
          const Vec<T> value = load(x + i, mask), u = value * channel_gate, outer = before_relu(grad, y, i, mask);
          Vec<T> du = outer * Vec<T>(gate_s[p]) + Vec<T>(d_mean[p] / T(per_group));
          du = du + Vec<T>(u.v == Vec<T>(maximum[p]).v ? Vec<T>(share[p]).v : typename Vec<T>::Native{});
          sum = sum + du * value;
          equal += Vec<T>(value.v == largest.v ? Vec<T>(T(1)).v : typename Vec<T>::Native{});
          Vec<T> dx = du * channel_gate;
          if (in.add_grad) dx = dx + outer;
          if (grad_x != nullptr) store(grad_x + i, dx, mask);
        }
        for (int lane = 0; lane < Vec<T>::kLanes && c + lane < per_group; ++lane) {
          dg[base + c + lane] += sum.v[lane];
          ties[base + c + lane] += equal.v[lane];
        }
      });
    }
  });

  // Through the channel gate: gradients of the MLP, and what every pixel and every maximum of x still receives.
  std::fill_n(in.grad_w1, s.hidden * s.mlp_width, 0.0);
  std::fill_n(in.grad_b1, s.hidden, 0.0);
  std::fill_n(in.grad_w2, s.hidden * s.mlp_width, 0.0);
  std::fill_n(in.grad_b2, s.mlp_width, 0.0);
  const Mlp<T> mlp{at(in.w1), at(in.b1), at(in.w2), at(in.b2), s.mlp_width, s.hidden};
  for (int64_t image = 0; image < s.batch; ++image) {
    double *d_logit = plan.out;
    for (int64_t c = 0; c < s.channels; ++c) {
      double dg = 0;
      for (int rank = 0; rank < ranks; ++rank) dg += plan.dg[rank * vectors + image * s.channels + c];
      const double g = gate[image * s.channels + c];
      d_logit[c] = dg * g * (1 - g);
    }
    for (int which = 0; which < 2; ++which) {
      double *v = plan.v, *grad_v = which == 0 ? plan.grad_mean : plan.grad_max, *scratch = plan.grad_max;
      for (int64_t c = 0; c < s.channels; ++c) v[c] = pooled[which * vectors + image * s.channels + c];
      std::fill_n(scratch, s.channels, 0.0);
      mlp.forward(v, s.channels, plan.hidden, scratch);
      mlp.backward(v, s.channels, plan.hidden, d_logit, grad_v, in.grad_w1, in.grad_b1, in.grad_w2, in.grad_b2);
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      double ties = 0;
      for (int rank = 0; rank < ranks; ++rank) ties += plan.ties[rank * vectors + image * s.channels + c];
      plan.coefficients[image * s.channels + c] = T(plan.grad_mean[c] / double(n));
      plan.coefficients[vectors + image * s.channels + c] = T(plan.grad_max[c] / ties);
    }
  }
  if (grad_x == nullptr) return FF_OK;
  over_blocks(s, threads, [&](int, int64_t image, int64_t first, int64_t count) {
    const T *each = plan.coefficients + image * s.channels, *at_maximum = each + vectors;
    const T *largest = pooled + vectors + image * s.channels;
    over_channels<T>(s.channels, [&](int64_t c, auto mask) {
      const Vec<T> add = load(each + c, mask), share = load(at_maximum + c, mask), most = load(largest + c, mask);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t i = (image * n + first + p) * s.channels + c;
        const Vec<T> extra(load(x + i, mask).v == most.v ? share.v : typename Vec<T>::Native{});
        store(grad_x + i, load(grad_x + i, mask) + add + extra, mask);
      }
    });
  });
  return FF_OK;
}

}  // namespace

#define FF_SHAPE                                                                                                 \
  const Shape shape{batch, channels, height, width, hidden, mlp_width, groups, kernel, spatial_order != 0};      \
  if (batch < 1 || height * width < 1 || channels % groups != 0 || channels % mlp_width != 0 || kernel % 2 == 0) \
  return FF_BAD_ARGUMENT

extern "C" int64_t ff_cpu_cbam_workspace(int is_backward, int64_t batch, int64_t channels, int64_t height,
                                         int64_t width, int64_t hidden, int64_t mlp_width, int64_t groups,
                                         int64_t kernel, int spatial_order, int dtype, int threads) {
  FF_SHAPE;
  Arena arena;
  if (dtype == FF_FLOAT32)
    is_backward ? void(BackwardPlan<float>(arena, shape, threads)) : void(ForwardPlan<float>(arena, shape, threads));
  else
    is_backward ? void(BackwardPlan<double>(arena, shape, threads)) : void(ForwardPlan<double>(arena, shape, threads));
  return arena.bytes();
}

extern "C" int ff_cpu_cbam_maps(const void *x, const void *fc1_weight, const void *fc1_bias, const void *fc2_weight,
                                const void *fc2_bias, const void *conv_weight, void *pooled, void *gate, void *maps,
                                void *z, int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t hidden,
                                int64_t mlp_width, int64_t groups, int64_t kernel, int spatial_order, void *workspace,
                                int dtype, int threads) {
  FF_SHAPE;
  const Forward in{x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, conv_weight, pooled, gate, maps, z};
  if (dtype == FF_FLOAT32) return forward<float>(in, shape, workspace, threads);
  if (dtype == FF_FLOAT64) return forward<double>(in, shape, workspace, threads);
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_cbam_apply(const void *x, const void *gate, const void *spatial, const void *residual, int relu,
                                 void *y, int64_t batch, int64_t channels, int64_t pixels, int64_t groups, int dtype,
                                 int threads) {
  const Shape shape{batch, channels, 1, pixels, 1, channels, groups, 1, false};
#define FF_CALL(T)                                                                                \
  apply(static_cast<const T *>(x), static_cast<const T *>(gate), static_cast<const T *>(spatial), \
        static_cast<const T *>(residual), relu != 0, static_cast<T *>(y), shape, threads)
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_cbam_spatial_gradient(const void *grad, const void *y, const void *x, const void *gate,
                                            void *grad_spatial, int64_t batch, int64_t channels, int64_t pixels,
                                            int64_t groups, int dtype, int threads) {
  const Shape shape{batch, channels, 1, pixels, 1, channels, groups, 1, false};
#define FF_CALL(T)                                                                                     \
  spatial_gradient(static_cast<const T *>(grad), static_cast<const T *>(y), static_cast<const T *>(x), \
                   static_cast<const T *>(gate), static_cast<T *>(grad_spatial), shape, threads)
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_cbam_backward(const void *grad, const void *y, const void *x, const void *fc1_weight,
                                    const void *fc1_bias, const void *fc2_weight, const void *fc2_bias,
                                    const void *conv_weight, const void *pooled, const void *gate, const void *maps,
                                    const void *spatial, const void *grad_z, int add_grad, void *grad_x,
                                    double *grad_fc1_weight, double *grad_fc1_bias, double *grad_fc2_weight,
                                    double *grad_fc2_bias, double *grad_conv, int64_t batch, int64_t channels,
                                    int64_t height, int64_t width, int64_t hidden, int64_t mlp_width, int64_t groups,
                                    int64_t kernel, int spatial_order, void *workspace, int dtype, int threads) {
  FF_SHAPE;
  const Backward in{grad,
                    y,
                    x,
                    fc1_weight,
                    fc1_bias,
                    fc2_weight,
                    fc2_bias,
                    conv_weight,
                    pooled,
                    gate,
                    maps,
                    spatial,
                    grad_z,
                    add_grad,
                    grad_x,
                    grad_fc1_weight,
                    grad_fc1_bias,
                    grad_fc2_weight,
                    grad_fc2_bias,
                    grad_conv};
  if (dtype == FF_FLOAT32) return backward<float>(in, shape, workspace, threads);
  if (dtype == FF_FLOAT64) return backward<double>(in, shape, workspace, threads);
  return FF_UNSUPPORTED_DTYPE;
}

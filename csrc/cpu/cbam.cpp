// One application of CBAM on NHWC tensors, forward and backward: y = activation(x * g * s + residual), g a gate per
// image and channel, s a gate per image, channel group and pixel.
//
// Forward reads x three times: for the sums and maxima per channel, for the mean and maximum maps of u = x * g, and for
// the result. The maps and everything made of them are planes (group, row, column), a few values per pixel.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "arena.h"
#include "conv.h"
#include "ff_api.h"
#include "parallel.h"
#include "planar.h"

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

// row(c, values of `pixels` <= kLanes pixels) for every channel c, from value(pixel, c, mask), a vector of channels.
template <class T, class Value, class Row>
FF_INLINE void by_channel(int64_t channels, int64_t pixels, const Value &value, const Row &row) {
  constexpr int kLanes = Vec<T>::kLanes;
  alignas(64) T in[kLanes * kLanes], out[kLanes * kLanes];
  over_channels<T>(channels, [&](int64_t c, auto mask) {
    for (int64_t p = 0; p < kLanes; ++p) (p < pixels ? value(p, c, mask) : Vec<T>::zero()).store(in + p * kLanes);
    transpose(in, kLanes, out, kLanes);
    const int64_t lanes = std::min<int64_t>(kLanes, channels - c);
    for (int64_t i = 0; i < lanes; ++i) row(c + i, Vec<T>::load(out + i * kLanes));
  });
}

// Sums over the channels of one group after the other, each in parts of a few channels.
template <class T>
struct GroupSum {
  int64_t per_group, left, group = 0;
  Vec<T> total = Vec<T>::zero(), part = Vec<T>::zero();

  explicit GroupSum(int64_t channels) : per_group(channels), left(channels) {}

  // Adds a channel; whether it was the last one of its group.
  FF_INLINE bool add(Vec<T> value) {
    part += value;
    if (--left % kPart == 0) total += part, part = Vec<T>::zero();
    return left == 0;
  }
  // The sum of the group, which ends here.
  FF_INLINE Vec<T> take() {
    const Vec<T> sum = total;
    total = Vec<T>::zero(), left = per_group, ++group;
    return sum;
  }

 private:
  static constexpr int64_t kPart = 16;
};

// Which of the groups each channel of a vector belongs to.
template <class T>
class VectorGroups {
 public:
  VectorGroups() = default;
  VectorGroups(int64_t c, int64_t channels, int64_t per_group) : first_(c / per_group) {
    constexpr int kLanes = Vec<T>::kLanes;
    count_ = static_cast<int>((std::min(c + kLanes, channels) - 1) / per_group - first_) + 1;
    for (int i = 1; i < count_; ++i) {
      Native lane{};
      for (int j = 0; j < kLanes; ++j) lane[j] = T(c + j >= (first_ + i) * per_group);
      later_[i] = lane > Native{};
    }
  }

  // Of each channel, the value of its group; planes of the groups are `step` elements apart.
  FF_INLINE Vec<T> spread(const T *planes, int64_t step) const {
    const T *plane = planes + first_ * step;
    Vec<T> value(*plane);
    for (int i = 1; i < count_; ++i) value = later_[i] ? Vec<T>(plane[i * step]).v : value.v;
    return value;
  }

 private:
  using Native = typename Vec<T>::Native;
  int64_t first_;
  int count_;
  decltype(Native{} > Native{}) later_[Vec<T>::kLanes];
};

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
  constexpr int kLanes = Vec<T>::kLanes;
  over_runs<T>(channels, [&](int64_t c, auto vectors, auto mask) {
    Vec<T> total[vectors.value], most[vectors.value];
    for (int v = 0; v < vectors.value; ++v) total[v] = Vec<T>::zero(), most[v] = load(largest + c + v * kLanes, mask);
    for (int64_t p = 0; p < count; ++p)
      for (int v = 0; v < vectors.value; ++v) {
        const Vec<T> value = load(x + p * channels + c + v * kLanes, mask);
        total[v] += value;
        most[v] = Vec<T>::larger(most[v], value);
      }
    for (int v = 0; v < vectors.value; ++v) {
      store(largest + c + v * kLanes, most[v], mask);
      const int64_t first = c + v * kLanes;
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, channels - first); ++i) sum[first + i] += total[v].v[i];
    }
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
    over_runs<T>(s.width, [&](int64_t x, auto vectors, auto mask) {
      T *target = out + y * s.width + x;
      Vec<T> even[vectors.value], odd[vectors.value];  // two chains of additions: a vector waits for its own sum
      for (int v = 0; v < vectors.value; ++v) {
        even[v] = accumulate ? load(target + v * Vec<T>::kLanes, mask) : Vec<T>::zero();
        odd[v] = Vec<T>::zero();
      }
      const auto add = [&](Vec<T> *sum, const T *row, int64_t tap) {
        const Vec<T> weight(filter[reversed ? k * k - 1 - tap : tap]);
        for (int v = 0; v < vectors.value; ++v) sum[v] = sum[v] + Vec<T>::load(row + v * Vec<T>::kLanes) * weight;
      };
      for (int64_t ky = 0; ky < k; ++ky) {
        const T *row = padded + (y + ky) * step + x;
        for (int64_t kx = 0; kx + 1 < k; kx += 2) {
          add(even, row + kx, ky * k + kx);
          add(odd, row + kx + 1, ky * k + kx + 1);
        }
        add(even, row + k - 1, ky * k + k - 1);
      }
      for (int v = 0; v < vectors.value; ++v) store(target + v * Vec<T>::kLanes, even[v] + odd[v], mask);
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
    const T *g = gate + image * s.channels, *pixels = x + (image * n + first) * s.channels;
    T *planes = maps + image * 2 * s.groups * n + first;
    for (int64_t p = 0; p < count; p += Vec<T>::kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(Vec<T>::kLanes, count - p));
      const auto value = [&](int64_t i, int64_t c, auto mask) {
        return load(pixels + (p + i) * s.channels + c, mask) * load(g + c, mask);
      };
      GroupSum<T> sum(per_group);
      Vec<T> most(-std::numeric_limits<T>::infinity());
      by_channel<T>(s.channels, lanes, value, [&](int64_t, Vec<T> u) {
        most = Vec<T>::larger(most, u);
        if (!sum.add(u)) return;
        const int64_t group = sum.group;
        (sum.take() / Vec<T>(T(per_group))).store_first(planes + s.mean_map(group) * n + p, lanes);
        most.store_first(planes + s.max_map(group) * n + p, lanes);
        most = Vec<T>(-std::numeric_limits<T>::infinity());
      });
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
  const int64_t n = s.pixels();
  over_blocks(s, threads, [&](int, int64_t image, int64_t first, int64_t count) {
    over_runs<T>(s.channels, [&](int64_t c, auto vectors, auto mask) {
      constexpr int kLanes = Vec<T>::kLanes;
      VectorGroups<T> groups[vectors.value];
      Vec<T> g[vectors.value];
      for (int v = 0; v < vectors.value; ++v) {
        groups[v] = VectorGroups<T>(c + v * kLanes, s.channels, s.per_group());
        g[v] = load(gate + image * s.channels + c + v * kLanes, mask);
      }
      for (int64_t p = 0; p < count; ++p)
        for (int v = 0; v < vectors.value; ++v) {
          const int64_t at = (image * n + first + p) * s.channels + c + v * kLanes;
          Vec<T> value = load(x + at, mask) * g[v] * groups[v].spread(spatial + image * s.groups * n + first + p, n);
          if (residual != nullptr) value = value + load(residual + at, mask);
          if (relu) value = Vec<T>::if_negative(value, Vec<T>::zero());
          store(y + at, value, mask);
        }
    });
  });
  return FF_OK;
}

// ---- spatial gate: batch normalisation of planes (batch, groups, pixels), and a sigmoid

// Sum of value(element, mask) over a plane: 16 vectors at a time in T, then in double.
template <class T, class Value>
double plane_sum(int64_t pixels, const Value &value) {
  constexpr int kLanes = Vec<T>::kLanes;
  double total[kLanes] = {};
  constexpr int64_t kPart = 16 * kLanes;
  for (int64_t first = 0; first < pixels; first += kPart) {
    Vec<T> part = Vec<T>::zero();
    over_channels<T>(std::min(kPart, pixels - first),
                     [&](int64_t i, auto mask) { part += keep(value(first + i, mask), mask); });
    for (int lane = 0; lane < kLanes; ++lane) total[lane] += part.v[lane];
  }
  double sum = 0;
  for (double lane : total) sum += lane;
  return sum;
}

struct Planes {
  int64_t batch, groups, pixels;
  int threads;

  int64_t count() const { return batch * groups; }
  // body(plane, group, first element) for every plane.
  template <class Body>
  void each(const Body &body) const {
    parallel_for(count(), kGrainElements / (pixels + 1) + 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) body(plane, plane % groups, plane * pixels);
    });
  }
  // The sum of a group, in the order of the planes.
  double joined(const double *sums, int64_t group) const {
    double total = 0;
    for (int64_t image = 0; image < batch; ++image) total += sums[image * groups + group];
    return total;
  }
};

template <class T>
int spatial_gate(const T *z, const T *weight, const T *bias, double eps, bool training, T *stats, T *spatial,
                 const Planes &planes, double *sums) {
  const double n = static_cast<double>(planes.batch * planes.pixels);
  if (training) {
    // Relative to one value of the group, then to the mean: a small variance around a large mean survives.
    double *means = sums + planes.count();
    planes.each([&](int64_t plane, int64_t group, int64_t at) {
      const Vec<T> reference(z[group * planes.pixels]);
      sums[plane] =
          plane_sum<T>(planes.pixels, [&](int64_t i, auto mask) { return load(z + at + i, mask) - reference; });
    });
    for (int64_t group = 0; group < planes.groups; ++group)
      means[group] = double(z[group * planes.pixels]) + planes.joined(sums, group) / n;
    planes.each([&](int64_t plane, int64_t group, int64_t at) {
      const Vec<T> mean{T(means[group])};
      sums[plane] = plane_sum<T>(planes.pixels, [&](int64_t i, auto mask) {
        const Vec<T> d = load(z + at + i, mask) - mean;
        return d * d;
      });
    });
    for (int64_t group = 0; group < planes.groups; ++group) {
      const double rounded = means[group] - double(T(means[group]));
      const double var = planes.joined(sums, group) / n - rounded * rounded;
      write_stats(group, means[group], var < 0 ? 0.0 : var, weight, bias, eps, planes.groups, stats);
    }
  }
  const T *scale = stats + 2 * planes.groups, *shift = scale + planes.groups;
  planes.each([&](int64_t, int64_t group, int64_t at) {
    const Vec<T> mean(stats[group]), a(scale[group]), b(shift[group]);
    over_channels<T>(planes.pixels, [&](int64_t i, auto mask) {
      store(spatial + at + i, ff::sigmoid((load(z + at + i, mask) - mean) * a + b), mask);
    });
  });
  return FF_OK;
}

template <class T>
int spatial_gate_gradient(const T *grad, const T *spatial, const T *z, const T *stats, bool training, double eps,
                          T *grad_z, T *grad_weight, T *grad_bias, const Planes &planes, double *sums) {
  const double n = static_cast<double>(planes.batch * planes.pixels);
  double *products = sums + planes.count();
  const auto outer = [&](int64_t i, auto mask) {
    const Vec<T> s = load(spatial + i, mask);
    return load(grad + i, mask) * (s * (Vec<T>(T(1)) - s));
  };
  planes.each([&](int64_t plane, int64_t group, int64_t at) {
    const Vec<T> mean(stats[group]);
    sums[plane] = plane_sum<T>(planes.pixels, [&](int64_t i, auto mask) { return outer(at + i, mask); });
    products[plane] = plane_sum<T>(
        planes.pixels, [&](int64_t i, auto mask) { return outer(at + i, mask) * (load(z + at + i, mask) - mean); });
  });
  for (int64_t group = 0; group < planes.groups; ++group) {
    const double g = planes.joined(sums, group), gz = planes.joined(products, group);
    const double var = double(stats[planes.groups + group]) + eps;
    if (grad_weight) grad_weight[group] = T(gz / std::sqrt(var));
    if (grad_bias) grad_bias[group] = T(g);
    sums[group] = training ? g / n : 0.0;
    products[group] = training ? gz / (n * var) : 0.0;
  }
  planes.each([&](int64_t, int64_t group, int64_t at) {
    const Vec<T> mean(stats[group]), scale(stats[2 * planes.groups + group]);
    const Vec<T> b{T(sums[group])}, c{T(products[group])};
    over_channels<T>(planes.pixels, [&](int64_t i, auto mask) {
      const Vec<T> d = (outer(at + i, mask) - b) - (load(z + at + i, mask) - mean) * c;
      store(grad_z + at + i, scale * d, mask);
    });
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
  const int64_t n = s.pixels();
  over_blocks(s, threads, [&](int, int64_t image, int64_t first, int64_t count) {
    const T *g = gate + image * s.channels;
    for (int64_t p = 0; p < count; p += Vec<T>::kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(Vec<T>::kLanes, count - p));
      const auto value = [&](int64_t i, int64_t c, auto mask) {
        const int64_t at = (image * n + first + p + i) * s.channels + c;
        return before_relu(grad, y, at, mask) * (load(x + at, mask) * load(g + c, mask));
      };
      GroupSum<T> sum(s.per_group());
      by_channel<T>(s.channels, lanes, value, [&](int64_t, Vec<T> product) {
        if (!sum.add(product)) return;
        T *out = grad_s + (image * s.groups + sum.group) * n + first + p;
        sum.take().store_first(out, lanes);
      });
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

// Rows between two additions to the sums of the spatial filter's gradient in double.
constexpr int64_t kRows = 16;

// sums[t] += sum over rows and columns of dz[row][column] * source[row][column + t]; rows of source are `step` apart.
template <class T, int Taps>
void tap_sums(const T *dz, const T *source, int64_t rows, int64_t width, int64_t step, double *sums) {
  Vec<T> total[Taps];
  for (int t = 0; t < Taps; ++t) total[t] = Vec<T>::zero();
  for (int64_t row = 0; row < rows; ++row, dz += width, source += step)
    over_channels<T>(width, [&](int64_t i, auto mask) {
      const Vec<T> d = load(dz + i, mask);
      for (int t = 0; t < Taps; ++t) total[t] = total[t] + d * load(source + i + t, mask);
    });
  for (int t = 0; t < Taps; ++t) sums[t] += total[t].sum();
}

template <class T>
struct BackwardPlan {
  double *dg, *ties;  // (threads, batch, channels)
  double *v, *out, *hidden, *grad_mean, *grad_max;
  T *padded_z, *padded_maps, *grad_maps, *coefficients;
  double *conv_sums;          // (threads, groups * 2 * kernel^2)
  T *mean_share, *max_share;  // (threads, groups, kBlock)

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
        conv_sums(arena.take<double>(threads * s.groups * 2 * s.kernel * s.kernel)),
        mean_share(arena.take<T>(threads * s.groups * kBlock)),
        max_share(arena.take<T>(threads * s.groups * kBlock)) {}
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
          for (int64_t line = begin, lines; line < end; line += lines) {
            const int64_t plane = line / s.height, row = line % s.height, group = plane % s.groups;
            lines = std::min({kRows, s.height - row, end - line});
            const T *dz = at(in.grad_z) + plane * n + row * s.width;
            for (int64_t m = 0; m < 2; ++m)
              for (int64_t ky = 0; ky < s.kernel; ++ky) {
                const T *source = plan.padded_maps + (2 * plane + m) * padded + (row + ky) * step;
                double *taps = sums + (2 * group + m) * area + ky * s.kernel;
                if (s.kernel == 7) {
                  tap_sums<T, 7>(dz, source, lines, s.width, step, taps);
                  continue;
                }
                for (int64_t kx = 0; kx < s.kernel; ++kx)
                  tap_sums<T, 1>(dz, source + kx, lines, s.width, step, taps + kx);
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
    // What each channel of a group receives by way of the mean, and each that is the maximum by way of that.
    T *mean_share = plan.mean_share + rank * s.groups * kBlock, *max_share = plan.max_share + rank * s.groups * kBlock;
    const T *maxima = maps + (image * 2 * s.groups + s.max_map(0)) * n + first;
    const T *d_mean = plan.grad_maps + (image * 2 * s.groups + s.mean_map(0)) * n + first;
    const T *d_max = plan.grad_maps + (image * 2 * s.groups + s.max_map(0)) * n + first;
    for (int64_t p = 0; p < count; p += Vec<T>::kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(Vec<T>::kLanes, count - p));
      const auto value = [&](int64_t i, int64_t c, auto mask) {
        return load(x + (image * n + first + p + i) * s.channels + c, mask) * load(g + c, mask);
      };
      GroupSum<T> equal(per_group);
      by_channel<T>(s.channels, lanes, value, [&](int64_t, Vec<T> u) {
        const int64_t group = equal.group;
        const Vec<T> most = Vec<T>::load_first(maxima + 2 * group * n + p, lanes);
        if (!equal.add(u.v == most.v ? Vec<T>(T(1)).v : typename Vec<T>::Native{})) return;
        (Vec<T>::load_first(d_max + 2 * group * n + p, lanes) / equal.take())
            .store_first(max_share + group * kBlock + p, lanes);
        (Vec<T>::load_first(d_mean + 2 * group * n + p, lanes) / Vec<T>(T(per_group)))
            .store_first(mean_share + group * kBlock + p, lanes);
      });
    }
    over_runs<T>(s.channels, [&](int64_t c, auto vectors, auto mask) {
      constexpr int kLanes = Vec<T>::kLanes;
      using Native = typename Vec<T>::Native;
      VectorGroups<T> groups[vectors.value];
      Vec<T> channel_gate[vectors.value], largest[vectors.value], sum[vectors.value], equal[vectors.value];
      for (int v = 0; v < vectors.value; ++v) {
        groups[v] = VectorGroups<T>(c + v * kLanes, s.channels, per_group);
        channel_gate[v] = load(g + c + v * kLanes, mask), largest[v] = load(channel_max + c + v * kLanes, mask);
        sum[v] = equal[v] = Vec<T>::zero();
      }
      for (int64_t p = 0; p < count; ++p)
        for (int v = 0; v < vectors.value; ++v) {
          const int64_t i = (image * n + first + p) * s.channels + c + v * kLanes;
          const Vec<T> value = load(x + i, mask), u = value * channel_gate[v], outer = before_relu(grad, y, i, mask);
          const Vec<T> most = groups[v].spread(maxima + p, 2 * n), share = groups[v].spread(max_share + p, kBlock);
          Vec<T> du = outer * groups[v].spread(spatial + image * s.groups * n + first + p, n) +
                      groups[v].spread(mean_share + p, kBlock);
          du = du + Vec<T>(u.v == most.v ? share.v : Native{});
          sum[v] = sum[v] + du * value;
          equal[v] += Vec<T>(value.v == largest[v].v ? Vec<T>(T(1)).v : Native{});
          Vec<T> dx = du * channel_gate[v];
          if (in.add_grad) dx = dx + outer;
          if (grad_x != nullptr) store(grad_x + i, dx, mask);
        }
      for (int v = 0; v < vectors.value; ++v) {
        const int64_t at = c + v * kLanes;
        for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, s.channels - at); ++lane) {
          dg[at + lane] += sum[v].v[lane];
          ties[at + lane] += equal[v].v[lane];
        }
      }
    });
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
    over_runs<T>(s.channels, [&](int64_t c, auto vectors, auto mask) {
      constexpr int kLanes = Vec<T>::kLanes;
      Vec<T> add[vectors.value], share[vectors.value], most[vectors.value];
      for (int v = 0; v < vectors.value; ++v) {
        add[v] = load(each + c + v * kLanes, mask), share[v] = load(at_maximum + c + v * kLanes, mask);
        most[v] = load(largest + c + v * kLanes, mask);
      }
      for (int64_t p = 0; p < count; ++p)
        for (int v = 0; v < vectors.value; ++v) {
          const int64_t i = (image * n + first + p) * s.channels + c + v * kLanes;
          const Vec<T> extra(load(x + i, mask).v == most[v].v ? share[v].v : typename Vec<T>::Native{});
          store(grad_x + i, load(grad_x + i, mask) + add[v] + extra, mask);
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

extern "C" int64_t ff_cpu_cbam_gate_workspace(int64_t batch, int64_t groups) {
  return 2 * batch * groups * static_cast<int64_t>(sizeof(double));
}

extern "C" int ff_cpu_cbam_gate(const void *z, const void *bn_weight, const void *bn_bias, double eps, int training,
                                void *stats, void *spatial, int64_t batch, int64_t groups, int64_t pixels,
                                void *workspace, int dtype, int threads) {
  const Planes planes{batch, groups, pixels, threads};
#define FF_CALL(T)                                                                                                 \
  spatial_gate(static_cast<const T *>(z), static_cast<const T *>(bn_weight), static_cast<const T *>(bn_bias), eps, \
               training != 0, static_cast<T *>(stats), static_cast<T *>(spatial), planes,                          \
               static_cast<double *>(workspace))
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_cbam_gate_gradient(const void *grad_spatial, const void *spatial, const void *z,
                                         const void *stats, int training, double eps, void *grad_z, void *grad_weight,
                                         void *grad_bias, int64_t batch, int64_t groups, int64_t pixels,
                                         void *workspace, int dtype, int threads) {
  const Planes planes{batch, groups, pixels, threads};
#define FF_CALL(T)                                                                                                    \
  spatial_gate_gradient(static_cast<const T *>(grad_spatial), static_cast<const T *>(spatial),                        \
                        static_cast<const T *>(z), static_cast<const T *>(stats), training != 0, eps,                 \
                        static_cast<T *>(grad_z), static_cast<T *>(grad_weight), static_cast<T *>(grad_bias), planes, \
                        static_cast<double *>(workspace))
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

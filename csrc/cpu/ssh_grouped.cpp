// The seams of the SSH block: its three branches become one shuffled output, and the gradient of that output becomes
// the gradients of the branches. The convolutions between are those of grouped_conv_bn_act.cpp. Tensors are NHWC.
//
// The output's channel o, before the shuffle, is channel o of the first branch, then of the second, then of the third.
// A branch is a slice of the channels of a raw convolution output, with statistics (see ff_api.h) of its own channels.
#include "conv.h"
#include "ff_api.h"

namespace {

using namespace ff;

constexpr int64_t kGrainElements = 16 * 1024;

// Channel of the shuffled output where channel o of the concatenation goes.
inline int64_t shuffled(int64_t o, int64_t channels, int64_t groups) {
  const int64_t per_group = channels / groups;
  return o % per_group * groups + o / per_group;
}

template <class T>
struct Branch {
  const T *z;
  int64_t pixel, channels;
  const T *stats;  // NULL: z is activated already
};

template <class T>
struct Seam {
  T *tile;           // per thread: kTile pixels of one branch
  T *shuffled_tile;  // per thread: kTile pixels of the output
  int64_t tile_size, shuffled_size;
  AffineMemory<T> affine[3];
  GradientSums *sums;  // per thread and branch
  int64_t *place;

  Seam(Arena &arena, const int64_t *channels, int threads)
      : tile_size(kTile * std::max({channels[0], channels[1], channels[2]}) + Vec<T>::kLanes),
        shuffled_size(kTile * (channels[0] + channels[1] + channels[2])),
        affine{AffineMemory<T>(arena, period_of<T>(channels[0])), AffineMemory<T>(arena, period_of<T>(channels[1])),
               AffineMemory<T>(arena, period_of<T>(channels[2]))} {
    tile = arena.take<T>(2 * threads * tile_size);
    shuffled_tile = arena.take<T>(threads * shuffled_size);
    place = arena.take<int64_t>(channels[0] + channels[1] + channels[2]);
    sums = arena.take<GradientSums>(3 * threads);
    for (int i = 0; i < 3 * threads; ++i) {
      const GradientSums one = GradientSums::take<T>(arena, period_of<T>(channels[i % 3]));
      if (sums != nullptr) sums[i] = one;
    }
  }
};

template <class T>
int join(const Branch<T> *branches, int64_t pixels, int64_t groups, T *y, void *workspace, int threads) {
  const int64_t counts[3] = {branches[0].channels, branches[1].channels, branches[2].channels};
  const int64_t channels = counts[0] + counts[1] + counts[2];
  Arena arena(workspace);
  const Seam<T> seam(arena, counts, threads);
  Affine<T> affine[3];
  for (int i = 0; i < 3; ++i) affine[i] = seam.affine[i].set(branches[i].stats, counts[i], FF_RELU, 0.0);
  for (int64_t o = 0; o < channels; ++o) seam.place[o] = shuffled(o, channels, groups);
  const int64_t tiles = (pixels + kTile - 1) / kTile;
  parallel_ranks(tiles, kGrainElements / (kTile * channels) + 1, threads, [&](int rank, int64_t begin, int64_t end) {
    T *tile = seam.tile + rank * 2 * seam.tile_size;
    for (int64_t first = begin * kTile; first < std::min(end * kTile, pixels); first += kTile) {
      const int64_t count = std::min(kTile, pixels - first);
      int64_t done = 0;
      for (int i = 0; i < 3; done += counts[i++]) {
        gather(Pixels<T>{branches[i].z, counts[i], branches[i].pixel}, first, count, tile);
        apply_affine(tile, count * counts[i], period_of<T>(counts[i]), affine[i], tile);
        for (int64_t p = 0; p < count; ++p)
          for (int64_t c = 0; c < counts[i]; ++c)
            y[(first + p) * channels + seam.place[done + c]] = tile[p * counts[i] + c];
      }
    }
  });
  return FF_OK;
}

template <class T>
int split(const T *grad, const Branch<T> *branches, int64_t pixels, int64_t groups, T *const *g, const int64_t *g_pixel,
          double *const *sums, void *workspace, int threads) {
  const int64_t counts[3] = {branches[0].channels, branches[1].channels, branches[2].channels};
  const int64_t channels = counts[0] + counts[1] + counts[2];
  Arena arena(workspace);
  const Seam<T> seam(arena, counts, threads);
  Affine<T> affine[3];
  for (int i = 0; i < 3; ++i) affine[i] = seam.affine[i].set(branches[i].stats, counts[i], FF_RELU, 0.0);
  for (int64_t o = 0; o < channels; ++o) seam.place[o] = shuffled(o, channels, groups);
  const int64_t tiles = (pixels + kTile - 1) / kTile, grain = kGrainElements / (kTile * channels) + 1;
  const int ranks = parallel_ranks(tiles, grain, threads, [&](int rank, int64_t begin, int64_t end) {
    T *z = seam.tile + rank * 2 * seam.tile_size, *d = z + seam.tile_size;
    for (int i = 0; i < 3; ++i) seam.sums[rank * 3 + i].template clear<T>(period_of<T>(counts[i]));
    for (int64_t first = begin * kTile; first < std::min(end * kTile, pixels); first += kTile) {
      const int64_t count = std::min(kTile, pixels - first);
      int64_t done = 0;
      for (int i = 0; i < 3; done += counts[i++]) {
        gather(Pixels<T>{branches[i].z, counts[i], branches[i].pixel}, first, count, z);
        for (int64_t p = 0; p < count; ++p)
          for (int64_t c = 0; c < counts[i]; ++c)
            d[p * counts[i] + c] = grad[(first + p) * channels + seam.place[done + c]];
        activation_backward(d, z, count * counts[i], period_of<T>(counts[i]), affine[i], d, &seam.sums[rank * 3 + i]);
        for (int64_t p = 0; p < count; ++p) copy(d + p * counts[i], counts[i], g[i] + (first + p) * g_pixel[i]);
      }
    }
  });
  for (int i = 0; i < 3; ++i)
    join_sums(ranks, counts[i], period_of<T>(counts[i]), [&](int rank) { return seam.sums[rank * 3 + i]; }, sums[i]);
  return FF_OK;
}

// body(place in the dense weight, place in the grouped one, how many): runs along the inputs of one output's group.
template <class Body>
void over_groups(int64_t outputs, int64_t inputs, int64_t kernel, int64_t groups, const Body &body) {
  const int64_t per_group = inputs / groups, area = kernel * kernel;
  for (int64_t o = 0; o < outputs; ++o)
    body((o * inputs + o / (outputs / groups) * per_group) * area, o * per_group * area, per_group * area);
}

}  // namespace

extern "C" int ff_cpu_ssh_grouped_weight(const void *weight, int64_t outputs, int64_t inputs, int64_t kernel,
                                         int64_t groups, void *dense, int dtype) {
  if (groups < 1 || inputs % groups != 0 || outputs % groups != 0) return FF_BAD_ARGUMENT;
#define FF_CALL(T)                                                                              \
  {                                                                                             \
    std::fill_n(static_cast<T *>(dense), outputs * inputs * kernel * kernel, T(0));             \
    over_groups(outputs, inputs, kernel, groups, [&](int64_t to, int64_t from, int64_t count) { \
      std::copy_n(static_cast<const T *>(weight) + from, count, static_cast<T *>(dense) + to);  \
    });                                                                                         \
    return FF_OK;                                                                               \
  }
  if (dtype == FF_FLOAT32) FF_CALL(float);
  if (dtype == FF_FLOAT64) FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_ssh_grouped_unpack(const void *dense, int64_t outputs, int64_t inputs, int64_t kernel,
                                         int64_t groups, void *weight, int dtype) {
  if (groups < 1 || inputs % groups != 0 || outputs % groups != 0) return FF_BAD_ARGUMENT;
#define FF_CALL(T)                                                                              \
  {                                                                                             \
    over_groups(outputs, inputs, kernel, groups, [&](int64_t from, int64_t to, int64_t count) { \
      std::copy_n(static_cast<const T *>(dense) + from, count, static_cast<T *>(weight) + to);  \
    });                                                                                         \
    return FF_OK;                                                                               \
  }
  if (dtype == FF_FLOAT32) FF_CALL(float);
  if (dtype == FF_FLOAT64) FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int64_t ff_cpu_ssh_grouped_workspace(int64_t channels0, int64_t channels1, int64_t channels2, int dtype,
                                                int threads) {
  Arena arena;
  const int64_t channels[3] = {channels0, channels1, channels2};
  dtype == FF_FLOAT32 ? void(Seam<float>(arena, channels, threads)) : void(Seam<double>(arena, channels, threads));
  return arena.bytes();
}

#define FF_BRANCHES(T)                                                                                            \
  const Branch<T> branches[3] = {{static_cast<const T *>(z0), pixel0, channels0, static_cast<const T *>(stats0)}, \
                                 {static_cast<const T *>(z1), pixel1, channels1, static_cast<const T *>(stats1)}, \
                                 {static_cast<const T *>(z2), pixel2, channels2, static_cast<const T *>(stats2)}}

extern "C" int ff_cpu_ssh_grouped_join(const void *z0, int64_t pixel0, int64_t channels0, const void *stats0,
                                       const void *z1, int64_t pixel1, int64_t channels1, const void *stats1,
                                       const void *z2, int64_t pixel2, int64_t channels2, const void *stats2,
                                       int64_t pixels, int64_t groups, void *y, void *workspace, int dtype,
                                       int threads) {
  if (groups < 1 || (channels0 + channels1 + channels2) % groups != 0) return FF_BAD_ARGUMENT;
#define FF_CALL(T)                                                                  \
  {                                                                                 \
    FF_BRANCHES(T);                                                                 \
    return join(branches, pixels, groups, static_cast<T *>(y), workspace, threads); \
  }
  if (dtype == FF_FLOAT32) FF_CALL(float);
  if (dtype == FF_FLOAT64) FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_ssh_grouped_split(const void *grad, const void *z0, int64_t pixel0, int64_t channels0,
                                        const void *stats0, const void *z1, int64_t pixel1, int64_t channels1,
                                        const void *stats1, const void *z2, int64_t pixel2, int64_t channels2,
                                        const void *stats2, int64_t pixels, int64_t groups, void *g0, int64_t g_pixel0,
                                        double *sums0, void *g1, int64_t g_pixel1, double *sums1, void *g2,
                                        int64_t g_pixel2, double *sums2, void *workspace, int dtype, int threads) {
  if (groups < 1 || (channels0 + channels1 + channels2) % groups != 0) return FF_BAD_ARGUMENT;
  const int64_t g_pixel[3] = {g_pixel0, g_pixel1, g_pixel2};
  double *const sums[3] = {sums0, sums1, sums2};
#define FF_CALL(T)                                                                                              \
  {                                                                                                             \
    FF_BRANCHES(T);                                                                                             \
    T *const g[3] = {static_cast<T *>(g0), static_cast<T *>(g1), static_cast<T *>(g2)};                         \
    return split(static_cast<const T *>(grad), branches, pixels, groups, g, g_pixel, sums, workspace, threads); \
  }
  if (dtype == FF_FLOAT32) FF_CALL(float);
  if (dtype == FF_FLOAT64) FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

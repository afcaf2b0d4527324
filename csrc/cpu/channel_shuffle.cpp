// Channel shuffle on the CPU: an index, so one kernel per element size serves every dtype.
#include <cstring>

#include "ff_api.h"
#include "parallel.h"

namespace {

constexpr int64_t kGrainBytes = 32 * 1024;

// NCHW: whole planes move.
void shuffle_planes(const char *x, char *y, int64_t batch, int64_t channels, int64_t plane_bytes, int64_t groups,
                    int threads) {
  const int64_t per_group = channels / groups;
  ff::parallel_for(batch * channels, kGrainBytes / (plane_bytes + 1) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t image = plane / channels, out = plane % channels;
      const int64_t in = (out % groups) * per_group + out / groups;
      std::memcpy(y + plane * plane_bytes, x + (image * channels + in) * plane_bytes, plane_bytes);
    }
  });
}

// NHWC: every pixel is a (groups, per_group) matrix to transpose. One of the two dimensions is a compile-time
// constant where it is a usual group count, which lets the compiler interleave whole vectors.
template <class T, int Groups, int PerGroup>
void shuffle_pixels(const T *x, T *y, int64_t pixels, int64_t channels, int64_t groups, int threads) {
  const int64_t g = Groups ? Groups : PerGroup ? channels / PerGroup : groups;
  const int64_t n = PerGroup ? PerGroup : channels / g;
  ff::parallel_for(pixels, kGrainBytes / (channels * int64_t(sizeof(T))) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const T *__restrict in = x + pixel * channels;
      T *__restrict out = y + pixel * channels;
      if constexpr (PerGroup != 0) {
        for (int64_t j = 0; j < g; ++j)
          for (int i = 0; i < PerGroup; ++i) out[i * g + j] = in[j * PerGroup + i];
      } else {
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < g; ++j) out[i * g + j] = in[j * n + i];
      }
    }
  });
}

template <class T>
void shuffle_nhwc(const void *x, void *y, int64_t pixels, int64_t channels, int64_t groups, int threads) {
  const T *in = static_cast<const T *>(x);
  T *out = static_cast<T *>(y);
  const int64_t per_group = channels / groups;
  if (groups == 2) return shuffle_pixels<T, 2, 0>(in, out, pixels, channels, groups, threads);
  if (groups == 3) return shuffle_pixels<T, 3, 0>(in, out, pixels, channels, groups, threads);
  if (groups == 4) return shuffle_pixels<T, 4, 0>(in, out, pixels, channels, groups, threads);
  if (groups == 8) return shuffle_pixels<T, 8, 0>(in, out, pixels, channels, groups, threads);
  if (per_group == 2) return shuffle_pixels<T, 0, 2>(in, out, pixels, channels, groups, threads);
  if (per_group == 4) return shuffle_pixels<T, 0, 4>(in, out, pixels, channels, groups, threads);
  return shuffle_pixels<T, 0, 0>(in, out, pixels, channels, groups, threads);
}

}  // namespace

extern "C" int ff_cpu_channel_shuffle(const void *x, void *y, int64_t batch, int64_t channels, int64_t spatial,
                                      int64_t groups, int layout, int dtype, int threads) {
  const int64_t size = dtype == FF_FLOAT64 ? 8 : dtype == FF_FLOAT32 ? 4 : 2;
  if (groups < 1 || channels % groups != 0) return FF_BAD_ARGUMENT;
  if (batch * channels * spatial == 0) return FF_OK;
  if (layout == FF_NCHW && spatial > 1)
    shuffle_planes(static_cast<const char *>(x), static_cast<char *>(y), batch, channels, spatial * size, groups,
                   threads);
  else if (size == 8)
    shuffle_nhwc<uint64_t>(x, y, batch * spatial, channels, groups, threads);
  else if (size == 4)
    shuffle_nhwc<uint32_t>(x, y, batch * spatial, channels, groups, threads);
  else
    shuffle_nhwc<uint16_t>(x, y, batch * spatial, channels, groups, threads);
  return FF_OK;
}

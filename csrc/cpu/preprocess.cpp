// From an 8-bit image to the network's input. The resize is separable: rows are combined first, over contiguous bytes,
// then the one resulting row is resampled.
#include <algorithm>
#include <cmath>

#include "ff_api.h"
#include "parallel.h"
#include "simd.h"

namespace {

using ff::Vec;

constexpr int kChannels = 3;
constexpr int64_t kGrainPixels = 16 * 1024;

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Most source pixels that one output reads; the triangle is `support` wide on both sides.
int64_t most_taps(int64_t source, int64_t target) {
  if (target == 0) return 0;
  const double support = std::max(1.0, double(source) / double(target));
  return std::min<int64_t>(source, static_cast<int64_t>(std::ceil(support)) * 2 + 1);
}

// The bilinear filter along one axis: output i is the sum of weights[i * stride + k] * source[first[i] + k], k <
// taps[i].
template <class T>
struct Filter {
  int64_t stride;
  int64_t *first, *taps;
  T *weights;

  static int64_t bytes(int64_t source, int64_t target) {
    return 2 * aligned(target * sizeof(int64_t)) + aligned(target * most_taps(source, target) * sizeof(T));
  }

  Filter(char *memory, int64_t source, int64_t target) : stride(most_taps(source, target)) {
    first = reinterpret_cast<int64_t *>(memory);
    taps = reinterpret_cast<int64_t *>(memory + aligned(target * sizeof(int64_t)));
    weights = reinterpret_cast<T *>(memory + 2 * aligned(target * sizeof(int64_t)));
    const double scale = double(source) / double(target), support = std::max(1.0, scale);
    for (int64_t i = 0; i < target; ++i) {
      const double centre = (i + 0.5) * scale;
      const int64_t begin = std::max<int64_t>(0, static_cast<int64_t>(centre - support + 0.5));
      const int64_t end = std::min<int64_t>({source, static_cast<int64_t>(centre + support + 0.5), begin + stride});
      T *w = weights + i * stride;
      double total = 0;
      for (int64_t k = begin; k < end; ++k) total += std::max(0.0, 1 - std::abs(k + 0.5 - centre) / support);
      for (int64_t k = begin; k < end; ++k)
        w[k - begin] = static_cast<T>(std::max(0.0, 1 - std::abs(k + 0.5 - centre) / support) / total);
      first[i] = begin;
      taps[i] = end - begin;
    }
  }
};

// Strides in elements.
template <class In>
struct Image {
  const In *data;
  int64_t batch_stride, row_stride, pixel_stride, channel_stride, width;

  const In *row(int64_t image, int64_t y) const { return data + image * batch_stride + y * row_stride; }
  bool packed() const { return channel_stride == 1 && pixel_stride == kChannels; }
};

// sum[x * 3 + c] = sum over k of weights[k] * row y + k of the image.
template <class In, class T>
void combine_rows(const Image<In> &image, int64_t batch, int64_t y, const T *weights, int64_t taps, T *__restrict sum) {
  const int64_t count = image.width * kChannels;
  for (int64_t k = 0; k < taps; ++k) {
    const In *__restrict row = image.row(batch, y + k);
    const T w = weights[k];
    if (image.packed()) {
      if (k == 0)
        for (int64_t i = 0; i < count; ++i) sum[i] = w * static_cast<T>(row[i]);
      else
        for (int64_t i = 0; i < count; ++i) sum[i] += w * static_cast<T>(row[i]);
      continue;
    }
    for (int64_t x = 0; x < image.width; ++x)
      for (int c = 0; c < kChannels; ++c) {
        const T v = w * static_cast<T>(row[x * image.pixel_stride + c * image.channel_stride]);
        sum[x * kChannels + c] = k == 0 ? v : sum[x * kChannels + c] + v;
      }
  }
}

template <class T>
struct Four;
template <>
struct Four<float> {
  typedef float Vector __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Four<double> {
  typedef double Vector __attribute__((vector_size(32)));
  typedef double Unaligned __attribute__((vector_size(32), aligned(8), may_alias));
};

// row: (width, 3) and one element more -> out[c][x], the three planes; a pixel is read as four elements.
template <class T>
void resample_row(const T *row, const Filter<T> &filter, int64_t target, const T *mean, T *const *out) {
  using Vector = typename Four<T>::Vector;
  for (int64_t x = 0; x < target; ++x) {
    const T *source = row + filter.first[x] * kChannels, *w = filter.weights + x * filter.stride;
    Vector sum = *reinterpret_cast<const typename Four<T>::Unaligned *>(source) * w[0];
    for (int64_t k = 1; k < filter.taps[x]; ++k)
      sum += *reinterpret_cast<const typename Four<T>::Unaligned *>(source + k * kChannels) * w[k];
    for (int c = 0; c < kChannels; ++c) out[c][x] = sum[c] - mean[c];
  }
}

template <class In, class T>
void preprocess(const Image<In> &image, int64_t batch, int64_t height, T *out, int64_t resized_height,
                int64_t resized_width, int64_t canvas_height, int64_t canvas_width, int64_t top, int64_t left,
                bool flip, const double *means, char *work, int threads) {
  const bool resize = height != resized_height || image.width != resized_width;
  T mean[kChannels];
  for (int c = 0; c < kChannels; ++c) mean[c] = static_cast<T>(means[flip ? kChannels - 1 - c : c]);

  const Filter<T> rows(work, height, resize ? resized_height : 0);
  work += Filter<T>::bytes(height, resize ? resized_height : 0);
  const Filter<T> columns(work, image.width, resize ? resized_width : 0);
  work += Filter<T>::bytes(image.width, resize ? resized_width : 0);
  const int64_t row_bytes = aligned((image.width * kChannels + 1) * sizeof(T));

  const int64_t lines = batch * canvas_height;
  const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(threads, lines * canvas_width / kGrainPixels));
  ff::parallel_for(chunks, 1, threads, [&](int64_t first_chunk, int64_t last_chunk) {
    T *line = reinterpret_cast<T *>(work + first_chunk * row_bytes);
    line[image.width * kChannels] = 0;
    for (int64_t i = lines * first_chunk / chunks; i < lines * last_chunk / chunks; ++i) {
      const int64_t b = i / canvas_height, y = i % canvas_height - top;
      T *planes[kChannels], *plane0 = out + (b * kChannels * canvas_height + y + top) * canvas_width;
      for (int c = 0; c < kChannels; ++c) {
        T *p = plane0 + (flip ? kChannels - 1 - c : c) * canvas_height * canvas_width;
        const bool inside = y >= 0 && y < resized_height;
        std::fill(p, p + (inside ? left : canvas_width), T(0));
        if (inside) std::fill(p + left + resized_width, p + canvas_width, T(0));
        planes[c] = p + left;
      }
      if (y < 0 || y >= resized_height) continue;
      if (resize) {
        combine_rows(image, b, rows.first[y], rows.weights + y * rows.stride, rows.taps[y], line);
        resample_row(line, columns, resized_width, mean, planes);
        continue;
      }
      const In *row = image.row(b, y);
      for (int c = 0; c < kChannels; ++c) {
        T *__restrict plane = planes[c];
        if (image.packed())
          for (int64_t x = 0; x < resized_width; ++x) plane[x] = static_cast<T>(row[x * kChannels + c]) - mean[c];
        else
          for (int64_t x = 0; x < resized_width; ++x)
            plane[x] = static_cast<T>(row[x * image.pixel_stride + c * image.channel_stride]) - mean[c];
      }
    }
  });
}

template <class T>
int64_t workspace(int64_t height, int64_t width, int64_t resized_height, int64_t resized_width, int threads) {
  return Filter<T>::bytes(height, resized_height) + Filter<T>::bytes(width, resized_width) +
         threads * aligned((width * kChannels + 1) * sizeof(T));
}

}  // namespace

extern "C" int64_t ff_cpu_preprocess_workspace(int64_t height, int64_t width, int64_t resized_height,
                                               int64_t resized_width, int out_dtype, int threads) {
  return out_dtype == FF_FLOAT64 ? workspace<double>(height, width, resized_height, resized_width, threads)
                                 : workspace<float>(height, width, resized_height, resized_width, threads);
}

extern "C" int ff_cpu_preprocess(const void *image, int64_t batch_stride, int64_t row_stride, int64_t pixel_stride,
                                 int64_t channel_stride, int64_t batch, int64_t height, int64_t width, void *out,
                                 int64_t resized_height, int64_t resized_width, int64_t canvas_height,
                                 int64_t canvas_width, int64_t top, int64_t left, int flip, double mean0, double mean1,
                                 double mean2, void *work, int in_dtype, int out_dtype, int threads) {
  const double means[] = {mean0, mean1, mean2};
  const auto call = [&](auto in, auto result) {
    using In = decltype(in);
    using T = decltype(result);
    const Image<In> view{static_cast<const In *>(image), batch_stride, row_stride, pixel_stride, channel_stride, width};
    preprocess<In, T>(view, batch, height, static_cast<T *>(out), resized_height, resized_width, canvas_height,
                      canvas_width, top, left, flip != 0, means, static_cast<char *>(work), threads);
    return FF_OK;
  };
  if (batch * canvas_height * canvas_width == 0) return FF_OK;
  if (out_dtype == FF_FLOAT32) {
    if (in_dtype == -1) return call(uint8_t(0), 0.0f);
    if (in_dtype == FF_FLOAT32) return call(0.0f, 0.0f);
    if (in_dtype == FF_FLOAT64) return call(0.0, 0.0f);
  }
  if (out_dtype == FF_FLOAT64) {
    if (in_dtype == -1) return call(uint8_t(0), 0.0);
    if (in_dtype == FF_FLOAT32) return call(0.0f, 0.0);
    if (in_dtype == FF_FLOAT64) return call(0.0, 0.0);
  }
  return FF_UNSUPPORTED_DTYPE;
}

// From the predictors' maps to rows per anchor and back. Of one level, z is (batch, pixels, anchors * 16): the channels
// of the box, class and landmark predictors one after the other. Outputs are (batch, rows, 4), (batch, rows, 2) and
// (batch, rows, 10); the level's rows begin at first_row, `anchors` rows per pixel.
#include <algorithm>
#include <cmath>

#include "ff_api.h"
#include "parallel.h"

namespace {

using namespace ff;

constexpr int64_t kGrainPixels = 1024;

template <class T>
int scatter(const T *z, int64_t batch, int64_t pixels, int64_t anchors, int softmax, T *bbox, T *cls, T *landmarks,
            int64_t first_row, int64_t rows, int threads) {
  parallel_for(batch * pixels, kGrainPixels, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pixels * rows + first_row + i % pixels * anchors;
      const T *in = z + i * anchors * 16;
      std::copy_n(in, anchors * 4, bbox + row * 4);
      T *scores = cls + row * 2;
      for (int64_t a = 0; a < anchors; ++a) {
        const T first = in[anchors * 4 + 2 * a], second = in[anchors * 4 + 2 * a + 1];
        if (!softmax) {
          scores[2 * a] = first, scores[2 * a + 1] = second;
          continue;
        }
        const T most = first > second || first != first ? first : second;
        const T e0 = std::exp(first - most), e1 = std::exp(second - most);
        scores[2 * a] = e0 / (e0 + e1), scores[2 * a + 1] = e1 / (e0 + e1);
      }
      std::copy_n(in + anchors * 6, anchors * 10, landmarks + row * 10);
    }
  });
  return FF_OK;
}

// A gradient that is NULL is zero.
template <class T>
int gather(const T *bbox, const T *cls, const T *landmarks, const T *probabilities, int64_t batch, int64_t pixels,
           int64_t anchors, T *z, int64_t first_row, int64_t rows, int threads) {
  const auto fill = [](const T *from, int64_t count, T *to) {
    from ? std::copy_n(from, count, to) : std::fill_n(to, count, T(0));
  };
  parallel_for(batch * pixels, kGrainPixels, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pixels * rows + first_row + i % pixels * anchors;
      T *out = z + i * anchors * 16;
      fill(bbox ? bbox + row * 4 : nullptr, anchors * 4, out);
      fill(landmarks ? landmarks + row * 10 : nullptr, anchors * 10, out + anchors * 6);
      T *logits = out + anchors * 4;
      fill(cls ? cls + row * 2 : nullptr, anchors * 2, logits);
      for (int64_t a = 0; probabilities != nullptr && cls != nullptr && a < 2 * anchors; a += 2) {
        const T *p = probabilities + row * 2 + a;
        const T mean = logits[a] * p[0] + logits[a + 1] * p[1];
        logits[a] = p[0] * (logits[a] - mean);
        logits[a + 1] = p[1] * (logits[a + 1] - mean);
      }
    }
  });
  return FF_OK;
}

}  // namespace

extern "C" int ff_cpu_multi_head_scatter(const void *z, int64_t batch, int64_t pixels, int64_t anchors, int softmax,
                                         void *bbox, void *cls, void *landmarks, int64_t first_row, int64_t rows,
                                         int dtype, int threads) {
#define FF_CALL(T)                                                                                                   \
  scatter(static_cast<const T *>(z), batch, pixels, anchors, softmax, static_cast<T *>(bbox), static_cast<T *>(cls), \
          static_cast<T *>(landmarks), first_row, rows, threads)
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int ff_cpu_multi_head_gather(const void *bbox, const void *cls, const void *landmarks,
                                        const void *probabilities, int64_t batch, int64_t pixels, int64_t anchors,
                                        void *z, int64_t first_row, int64_t rows, int dtype, int threads) {
#define FF_CALL(T)                                                                                     \
  gather(static_cast<const T *>(bbox), static_cast<const T *>(cls), static_cast<const T *>(landmarks), \
         static_cast<const T *>(probabilities), batch, pixels, anchors, static_cast<T *>(z), first_row, rows, threads)
  if (dtype == FF_FLOAT32) return FF_CALL(float);
  if (dtype == FF_FLOAT64) return FF_CALL(double);
#undef FF_CALL
  return FF_UNSUPPORTED_DTYPE;
}

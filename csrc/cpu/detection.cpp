// Box and landmark decoding, score filter, top-k and greedy suppression.
//
// Every product below that feeds a sum is rounded on its own, as PyTorch's separate operations round it: an overlap
// equal to the threshold must be the same answer on every machine.
#include <algorithm>
#include <cmath>

#include "ff_api.h"
#include "simd.h"

namespace {

using ff::Vec;

// Keeps the compiler from contracting a product and the sum it feeds into one FMA.
template <class T>
FF_INLINE T rounded(T v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

template <class T>
FF_INLINE Vec<T> rounded(Vec<T> v) {
  return rounded(v.v);
}

template <class T>
struct Candidate {
  T score;
  int32_t index;
};

// Best score first, equal scores in the order of the anchors: a total order, so any sort gives one answer.
template <class T>
bool better(const Candidate<T> &a, const Candidate<T> &b) {
  return a.score != b.score ? a.score > b.score : a.index < b.index;
}

// box: x1 y1 x2 y2. Coordinates and area are finite.
template <class T>
bool usable_box(const T *box) {
  const T area = (box[2] - box[0]) * (box[3] - box[1]);
  return std::isfinite(box[0]) && std::isfinite(box[1]) && std::isfinite(box[2]) && std::isfinite(box[3]) &&
         std::isfinite(area);
}

// t: (4,) regression, prior: cx cy w h, box: x1 y1 x2 y2.
template <class T>
void decode_box(const T *t, const T *prior, T v0, T v1, T *box) {
  for (int axis = 0; axis < 2; ++axis) {
    const T size = prior[2 + axis];
    const T centre = prior[axis] + rounded(t[axis] * v0 * size);
    const T half = rounded(size * std::exp(t[2 + axis] * v1) / 2);
    box[axis] = centre - half;
    box[2 + axis] = centre + half;
  }
}

template <class T>
void decode_points(const T *t, const T *prior, T v0, int64_t coordinates, T *points) {
  for (int64_t k = 0; k < coordinates; ++k) points[k] = rounded(t[k] * v0 * prior[2 + (k & 1)]) + prior[k & 1];
}

// The boxes that suppression has kept, as five columns, padded to whole vectors by boxes that overlap nothing.
template <class T>
class Kept {
 public:
  Kept(T *memory, int64_t capacity) : column_(memory), capacity_(capacity) {}

  // Whether a kept box and `box` satisfy intersection > threshold * union.
  bool overlaps(const T *box, T threshold) const {
    using V = Vec<T>;
    const V x1(box[0]), y1(box[1]), x2(box[2]), y2(box[3]), area(box_area(box)), limit(threshold);
    for (int64_t i = 0; i < count_; i += V::kLanes) {
      const V width = smaller(at(2, i), x2) - larger(at(0, i), x1);
      const V height = smaller(at(3, i), y2) - larger(at(1, i), y1);
      const V intersection = rounded(V::if_negative(width, V::zero()) * height);
      const V unite = at(4, i) + area - intersection;
      const auto over = intersection.v > (limit * unite).v;
      for (int lane = 0; lane < V::kLanes; ++lane)
        if (over[lane]) return true;
    }
    return false;
  }

  void add(const T *box) {
    if (count_ % Vec<T>::kLanes == 0)
      for (int column = 0; column < 5; ++column) Vec<T>::zero().store(column_ + column * capacity_ + count_);
    for (int column = 0; column < 4; ++column) column_[column * capacity_ + count_] = box[column];
    column_[4 * capacity_ + count_] = box_area(box);
    ++count_;
  }

 private:
  using V = Vec<T>;
  static FF_INLINE V smaller(V a, V b) { return a.v < b.v ? a.v : b.v; }
  static FF_INLINE V larger(V a, V b) { return a.v > b.v ? a.v : b.v; }
  static T box_area(const T *box) {
    const T width = box[2] - box[0], height = box[3] - box[1];
    return (width < 0 ? 0 : width) * (height < 0 ? 0 : height);
  }
  FF_INLINE V at(int column, int64_t i) const { return V::load(column_ + column * capacity_ + i); }

  T *column_;
  int64_t capacity_, count_ = 0;
};

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
int64_t kept_capacity(int64_t boxes) {
  return (boxes + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
}

template <class T>
int64_t sort_best(Candidate<T> *candidates, int64_t count, int64_t top_k) {
  if (count > top_k) {
    std::nth_element(candidates, candidates + top_k, candidates + count, better<T>);
    count = top_k;
  }
  std::sort(candidates, candidates + count, better<T>);
  return count;
}

template <class T>
void decode(const T *bbox, const T *landmarks, const T *priors, T *boxes, T *points, int64_t batch, int64_t anchors,
            int64_t coordinates, T v0, T v1) {
  for (int64_t i = 0; i < batch * anchors; ++i) {
    const T *prior = priors + i % anchors * 4;
    decode_box(bbox + i * 4, prior, v0, v1, boxes + i * 4);
    decode_points(landmarks + i * coordinates, prior, v0, coordinates, points + i * coordinates);
  }
}

template <class T>
int64_t nms(const T *boxes, const T *scores, int64_t stride, int64_t count, T threshold, int64_t *keep, char *work) {
  auto *candidates = reinterpret_cast<Candidate<T> *>(work);
  Kept<T> kept(reinterpret_cast<T *>(work + aligned(count * sizeof(Candidate<T>))), kept_capacity<T>(count));
  int64_t usable = 0;
  for (int64_t i = 0; i < count; ++i)
    if (usable_box(boxes + 4 * i) && !std::isnan(scores[i * stride]))
      candidates[usable++] = {scores[i * stride], static_cast<int32_t>(i)};
  usable = sort_best(candidates, usable, usable);
  int64_t found = 0;
  for (int64_t i = 0; i < usable; ++i) {
    const T *box = boxes + 4 * int64_t(candidates[i].index);
    if (kept.overlaps(box, threshold)) continue;
    kept.add(box);
    keep[found++] = candidates[i].index;
  }
  return found;
}

template <class T>
int64_t detect(const T *bbox, const T *scores, int64_t stride, const T *landmarks, const T *priors, int64_t anchors,
               int64_t coordinates, T score_threshold, T nms_threshold, int64_t top_k, int64_t keep_top_k, T v0, T v1,
               T *boxes, T *kept_scores, T *points, char *work) {
  auto *candidates = reinterpret_cast<Candidate<T> *>(work);
  Kept<T> kept(reinterpret_cast<T *>(work + aligned(anchors * sizeof(Candidate<T>))), kept_capacity<T>(keep_top_k));
  int64_t count = 0;
  for (int64_t i = 0; i < anchors; ++i)
    if (scores[i * stride] > score_threshold) candidates[count++] = {scores[i * stride], static_cast<int32_t>(i)};
  count = sort_best(candidates, count, top_k);
  int64_t found = 0;
  for (int64_t i = 0; i < count && found < keep_top_k; ++i) {
    const int64_t anchor = candidates[i].index;
    T *box = boxes + 4 * found, *point = points + coordinates * found;
    decode_box(bbox + 4 * anchor, priors + 4 * anchor, v0, v1, box);
    if (!usable_box(box) || kept.overlaps(box, nms_threshold)) continue;
    decode_points(landmarks + coordinates * anchor, priors + 4 * anchor, v0, coordinates, point);
    if (!std::all_of(point, point + coordinates, [](T v) { return std::isfinite(v); })) continue;
    kept.add(box);
    kept_scores[found++] = candidates[i].score;
  }
  return found;
}

template <class T>
int64_t workspace(int64_t candidates, int64_t kept) {
  return aligned(candidates * sizeof(Candidate<T>)) + 5 * kept_capacity<T>(kept) * sizeof(T);
}

template <class T>
const T *in(const void *p) {
  return static_cast<const T *>(p);
}
template <class T>
T *out(void *p) {
  return static_cast<T *>(p);
}

}  // namespace

extern "C" int ff_cpu_decode(const void *bbox, const void *landmarks, const void *priors, void *boxes, void *points,
                             int64_t batch, int64_t anchors, int64_t coordinates, double v0, double v1, int dtype) {
  if (dtype == FF_FLOAT32)
    decode<float>(in<float>(bbox), in<float>(landmarks), in<float>(priors), out<float>(boxes), out<float>(points),
                  batch, anchors, coordinates, v0, v1);
  else if (dtype == FF_FLOAT64)
    decode<double>(in<double>(bbox), in<double>(landmarks), in<double>(priors), out<double>(boxes), out<double>(points),
                   batch, anchors, coordinates, v0, v1);
  else
    return FF_UNSUPPORTED_DTYPE;
  return FF_OK;
}

extern "C" int64_t ff_cpu_detection_workspace(int64_t candidates, int64_t kept, int dtype) {
  return dtype == FF_FLOAT32 ? workspace<float>(candidates, kept) : workspace<double>(candidates, kept);
}

extern "C" int64_t ff_cpu_nms(const void *boxes, const void *scores, int64_t score_stride, int64_t count,
                              double threshold, int64_t *keep, void *work, int dtype) {
  if (count > INT32_MAX) return FF_BAD_ARGUMENT;
  if (dtype == FF_FLOAT32)
    return nms<float>(in<float>(boxes), in<float>(scores), score_stride, count, threshold, keep, out<char>(work));
  if (dtype == FF_FLOAT64)
    return nms<double>(in<double>(boxes), in<double>(scores), score_stride, count, threshold, keep, out<char>(work));
  return FF_UNSUPPORTED_DTYPE;
}

extern "C" int64_t ff_cpu_detect(const void *bbox, const void *scores, int64_t score_stride, const void *landmarks,
                                 const void *priors, int64_t anchors, int64_t coordinates, double score_threshold,
                                 double nms_threshold, int64_t top_k, int64_t keep_top_k, double v0, double v1,
                                 void *boxes, void *kept_scores, void *points, void *work, int dtype) {
  if (anchors > INT32_MAX) return FF_BAD_ARGUMENT;
  if (dtype == FF_FLOAT32)
    return detect<float>(in<float>(bbox), in<float>(scores), score_stride, in<float>(landmarks), in<float>(priors),
                         anchors, coordinates, score_threshold, nms_threshold, top_k, keep_top_k, v0, v1,
                         out<float>(boxes), out<float>(kept_scores), out<float>(points), out<char>(work));
  if (dtype == FF_FLOAT64)
    return detect<double>(in<double>(bbox), in<double>(scores), score_stride, in<double>(landmarks), in<double>(priors),
                          anchors, coordinates, score_threshold, nms_threshold, top_k, keep_top_k, v0, v1,
                          out<double>(boxes), out<double>(kept_scores), out<double>(points), out<char>(work));
  return FF_UNSUPPORTED_DTYPE;
}

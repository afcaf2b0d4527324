// Decoding, filtering, top-k and non-maximum suppression on the device, without synchronisation: sizes are fixed by the
// caller's limits, counts stay on the device, so a CUDA graph can hold it all.
//
// Candidates are 64-bit keys: the complement of the score's order-preserving bits above the index. Keys are unique and
// their ascending order is that of the result (best score first, equal scores by position), so the order in which
// threads append candidates does not matter. Half-precision arithmetic is rounded after every operation, as PyTorch's
// is.
#include "common.cuh"

namespace {

using Key = unsigned long long;
constexpr Key kNoKey = ~Key(0);
constexpr int kThreads = 256;
constexpr int kBlock = 1024;  // threads of kernels that run in one block
constexpr int kChunk = 4096;  // keys that one block sorts in shared memory
constexpr int kSettle = 64;   // boxes that suppression settles at a time

template <class T>
__device__ __forceinline__ float rounded(float v) {
  return ff::to_float(ff::from_float<T>(v));
}
template <class T>
__device__ __forceinline__ float add(float a, float b) {
  return rounded<T>(__fadd_rn(a, b));
}
template <class T>
__device__ __forceinline__ float sub(float a, float b) {
  return rounded<T>(__fsub_rn(a, b));
}
template <class T>
__device__ __forceinline__ float mul(float a, float b) {
  return rounded<T>(__fmul_rn(a, b));
}

__device__ __forceinline__ bool finite(float v) { return fabsf(v) <= 3.402823466e38f; }

template <class T>
__device__ __forceinline__ bool usable(float4 box) {
  const float area = mul<T>(sub<T>(box.z, box.x), sub<T>(box.w, box.y));
  return finite(box.x) && finite(box.y) && finite(box.z) && finite(box.w) && finite(area);
}

template <class T>
__device__ __forceinline__ float4 read4(const T *p) {
  return make_float4(ff::to_float(p[0]), ff::to_float(p[1]), ff::to_float(p[2]), ff::to_float(p[3]));
}

template <class T>
__device__ float4 decode_box(float4 t, float4 prior, float v0, float v1) {
  const float cx = add<T>(prior.x, mul<T>(mul<T>(t.x, v0), prior.z));
  const float cy = add<T>(prior.y, mul<T>(mul<T>(t.y, v0), prior.w));
  const float w = mul<T>(mul<T>(prior.z, rounded<T>(expf(mul<T>(t.z, v1)))), 0.5f);
  const float h = mul<T>(mul<T>(prior.w, rounded<T>(expf(mul<T>(t.w, v1)))), 0.5f);
  return make_float4(sub<T>(cx, w), sub<T>(cy, h), add<T>(cx, w), add<T>(cy, h));
}

template <class T>
__device__ __forceinline__ float decode_coordinate(float t, float centre, float size, float v0) {
  return add<T>(mul<T>(mul<T>(t, v0), size), centre);
}

__device__ __forceinline__ Key make_key(float score, uint32_t index) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 becomes +0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return Key(~ordered) << 32 | index;
}

// bbox: (rows, 4), landmarks: (rows, coordinates), priors: (anchors, 4).
template <class T>
__global__ void decode_kernel(const T *__restrict__ bbox, const T *__restrict__ landmarks, const T *__restrict__ priors,
                              T *__restrict__ boxes, T *__restrict__ points, int64_t rows, int64_t anchors,
                              int coordinates, float v0, float v1) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < rows; i += int64_t(gridDim.x) * blockDim.x) {
    const float4 prior = read4(priors + 4 * (i % anchors));
    const float4 box = decode_box<T>(read4(bbox + 4 * i), prior, v0, v1);
    boxes[4 * i] = ff::from_float<T>(box.x);
    boxes[4 * i + 1] = ff::from_float<T>(box.y);
    boxes[4 * i + 2] = ff::from_float<T>(box.z);
    boxes[4 * i + 3] = ff::from_float<T>(box.w);
    for (int c = 0; c < coordinates; ++c) {
      const float t = ff::to_float(landmarks[i * coordinates + c]);
      const float point =
          c % 2 ? decode_coordinate<T>(t, prior.y, prior.w, v0) : decode_coordinate<T>(t, prior.x, prior.z, v0);
      points[i * coordinates + c] = ff::from_float<T>(point);
    }
  }
}

// Appends the keys of scores above the threshold; with boxes (nms), of all usable boxes whose score is a number.
template <class T>
__global__ void collect_kernel(const T *__restrict__ scores, int64_t stride, const T *__restrict__ boxes, int count,
                               float threshold, Key *__restrict__ keys, int *__restrict__ found) {
  const int lane = threadIdx.x % 32;
  for (int first = blockIdx.x * kThreads; first < count; first += gridDim.x * kThreads) {
    const int i = first + threadIdx.x;
    float score = 0;
    bool candidate = false;
    if (i < count) {
      score = ff::to_float(scores[i * stride]);
      candidate = boxes == nullptr ? score > threshold : score == score && usable<T>(read4(boxes + 4 * int64_t(i)));
    }
    const unsigned chosen = __ballot_sync(0xffffffffu, candidate);
    int base = 0;
    if (lane == 0 && chosen != 0) base = atomicAdd(found, __popc(chosen));
    base = __shfl_sync(0xffffffffu, base, 0);
    if (candidate) keys[base + __popc(chosen & ((1u << lane) - 1))] = make_key(score, static_cast<uint32_t>(i));
  }
}

// The `limit` smallest of found[0] keys, in any order, padded with kNoKey to `padded`; found[1] = their number. One
// block: a radix selection, eight bits at a time, only where there are more keys than the limit.
__global__ void __launch_bounds__(kBlock) select_kernel(const Key *__restrict__ keys, int limit, int padded,
                                                        Key *__restrict__ best, int *__restrict__ found) {
  __shared__ int histogram[256];
  __shared__ int digit;
  __shared__ int below;
  __shared__ int appended;
  const int t = threadIdx.x, count = found[0];
  if (count <= limit) {
    for (int i = t; i < padded; i += kBlock) best[i] = i < count ? keys[i] : kNoKey;
    if (t == 0) found[1] = count;
    return;
  }
  Key prefix = 0;  // the leading digits of the limit-th smallest key
  int rank = limit;
  for (int shift = 56; shift >= 0; shift -= 8) {
    if (t < 256) histogram[t] = 0;
    __syncthreads();
    for (int i = t; i < count; i += kBlock)
      if (shift == 56 || keys[i] >> (shift + 8) == prefix) atomicAdd(&histogram[keys[i] >> shift & 255], 1);
    __syncthreads();
    if (t == 0) {
      int sum = 0, d = 0;
      while (sum + histogram[d] < rank) sum += histogram[d++];
      digit = d;
      below = sum;
      appended = 0;
    }
    __syncthreads();
    prefix = prefix << 8 | Key(digit);
    rank -= below;
  }
  for (int i = t; i < count; i += kBlock)
    if (keys[i] <= prefix) best[atomicAdd(&appended, 1)] = keys[i];
  for (int i = limit + t; i < padded; i += kBlock) best[i] = kNoKey;
  if (t == 0) found[1] = limit;
}

__device__ __forceinline__ void exchange(Key &a, Key &b, bool ascending) {
  if ((a > b) == ascending) {
    const Key c = a;
    a = b;
    b = c;
  }
}

// Bitonic sort. Sorts chunks of kChunk keys, or (from > 0) does a merge's steps from `from` down inside each chunk.
__global__ void __launch_bounds__(kBlock) sort_chunk_kernel(Key *__restrict__ keys, int padded, int span, int from) {
  __shared__ Key chunk[kChunk];
  const int size = min(padded, kChunk), base = blockIdx.x * kChunk;
  for (int i = threadIdx.x; i < size; i += kBlock) chunk[i] = keys[base + i];
  __syncthreads();
  for (int k = from > 0 ? span : 2; k <= (from > 0 ? span : size); k *= 2)
    for (int j = from > 0 ? from : k / 2; j > 0; j /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kBlock) {
        const int low = 2 * j * (i / j) + i % j;
        exchange(chunk[low], chunk[low + j], ((base + low) & k) == 0);
      }
      __syncthreads();
    }
  for (int i = threadIdx.x; i < size; i += kBlock) keys[base + i] = chunk[i];
}

__global__ void sort_step_kernel(Key *__restrict__ keys, int padded, int span, int step) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= padded / 2) return;
  const int low = 2 * step * (i / step) + i % step;
  exchange(keys[low], keys[low + step], (low & span) == 0);
}

// The boxes of the sorted keys; alive: they take part in suppression. With priors (detect) regressions are decoded.
template <class T>
__global__ void gather_kernel(const Key *__restrict__ best, const int *__restrict__ found, const T *__restrict__ boxes,
                              const T *__restrict__ landmarks, const T *__restrict__ priors, int coordinates, float v0,
                              float v1, float4 *__restrict__ out, uint8_t *__restrict__ alive) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= found[1]) return;
  const int64_t index = static_cast<uint32_t>(best[i]);
  float4 box = read4(boxes + 4 * index);
  bool good = true;
  if (priors != nullptr) {
    const float4 prior = read4(priors + 4 * index);
    box = decode_box<T>(box, prior, v0, v1);
    good = usable<T>(box);
    for (int c = 0; c < coordinates; ++c) {
      const float t = ff::to_float(landmarks[index * coordinates + c]);
      good = good && finite(c % 2 ? decode_coordinate<T>(t, prior.y, prior.w, v0)
                                  : decode_coordinate<T>(t, prior.x, prior.z, v0));
    }
  }
  out[i] = box;
  alive[i] = good;
}

template <class T>
__device__ __forceinline__ float area_of(float4 b) {
  const float w = sub<T>(b.z, b.x), h = sub<T>(b.w, b.y);
  return mul<T>(w < 0 ? 0 : w, h < 0 ? 0 : h);
}

template <class T>
__device__ __forceinline__ bool overlap(float4 a, float area_a, float4 b, float area_b, float threshold) {
  const float w = sub<T>(fminf(a.z, b.z), fmaxf(a.x, b.x)), h = sub<T>(fminf(a.w, b.w), fmaxf(a.y, b.y));
  const float intersection = mul<T>(w < 0 ? 0 : w, h);
  const float joint = sub<T>(add<T>(area_a, area_b), intersection);
  return sub<T>(intersection, mul<T>(joint, threshold)) > 0;
}

template <class T>
struct Found {
  const T *scores, *landmarks, *priors;
  int64_t score_stride;
  int coordinates;
  float v0;
  T *boxes, *kept_scores, *points;
  int64_t *keep;
};

// Greedy suppression in one block. Boxes are settled kSettle at a time: what earlier boxes overlap is gone by then, so
// their fate depends on each other alone. Writes rows (detect) or indices (nms), and their number to *total.
template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    suppress_kernel(const Key *__restrict__ best, const int *__restrict__ found, const float4 *__restrict__ boxes,
                    uint8_t *__restrict__ alive, float threshold, int limit, Found<T> out,
                    int64_t *__restrict__ total) {
  __shared__ float4 box[kSettle];
  __shared__ float area[kSettle];
  __shared__ bool here[kSettle];
  __shared__ unsigned hits[kSettle][2];  // bit j of row i: box i overlaps box j > i
  __shared__ int kept[kSettle];
  __shared__ int kept_count;
  const int t = threadIdx.x, count = found[1];
  int written = 0;
  for (int base = 0; base < count && written < limit; base += kSettle) {
    const int size = min(kSettle, count - base);
    if (t < size) {
      box[t] = boxes[base + t];
      area[t] = area_of<T>(box[t]);
      here[t] = alive[base + t] != 0;
    }
    if (t < 2 * kSettle) hits[t / 2][t % 2] = 0;
    __syncthreads();
    for (int pair = t; pair < size * kSettle; pair += kBlock) {
      const int i = pair / kSettle, j = pair % kSettle;
      if (i < j && j < size && here[i] && here[j] && overlap<T>(box[i], area[i], box[j], area[j], threshold))
        atomicOr(&hits[i][j / 32], 1u << (j % 32));
    }
    __syncthreads();
    if (t == 0) {
      unsigned gone[2] = {0, 0};
      int n = 0;
      for (int i = 0; i < size; ++i) {
        if (!here[i] || ((i < 32 ? gone[0] : gone[1]) >> (i % 32) & 1)) continue;
        kept[n++] = i;
        gone[0] |= hits[i][0];
        gone[1] |= hits[i][1];
      }
      kept_count = n;
    }
    __syncthreads();
    const int n = kept_count;
    for (int j = base + kSettle + t; j < count; j += kBlock) {
      if (!alive[j]) continue;
      const float4 other = boxes[j];
      const float other_area = area_of<T>(other);
      for (int k = 0; k < n; ++k)
        if (overlap<T>(box[kept[k]], area[kept[k]], other, other_area, threshold)) {
          alive[j] = 0;
          break;
        }
    }
    const int wanted = min(n, limit - written);
    for (int k = t; k < wanted; k += kBlock) {
      const int64_t index = static_cast<uint32_t>(best[base + kept[k]]), row = written + k;
      if (out.keep != nullptr) {
        out.keep[row] = index;
        continue;
      }
      const float4 b = box[kept[k]], prior = read4(out.priors + 4 * index);
      out.boxes[4 * row] = ff::from_float<T>(b.x);
      out.boxes[4 * row + 1] = ff::from_float<T>(b.y);
      out.boxes[4 * row + 2] = ff::from_float<T>(b.z);
      out.boxes[4 * row + 3] = ff::from_float<T>(b.w);
      out.kept_scores[row] = out.scores[index * out.score_stride];
      for (int c = 0; c < out.coordinates; ++c) {
        const float v = ff::to_float(out.landmarks[index * out.coordinates + c]);
        const float point = c % 2 ? decode_coordinate<T>(v, prior.y, prior.w, out.v0)
                                  : decode_coordinate<T>(v, prior.x, prior.z, out.v0);
        out.points[row * out.coordinates + c] = ff::from_float<T>(point);
      }
    }
    written += wanted;
    __syncthreads();
  }
  if (t == 0) *total = written;
}

int64_t padded_size(int64_t n) {
  int64_t size = 2;
  while (size < n) size *= 2;
  return size;
}

constexpr int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

struct Workspace {
  Key *keys, *best;
  float4 *boxes;
  uint8_t *alive;
  int *found;
  int64_t bytes;

  Workspace(void *memory, int64_t candidates, int64_t limit) : bytes(0) {
    char *base = static_cast<char *>(memory);
    const auto take = [&](int64_t size) {
      char *begin = base == nullptr ? nullptr : base + bytes;
      bytes += aligned(size);
      return static_cast<void *>(begin);
    };
    keys = static_cast<Key *>(take(candidates * sizeof(Key)));
    best = static_cast<Key *>(take(padded_size(limit) * sizeof(Key)));
    boxes = static_cast<float4 *>(take(limit * sizeof(float4)));
    alive = static_cast<uint8_t *>(take(limit));
    found = static_cast<int *>(take(2 * sizeof(int)));
  }
};

// The `limit` best candidates, sorted, in work.best; their number in work.found[1].
template <class T>
void select_best(const T *scores, int64_t stride, const T *boxes, int64_t count, double threshold, int64_t limit,
                 const Workspace &work, cudaStream_t stream) {
  // The scalar is compared in the dtype of the scores.
  const float least = ff::to_float(ff::from_float<T>(static_cast<float>(threshold)));
  const int padded = static_cast<int>(padded_size(limit)), chunks = static_cast<int>(ff::ceil_div(padded, kChunk));
  cudaMemsetAsync(work.found, 0, 2 * sizeof(int), stream);
  collect_kernel<T><<<ff::blocks_for(count, kThreads, 1024), kThreads, 0, stream>>>(
      scores, stride, boxes, static_cast<int>(count), least, work.keys, work.found);
  select_kernel<<<1, kBlock, 0, stream>>>(work.keys, static_cast<int>(limit), padded, work.best, work.found);
  sort_chunk_kernel<<<chunks, kBlock, 0, stream>>>(work.best, padded, 0, 0);
  for (int span = 2 * kChunk; span <= padded; span *= 2) {
    for (int step = span / 2; step >= kChunk; step /= 2)
      sort_step_kernel<<<ff::blocks_for(padded / 2, kThreads, INT32_MAX), kThreads, 0, stream>>>(work.best, padded,
                                                                                                 span, step);
    sort_chunk_kernel<<<chunks, kBlock, 0, stream>>>(work.best, padded, span, kChunk / 2);
  }
}

constexpr int64_t kMostCandidates = int64_t(1) << 29;

}  // namespace

extern "C" int ff_cuda_decode(const void *bbox, const void *landmarks, const void *priors, void *boxes, void *points,
                              int64_t batch, int64_t anchors, int64_t coordinates, double v0, double v1, int dtype,
                              void *stream) {
  const int64_t rows = batch * anchors;
  if (coordinates > 1 << 20) return FF_BAD_ARGUMENT;
  if (rows == 0) return FF_OK;
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    decode_kernel<T><<<ff::blocks_for(rows, kThreads, 65536), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T *>(bbox), static_cast<const T *>(landmarks), static_cast<const T *>(priors),
        static_cast<T *>(boxes), static_cast<T *>(points), rows, anchors, static_cast<int>(coordinates),
        static_cast<float>(v0), static_cast<float>(v1));
    return cudaGetLastError();
  });
}

extern "C" int64_t ff_cuda_detection_workspace(int64_t candidates, int64_t limit) {
  return Workspace(nullptr, candidates, limit).bytes;
}

extern "C" int ff_cuda_nms(const void *boxes, const void *scores, int64_t score_stride, int64_t count, double threshold,
                           int64_t *keep, int64_t *total, void *workspace, int dtype, void *stream) {
  if (count > kMostCandidates) return FF_BAD_ARGUMENT;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (count == 0) return cudaMemsetAsync(total, 0, sizeof(int64_t), s);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const T *all = static_cast<const T *>(boxes), *values = static_cast<const T *>(scores);
    const Workspace work(workspace, count, count);
    const int limit = static_cast<int>(count);
    select_best<T>(values, score_stride, all, count, 0, count, work, s);
    gather_kernel<T><<<ff::blocks_for(count, kThreads, INT32_MAX), kThreads, 0, s>>>(
        work.best, work.found, all, nullptr, nullptr, 0, 0, 0, work.boxes, work.alive);
    Found<T> out{};
    out.keep = keep;
    suppress_kernel<T><<<1, kBlock, 0, s>>>(work.best, work.found, work.boxes, work.alive,
                                            static_cast<float>(threshold), limit, out, total);
    return cudaGetLastError();
  });
}

extern "C" int ff_cuda_detect(const void *bbox, const void *scores, int64_t score_stride, const void *landmarks,
                              const void *priors, int64_t anchors, int64_t coordinates, double score_threshold,
                              double nms_threshold, int64_t top_k, int64_t keep_top_k, double v0, double v1,
                              void *boxes, void *kept_scores, void *points, int64_t *total, void *workspace, int dtype,
                              void *stream) {
  if (anchors > kMostCandidates || coordinates > 1 << 20 || top_k > anchors || keep_top_k > top_k)
    return FF_BAD_ARGUMENT;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (anchors == 0) return cudaMemsetAsync(total, 0, sizeof(int64_t), s);
  return ff::dispatch(dtype, [&](auto zero) -> int {
    using T = decltype(zero);
    const T *regressions = static_cast<const T *>(bbox), *values = static_cast<const T *>(scores);
    const Workspace work(workspace, anchors, top_k);
    const float first = static_cast<float>(v0), second = static_cast<float>(v1);
    const Found<T> out{values,
                       static_cast<const T *>(landmarks),
                       static_cast<const T *>(priors),
                       score_stride,
                       static_cast<int>(coordinates),
                       first,
                       static_cast<T *>(boxes),
                       static_cast<T *>(kept_scores),
                       static_cast<T *>(points),
                       nullptr};
    select_best<T>(values, score_stride, static_cast<const T *>(nullptr), anchors, score_threshold, top_k, work, s);
    gather_kernel<T><<<ff::blocks_for(top_k, kThreads, INT32_MAX), kThreads, 0, s>>>(
        work.best, work.found, regressions, out.landmarks, out.priors, out.coordinates, first, second, work.boxes,
        work.alive);
    suppress_kernel<T><<<1, kBlock, 0, s>>>(work.best, work.found, work.boxes, work.alive,
                                            static_cast<float>(nms_threshold), static_cast<int>(keep_top_k), out,
                                            total);
    return cudaGetLastError();
  });
}

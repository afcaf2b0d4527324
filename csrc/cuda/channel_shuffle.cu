// Channel shuffle on CUDA. One thread moves one element of 2 to 16 bytes: NCHW planes are copied in the widest element
// that divides them; in NHWC a warp writes consecutive channels of a pixel and its reads stay inside one cache line.
#include <cuda_runtime.h>

#include "ff_api.h"

namespace {

constexpr int kThreads = 256;

// out, in: (outer, channels, inner) elements of type T; inner = 1 for NHWC.
template <class T, class Index>
__global__ void channel_shuffle_kernel(const T *__restrict__ in, T *__restrict__ out, Index total, Index channels,
                                       Index inner, Index groups) {
  const Index per_group = channels / groups;
  for (Index at = blockIdx.x * Index(blockDim.x) + threadIdx.x; at < total; at += Index(gridDim.x) * blockDim.x) {
    const Index row = at / inner, offset = at - row * inner;
    const Index image = row / channels, channel = row - image * channels;
    const Index source = (channel % groups) * per_group + channel / groups;
    out[at] = in[(image * channels + source) * inner + offset];
  }
}

template <class T>
int launch(const void *x, void *y, int64_t outer, int64_t channels, int64_t inner, int64_t groups,
           cudaStream_t stream) {
  const int64_t total = outer * channels * inner;
  const int64_t wanted = (total + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < 65536 ? wanted : 65536);
  const T *in = static_cast<const T *>(x);
  T *out = static_cast<T *>(y);
  if (total + int64_t(blocks) * kThreads < (int64_t(1) << 32))
    channel_shuffle_kernel<T, uint32_t><<<blocks, kThreads, 0, stream>>>(in, out, total, channels, inner, groups);
  else
    channel_shuffle_kernel<T, int64_t><<<blocks, kThreads, 0, stream>>>(in, out, total, channels, inner, groups);
  return cudaGetLastError();
}

bool divides(const void *x, const void *y, int64_t bytes, int64_t width) {
  return ((reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y) | uintptr_t(bytes)) &
          uintptr_t(width - 1)) == 0;
}

}  // namespace

extern "C" int ff_cuda_channel_shuffle(const void *x, void *y, int64_t batch, int64_t channels, int64_t spatial,
                                       int64_t groups, int layout, int dtype, void *stream) {
  const int64_t size = dtype == FF_FLOAT64 ? 8 : dtype == FF_FLOAT32 ? 4 : 2;
  if (groups < 1 || channels % groups != 0) return FF_BAD_ARGUMENT;
  if (batch * channels * spatial == 0) return FF_OK;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (layout == FF_NCHW) {
    const int64_t bytes = spatial * size;
    if (divides(x, y, bytes, 16)) return launch<uint4>(x, y, batch, channels, bytes / 16, groups, s);
    if (divides(x, y, bytes, 8)) return launch<uint2>(x, y, batch, channels, bytes / 8, groups, s);
    if (divides(x, y, bytes, 4)) return launch<uint32_t>(x, y, batch, channels, bytes / 4, groups, s);
    return launch<uint16_t>(x, y, batch, channels, bytes / 2, groups, s);
  }
  const int64_t pixels = batch * spatial;
  if (size == 8) return launch<uint64_t>(x, y, pixels, channels, 1, groups, s);
  if (size == 4) return launch<uint32_t>(x, y, pixels, channels, 1, groups, s);
  return launch<uint16_t>(x, y, pixels, channels, 1, groups, s);
}

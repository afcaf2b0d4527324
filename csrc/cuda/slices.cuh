// The second stage of a sum: slices that blocks have summed, added in their order.
#ifndef FF_CUDA_SLICES_CUH
#define FF_CUDA_SLICES_CUH

#include "common.cuh"

namespace ff {

constexpr int kSumThreads = 256;

template <class T>
__global__ void sum_slices_kernel(const float *__restrict__ partial, int slices, int64_t values, T *__restrict__ out) {
  const int64_t i = blockIdx.x * int64_t(kSumThreads) + threadIdx.x;
  if (i >= values) return;
  double total = 0;
  for (int slice = 0; slice < slices; ++slice) total += partial[slice * values + i];
  out[i] = from_float<T>(static_cast<float>(total));
}

// partial: (slices, values) -> out: (values,).
template <class T>
int sum_slices(const float *partial, int slices, int64_t values, T *out, cudaStream_t stream) {
  sum_slices_kernel<T>
      <<<blocks_for(values, kSumThreads, INT32_MAX), kSumThreads, 0, stream>>>(partial, slices, values, out);
  return cudaGetLastError();
}

}  // namespace ff

#endif

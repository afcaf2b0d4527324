// The second stage of a sum: slices that blocks have summed, added in their order.
#ifndef FF_CUDA_SLICES_CUH
#define FF_CUDA_SLICES_CUH

#include "common.cuh"

namespace ff {

constexpr int kSumLanes = 32, kSumRows = 8;

// Every row of a block adds every kSumRows-th slice.
template <class T>
__global__ void __launch_bounds__(kSumLanes *kSumRows)
    sum_slices_kernel(const float *__restrict__ partial, int slices, int64_t values, T *__restrict__ out) {
  __shared__ double rows[kSumRows][kSumLanes];
  const int64_t i = blockIdx.x * int64_t(kSumLanes) + threadIdx.x;
  double total = 0;
  if (i < values)
    for (int slice = threadIdx.y; slice < slices; slice += kSumRows) total += partial[slice * values + i];
  rows[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || i >= values) return;
  for (int row = 1; row < kSumRows; ++row) total += rows[row][threadIdx.x];
  out[i] = from_float<T>(static_cast<float>(total));
}

// partial: (slices, values) -> out: (values,).
template <class T>
int sum_slices(const float *partial, int slices, int64_t values, T *out, cudaStream_t stream) {
  sum_slices_kernel<T><<<blocks_for(values, kSumLanes, INT32_MAX), dim3(kSumLanes, kSumRows), 0, stream>>>(
      partial, slices, values, out);
  return cudaGetLastError();
}

}  // namespace ff

#endif

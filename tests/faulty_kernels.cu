// Kernels with one fault each, and correct ones beside them, for test_cuda_emulation.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common.cuh"
#include "mma.cuh"

namespace {

enum Fault { none, first, second, third, fourth };

// out[b] = sum of 64 values of block b, by a tree in shared memory.
template <int kFault>
__global__ void tree_sum(const float *__restrict__ in, float *__restrict__ out) {
  __shared__ float partial[64];
  const int t = threadIdx.x;
  partial[t] = in[blockIdx.x * 64 + t];
  if (kFault != first) __syncthreads();
  for (int n = 32; n > 0; n /= 2) {
    if (t < n) partial[t] += partial[t + n];
    if (kFault != second) __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = partial[0];
}

// The same by shuffles, then through shared memory inside one warp.
template <int kFault>
__global__ void warp_sum(const float *__restrict__ in, float *__restrict__ out) {
  __shared__ float halves[2];
  __shared__ float sums[1];
  float v = in[blockIdx.x * 64 + threadIdx.x];
  for (int n = 16; n > 0; n /= 2) v += __shfl_xor_sync(0xffffffffu, v, n);
  if (threadIdx.x % 32 == 0) halves[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 3) sums[0] = halves[0] + halves[1];
    if (kFault != first) __syncwarp();
    if (threadIdx.x == 5) out[blockIdx.x] = sums[0];
  }
}

__global__ void race_of_blocks(float *out) { out[threadIdx.x] = float(blockIdx.x); }

template <int kFault>
__global__ void count_positive(const float *in, int *out) {
  if (kFault == first && threadIdx.x == 7) *out = 0;
  if (in[blockIdx.x * 64 + threadIdx.x] > 0) atomicAdd(out, 1);
}

template <int kFault>
__global__ void divergent_barrier(float *out) {
  if (kFault == first && threadIdx.x >= 16) return;
  if (kFault == second && threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

template <int kFault>
__global__ void partial_warp(float *out) {
  float v = float(threadIdx.x);
  if (kFault == first) {
    if (threadIdx.x < 16) v = __shfl_down_sync(0xffffffffu, v, 1);
  } else {
    if (threadIdx.x < 16) v = __shfl_down_sync(0xffffu, v, kFault == second ? 8 : 1, kFault == second ? 32 : 16);
  }
  out[threadIdx.x] = v;
}

template <int kFault>
__global__ void shared_bounds(float *out, int n) {
  __shared__ float tile[4][33];
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x] = 1;
  tile[threadIdx.x % 4][kFault == first ? n : threadIdx.x / 4] = 2;
  __syncthreads();
  out[threadIdx.x] = dynamic[threadIdx.x + (kFault == second ? n : 0)] + tile[threadIdx.x % 4][threadIdx.x / 4];
}

__global__ void unwritten_shared(float *out) {
  __shared__ float tile[65];
  tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void vector_load(const float *in, float *out, int offset) {
  const float4 v = *reinterpret_cast<const float4 *>(in + 4 * threadIdx.x + offset);
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void copy(const float *in, float *out, int offset) { out[threadIdx.x] = in[int(threadIdx.x) + offset]; }

__global__ void big_static(float *out) {
  __shared__ float tile[13000];
  tile[threadIdx.x] = 1;
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void round_trip(const float *in, float *as_half, float *as_bfloat16, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    as_half[i] = __half2float(__float2half_rn(in[i]));
    as_bfloat16[i] = __bfloat162float(__float2bfloat16_rn(in[i]));
  }
}

// out (64, 32) = a b; in is a (64, 32), then b (32, 32). Done twice, so that the tiles are written again. A and B say
// how the tiles lie in shared memory.
template <int kFault, class T, ff::Lies A, ff::Lies B>
__global__ void product(const float *__restrict__ in, float *__restrict__ out) {
  constexpr int kDepth = 32, kPitch = kDepth + 8, kPitchA = A == ff::Lies::kAcross ? kPitch : 64 + 8;
  __shared__ alignas(16) T a[64 * kPitch + 8];
  __shared__ alignas(16) T b[32 * kPitch];
  const int warp = threadIdx.x / 32;
  ff::WarpProduct<T> result;
  for (int repeat = 0; repeat < 2; ++repeat) {
    if (kFault != second) __syncthreads();
    for (int i = threadIdx.x; i < 64 * kDepth; i += 64) {
      const int row = i / kDepth, d = i % kDepth;
      a[A == ff::Lies::kAcross ? row * kPitch + d : d * kPitchA + row] = ff::from_float<T>(in[i]);
    }
    for (int i = threadIdx.x; i < kDepth * 32; i += 64) {
      const int d = i / 32, column = i % 32;
      b[B == ff::Lies::kAcross ? column * kPitch + d : d * kPitch + column] = ff::from_float<T>(in[64 * kDepth + i]);
    }
    if (kFault != first) __syncthreads();
    if (kFault == third && threadIdx.x == 37) return;
    const T *begin = a + warp * 32 * (A == ff::Lies::kAcross ? kPitch : 1) + (kFault == fourth ? 4 : 0);
    result.template add<A, B>(begin, kPitchA, b, kPitch, kDepth);
  }
  result.each([&](int row, int column, float2 two) {
    out[(warp * 32 + row) * 32 + column] = two.x / 2;
    out[(warp * 32 + row) * 32 + column + 1] = two.y / 2;
  });
}

// A warp reads rows that its own lanes wrote, without __syncwarp.
template <int kFault>
__global__ void rows_of_a_warp(const float *__restrict__ in, float *__restrict__ out) {
  __shared__ alignas(16) __half rows[32][8];
  for (int c = 0; c < 8; ++c) rows[threadIdx.x ^ 1][c] = __float2half_rn(in[c]);
  if (kFault != first) __syncwarp();
  uint32_t matrices[4];
  ff::ptx::load_matrices<false>(matrices, rows[threadIdx.x]);
  out[threadIdx.x] = __half2float(reinterpret_cast<const __half *>(matrices)[0]);
}

// A warp of 16 lanes, and one that takes tensors in global memory for shared ones.
template <int kFault>
__global__ void wrong_rows(const float *__restrict__ in, float *__restrict__ out) {
  __shared__ alignas(16) __half rows[32][8];
  for (int c = 0; c < 8; ++c) rows[threadIdx.x][c] = __float2half_rn(1);
  uint32_t matrices[4];
  ff::ptx::load_matrices<false>(matrices, kFault == first ? reinterpret_cast<const __half *>(in) : rows[threadIdx.x]);
  out[threadIdx.x] = __half2float(reinterpret_cast<const __half *>(matrices)[0]);
}

}  // namespace

#define ENTRY(name, ...)                                                                           \
  extern "C" __attribute__((visibility("default"))) int name(const float *in, float *out, int n) { \
    __VA_ARGS__;                                                                                   \
    return cudaGetLastError();                                                                     \
  }

ENTRY(tree_sum_right, tree_sum<none><<<5, 64>>>(in, out))
ENTRY(tree_sum_no_barrier_after_load, tree_sum<first><<<5, 64>>>(in, out))
ENTRY(tree_sum_no_barrier_in_loop, tree_sum<second><<<5, 64>>>(in, out))
ENTRY(warp_sum_right, warp_sum<none><<<5, 64>>>(in, out))
ENTRY(warp_sum_no_syncwarp, warp_sum<first><<<5, 64>>>(in, out))
ENTRY(blocks_write_the_same, race_of_blocks<<<2, 64>>>(out))
ENTRY(atomic_count_right, count_positive<none><<<5, 64>>>(in, reinterpret_cast<int *>(out)))
ENTRY(atomic_and_plain_write, count_positive<first><<<1, 64>>>(in, reinterpret_cast<int *>(out)))
ENTRY(barrier_right, divergent_barrier<none><<<1, 64>>>(out))
ENTRY(barrier_after_exit, divergent_barrier<first><<<1, 64>>>(out))
ENTRY(barrier_in_two_branches, divergent_barrier<second><<<1, 64>>>(out))
ENTRY(shuffle_right, partial_warp<none><<<1, 64>>>(out))
ENTRY(shuffle_lanes_missing, partial_warp<first><<<1, 64>>>(out))
ENTRY(shuffle_reads_outside_mask, partial_warp<second><<<1, 64>>>(out))
ENTRY(shared_bounds_right, shared_bounds<none><<<1, 64, 64 * 4>>>(out, 0))
ENTRY(shared_row_overrun, shared_bounds<first><<<1, 64, 64 * 4>>>(out, 33))
ENTRY(shared_dynamic_overrun, shared_bounds<second><<<1, 64, 64 * 4>>>(out, 1))
ENTRY(shared_not_written, unwritten_shared<<<1, 64>>>(out))
ENTRY(vector_load_right, vector_load<<<1, 16>>>(in, out, 0))
ENTRY(vector_load_misaligned, vector_load<<<1, 16>>>(in, out, 1))
ENTRY(copy_with_offset, copy<<<1, 32>>>(in, out, n))
ENTRY(copy_from_null, copy<<<1, 32>>>(nullptr, out, 0))
ENTRY(too_many_threads, copy<<<1, 2048>>>(in, out, 0))
ENTRY(no_blocks, copy<<<0, 32>>>(in, out, 0))
ENTRY(too_much_dynamic_memory, shared_bounds<none><<<1, 64, 50000>>>(out, 0))
ENTRY(too_much_memory_together, shared_bounds<second><<<1, 64, 49000>>>(out, 0))
ENTRY(allowed_dynamic_memory,
      cudaFuncSetAttribute(shared_bounds<none>, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000);
      shared_bounds<none><<<1, 64, 50000>>>(out, 0))
ENTRY(too_much_static_memory, big_static<<<1, 64>>>(out))
ENTRY(rounding, round_trip<<<4, 128>>>(in, out, out + n, n))
ENTRY(product_half, product<none, __half, ff::Lies::kAcross, ff::Lies::kAcross><<<1, 64>>>(in, out))
ENTRY(product_bfloat16, product<none, __nv_bfloat16, ff::Lies::kAcross, ff::Lies::kAcross><<<1, 64>>>(in, out))
ENTRY(product_half_turned_b, product<none, __half, ff::Lies::kAcross, ff::Lies::kAlongDepth><<<1, 64>>>(in, out))
ENTRY(product_half_turned_both, product<none, __half, ff::Lies::kAlongDepth, ff::Lies::kAlongDepth><<<1, 64>>>(in, out))
ENTRY(product_no_barrier_after_load, product<first, __half, ff::Lies::kAcross, ff::Lies::kAcross><<<1, 64>>>(in, out))
ENTRY(product_no_barrier_before_load, product<second, __half, ff::Lies::kAcross, ff::Lies::kAcross><<<1, 64>>>(in, out))
ENTRY(product_lane_missing, product<third, __half, ff::Lies::kAcross, ff::Lies::kAcross><<<1, 64>>>(in, out))
ENTRY(product_misaligned, product<fourth, __half, ff::Lies::kAcross, ff::Lies::kAcross><<<1, 64>>>(in, out))
ENTRY(matrix_rows_right, rows_of_a_warp<none><<<1, 32>>>(in, out))
ENTRY(matrix_rows_no_syncwarp, rows_of_a_warp<first><<<1, 32>>>(in, out))
ENTRY(matrix_partial_warp, wrong_rows<none><<<1, 16>>>(in, out))
ENTRY(matrix_in_global_memory, wrong_rows<first><<<1, 32>>>(in, out))

extern "C" __attribute__((visibility("default"))) const char *error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

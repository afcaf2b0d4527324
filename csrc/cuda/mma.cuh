// A warp's part of a product of matrices in shared memory: in half precision on tensor cores, in float32 by FMAs.
#ifndef FF_CUDA_MMA_CUH
#define FF_CUDA_MMA_CUH

#include "ptx.cuh"

namespace ff {

constexpr int kWarpTile = 32;  // rows and columns of a warp's product
constexpr int kMmaDepth = 16;
// Elements between rows beyond a multiple of 16, 16 bytes: rows that are read together then lie in different banks.
template <class T>
constexpr int kMmaPadding = 16 / int(sizeof(T));

// How a factor lies in shared memory: its rows (the product's columns, for the right factor) one after the other, or
// the depth, which both factors share, one step after the other.
enum class Lies { kAcross, kAlongDepth };

// Element (16 i + g + 8 h, 8 j + t + e) of the product, g = lane / 4, t = 2 (lane % 4), is sum[i][j][2 h + e].
template <class T>
struct WarpProduct {
  float sum[kWarpTile / 16][kWarpTile / 8][4] = {};

  // a and b begin at the warp's first row and column; pitch: elements from one row or step of the depth to the next.
  template <Lies A, Lies B>
  __device__ __forceinline__ void add(const T *a, int a_pitch, const T *b, int b_pitch, int depth) {
    const int lane = threadIdx.x % 32, row = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll 1
    for (int k = 0; k < depth; k += kMmaDepth) {
      uint32_t left[kWarpTile / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpTile / 16; ++i) {
        const int m = 16 * i;
        if constexpr (A == Lies::kAcross)
          ptx::load_matrices<false>(left[i], a + (m + low + row) * a_pitch + k + high);
        else
          ptx::load_matrices<true>(left[i], a + (k + high + row) * a_pitch + m + low);
      }
#pragma unroll
      for (int j = 0; j < kWarpTile / 16; ++j) {
        const int n = 16 * j;
        uint32_t right[4];
        if constexpr (B == Lies::kAcross)
          ptx::load_matrices<false>(right, b + (n + high + row) * b_pitch + k + low);
        else
          ptx::load_matrices<true>(right, b + (k + low + row) * b_pitch + n + high);
#pragma unroll
        for (int i = 0; i < kWarpTile / 16; ++i) {
          ptx::multiply_add<T>(sum[i][2 * j], left[i], right[0], right[1]);
          ptx::multiply_add<T>(sum[i][2 * j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }

  // Calls store(row, column, two neighbours in the row) for what this lane holds.
  template <class F>
  __device__ __forceinline__ void each(F store) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWarpTile / 16; ++i)
#pragma unroll
      for (int j = 0; j < kWarpTile / 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          store(16 * i + lane / 4 + 8 * h, 8 * j + lane % 4 * 2, make_float2(sum[i][j][2 * h], sum[i][j][2 * h + 1]));
  }
};

// Element (g + 8 r, 16 h + 4 t + e) of the product, g = lane / 4, t = lane % 4, is sum[r][4 h + e]. Every call of add
// sums on its own before it adds to what was there: rounding grows with the square root of a sum's length.
template <>
struct WarpProduct<float> {
  float sum[kWarpTile / 8][8] = {};

  template <Lies A, Lies B>
  __device__ __forceinline__ void add(const float *a, int a_pitch, const float *b, int b_pitch, int depth) {
    constexpr int kRows = kWarpTile / 8, kStep = 4;
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 4;
    float own[kRows][8] = {};
#pragma unroll 1
    for (int k = 0; k < depth; k += kStep) {
      float left[kRows][kStep];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if constexpr (A == Lies::kAcross)
          load(left[r], a + (row + 8 * r) * a_pitch + k);
        else
          for (int step = 0; step < kStep; ++step) left[r][step] = a[(k + step) * a_pitch + row + 8 * r];
      }
      if constexpr (B == Lies::kAcross) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float right[kStep];
          load(right, b + (16 * (j / 4) + column + j % 4) * b_pitch + k);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int step = 0; step < kStep; ++step) own[r][j] += left[r][step] * right[step];
        }
      } else {
#pragma unroll
        for (int step = 0; step < kStep; ++step)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float right[4];
            load(right, b + (k + step) * b_pitch + 16 * h + column);
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
              for (int e = 0; e < 4; ++e) own[r][4 * h + e] += left[r][step] * right[e];
          }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[r][j] += own[r][j];
  }

  template <class F>
  __device__ __forceinline__ void each(F store) const {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 4;
#pragma unroll
    for (int r = 0; r < kWarpTile / 8; ++r)
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        store(row + 8 * r, 16 * (j / 4) + column + j % 4, make_float2(sum[r][j], sum[r][j + 1]));
  }

 private:
  static __device__ __forceinline__ void load(float (&values)[4], const float *from) {
    const float4 four = *reinterpret_cast<const float4 *>(from);
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  }
};

}  // namespace ff

#endif

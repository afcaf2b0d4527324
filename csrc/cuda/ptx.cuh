// The tensor cores' instructions, for which CUDA C++ has no functions. The emulation puts a file of its own in the
// place of this one. All 32 lanes of a warp call them together; they need compute capability 8.0.
#ifndef FF_CUDA_PTX_CUH
#define FF_CUDA_PTX_CUH

#include <type_traits>

#include "common.cuh"

namespace ff::ptx {

// A kernel returns at once where this is false.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAvailable = false;
#else
constexpr bool kAvailable = true;
#endif

// Four 8x8 matrices of 16-bit numbers in shared memory. Lane 8 i + r gives the address, a multiple of 16, of row r of
// matrix i. out[i] of lane l is elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 or, Transposed, of column l / 4.
template <bool Transposed, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const T *row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// sum += a b for a (16, 16), b (16, 8). With g = lane / 4 and t = 2 (lane % 4), a lane has
//   a[0..3]: two neighbours (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8) in a row,
//   b0, b1:  two neighbours (t, g), (t + 8, g) in a column,
//   sum:     (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1).
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace ff::ptx

#endif

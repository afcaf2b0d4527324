// What the kernels share: number types, whose arithmetic is in float32, and launch arithmetic.
#ifndef FF_CUDA_COMMON_CUH
#define FF_CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ff_api.h"

namespace ff {

__host__ __device__ __forceinline__ float to_float(float v) { return v; }
__host__ __device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__host__ __device__ __forceinline__ float to_float(uint8_t v) { return static_cast<float>(v); }

template <class T>
__host__ __device__ __forceinline__ T from_float(float v);
template <>
__host__ __device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__host__ __device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Calls function(T{}) with the type of a dtype code; no kernel takes float64.
template <class F>
int dispatch(int dtype, F function) {
  switch (dtype) {
    case FF_FLOAT32:
      return function(float{});
    case FF_FLOAT16:
      return function(__half{});
    case FF_BFLOAT16:
      return function(__nv_bfloat16{});
  }
  return FF_UNSUPPORTED_DTYPE;
}

// The numbers of a tensor whose dtype, one that dispatch knows, is a value and not a type. No tensor: `absent`.
struct Numbers {
  const void *data;
  int dtype;

  __device__ __forceinline__ float at(int i, float absent = 0) const {
    if (data == nullptr) return absent;
    switch (dtype) {
      case FF_FLOAT16:
        return to_float(static_cast<const __half *>(data)[i]);
      case FF_BFLOAT16:
        return to_float(static_cast<const __nv_bfloat16 *>(data)[i]);
    }
    return static_cast<const float *>(data)[i];
  }
};

inline bool known(int dtype) { return dtype == FF_FLOAT32 || dtype == FF_FLOAT16 || dtype == FF_BFLOAT16; }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned blocks_for(int64_t items, int64_t per_block, int64_t most) {
  const int64_t wanted = ceil_div(items, per_block);
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

}  // namespace ff

#endif

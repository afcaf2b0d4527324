// Device queries: whether a driver and a device are there, and what an error code means.
#include <cuda_runtime.h>

#include "ff_api.h"

extern "C" int ff_cuda_device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : -static_cast<int>(error);
}

extern "C" const char *ff_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

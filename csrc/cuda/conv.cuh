// One pass of a convolution, and the passes that are products of matrices.
#ifndef FF_CUDA_CONV_CUH
#define FF_CUDA_CONV_CUH

#include "channels.cuh"

namespace ff {

// From (batch, height, width, channels) to (batch, out_height, out_width, out_channels).
struct Pass {
  int batch, channels, height, width, out_channels, out_height, out_width;
  int kernel, stride, padding, groups;
  int up;           // the input is spread: only every up-th row and column of what the kernel sees holds values
  bool transposed;  // weights are (channels, out_channels / groups, k, k), to be turned around

  __host__ __device__ int taps() const { return kernel * kernel; }
  __host__ __device__ int group_in() const { return channels / groups; }
  __host__ __device__ int group_out() const { return out_channels / groups; }
  __host__ __device__ int64_t pixels() const { return int64_t(batch) * out_height * out_width; }
};

// conv_product.cu: whether a pass on tensors of so many bytes a value runs there, and what conv.cu does otherwise.
bool as_product(const Pass &p, int bytes);
template <class T>
int product_conv(const Pass &p, const T *x, Norm in_norm, const T *weight, const T *bias, Norm out_norm, const T *gate,
                 Norm gate_norm, T *z, cudaStream_t stream);
// p is the forward pass; partial: (slices, out_channels, channels, k, k).
int product_weight_slices(const Pass &p);
template <class T>
int product_weight_gradient(const Pass &p, const T *grad, const T *x, Norm in_norm, float *partial,
                            cudaStream_t stream);

}  // namespace ff

#endif

// From an 8-bit image to the network's input. A thread computes the three channels of one output pixel; neighbouring
// threads read neighbouring pixels, and write neighbouring elements of each plane.
#include "common.cuh"
#include "resize.cuh"

namespace {

constexpr int kWidth = 32, kHeight = 8;

struct Image {
  int64_t batch_stride, row_stride, pixel_stride, channel_stride;  // in elements
  int height, width;
};

struct Canvas {
  int height, width, resized_height, resized_width, top, left;
};

// image: (batch, height, width, 3) -> out: (batch, 3, canvas.height, canvas.width).
template <class In, class Out, bool kResize>
__global__ void __launch_bounds__(kWidth *kHeight)
    preprocess_kernel(const In *__restrict__ image, Image shape, Out *__restrict__ out, Canvas canvas, bool flip,
                      float3 mean) {
  const int x = blockIdx.x * kWidth + threadIdx.x, y = blockIdx.y * kHeight + threadIdx.y;
  if (x >= canvas.width || y >= canvas.height) return;
  const int row = y - canvas.top, column = x - canvas.left;
  float sum[3] = {0, 0, 0};
  if (row >= 0 && row < canvas.resized_height && column >= 0 && column < canvas.resized_width) {
    const In *source = image + blockIdx.z * shape.batch_stride;
    const auto at = [&](int i, int j, int c) {
      return ff::to_float(source[i * shape.row_stride + j * shape.pixel_stride + c * shape.channel_stride]);
    };
    if (kResize) {
      const ff::Taps rows(row, shape.height, canvas.resized_height), columns(column, shape.width, canvas.resized_width);
      for (int i = rows.first; i <= rows.last; ++i) {
        float line[3] = {0, 0, 0};
        for (int j = columns.first; j <= columns.last; ++j) {
          const float weight = columns.weight(j);
#pragma unroll
          for (int c = 0; c < 3; ++c) line[c] += weight * at(i, j, c);
        }
        const float weight = rows.weight(i);
#pragma unroll
        for (int c = 0; c < 3; ++c) sum[c] += weight * line[c];
      }
#pragma unroll
      for (int c = 0; c < 3; ++c) sum[c] /= rows.total * columns.total;
    } else {
#pragma unroll
      for (int c = 0; c < 3; ++c) sum[c] = at(row, column, c);
    }
    if (flip) {
      const float first = sum[0];
      sum[0] = sum[2];
      sum[2] = first;
    }
    sum[0] -= mean.x;
    sum[1] -= mean.y;
    sum[2] -= mean.z;
  }
  const int64_t plane = int64_t(canvas.height) * canvas.width;
  Out *target = out + 3 * plane * blockIdx.z + int64_t(y) * canvas.width + x;
#pragma unroll
  for (int c = 0; c < 3; ++c) target[c * plane] = ff::from_float<Out>(sum[c]);
}

}  // namespace

extern "C" int ff_cuda_preprocess(const void *image, int64_t batch_stride, int64_t row_stride, int64_t pixel_stride,
                                  int64_t channel_stride, int64_t batch, int64_t height, int64_t width, void *out,
                                  int64_t resized_height, int64_t resized_width, int64_t canvas_height,
                                  int64_t canvas_width, int64_t top, int64_t left, int flip, double mean0, double mean1,
                                  double mean2, int in_dtype, int out_dtype, void *stream) {
  constexpr int64_t kLargest = int64_t(65535) * kHeight;
  if (in_dtype != -1 && in_dtype != FF_FLOAT32) return FF_UNSUPPORTED_DTYPE;
  if (batch > 65535 || canvas_height > kLargest || canvas_width > (1 << 30) || height > (1 << 30) || width > (1 << 30))
    return FF_BAD_ARGUMENT;
  if (batch == 0) return FF_OK;
  const Image shape{batch_stride,           row_stride, pixel_stride, channel_stride, static_cast<int>(height),
                    static_cast<int>(width)};
  const Canvas canvas{static_cast<int>(canvas_height), static_cast<int>(canvas_width), static_cast<int>(resized_height),
                      static_cast<int>(resized_width), static_cast<int>(top),          static_cast<int>(left)};
  const float3 mean = make_float3(static_cast<float>(mean0), static_cast<float>(mean1), static_cast<float>(mean2));
  const dim3 block(kWidth, kHeight);
  const dim3 grid(static_cast<unsigned>(ff::ceil_div(canvas_width, kWidth)),
                  static_cast<unsigned>(ff::ceil_div(canvas_height, kHeight)), static_cast<unsigned>(batch));
  const bool resize = height != resized_height || width != resized_width;
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  return ff::dispatch(out_dtype, [&](auto zero) -> int {
    using Out = decltype(zero);
    Out *target = static_cast<Out *>(out);
    const uint8_t *bytes = static_cast<const uint8_t *>(image);
    const float *floats = static_cast<const float *>(image);
    if (in_dtype == -1 && resize)
      preprocess_kernel<uint8_t, Out, true><<<grid, block, 0, s>>>(bytes, shape, target, canvas, flip != 0, mean);
    else if (in_dtype == -1)
      preprocess_kernel<uint8_t, Out, false><<<grid, block, 0, s>>>(bytes, shape, target, canvas, flip != 0, mean);
    else if (resize)
      preprocess_kernel<float, Out, true><<<grid, block, 0, s>>>(floats, shape, target, canvas, flip != 0, mean);
    else
      preprocess_kernel<float, Out, false><<<grid, block, 0, s>>>(floats, shape, target, canvas, flip != 0, mean);
    return cudaGetLastError();
  });
}

// Views of photographs: parts of them, resized, mirrored, each in its square of a batch of images. A thread computes
// the three channels of one output pixel.
#include "common.cuh"
#include "resize.cuh"

namespace {

constexpr int kWidth = 32, kHeight = 8;

// A row of `views`.
struct View {
  int64_t offset, width;                                    // of the photograph in `pixels`
  int64_t source_x, source_y, source_width, source_height;  // the part of it
  int64_t target_x, target_y, target_width, target_height;  // where it stands in the square, not yet mirrored
  int64_t mirror, antialias;
  int64_t image, left, top, side;  // the square
};

struct Colour {
  uint8_t red, green, blue;
};

// pixels: photographs (height, width, 3) one after the other; views: (count,) rows; out: (images, 3, size, size).
__global__ void __launch_bounds__(kWidth *kHeight)
    crop_resize_kernel(const uint8_t *__restrict__ pixels, const View *__restrict__ views, uint8_t *__restrict__ out,
                       int size, Colour fill) {
  const View &view = views[blockIdx.z];
  const int x = blockIdx.x * kWidth + threadIdx.x, y = blockIdx.y * kHeight + threadIdx.y;
  const int side = static_cast<int>(view.side);
  if (x >= side || y >= side) return;
  const int column = (view.mirror ? side - 1 - x : x) - static_cast<int>(view.target_x);
  const int row = y - static_cast<int>(view.target_y);
  const int width = static_cast<int>(view.target_width), height = static_cast<int>(view.target_height);
  uint8_t value[3] = {fill.red, fill.green, fill.blue};
  if (row >= 0 && row < height && column >= 0 && column < width) {
    const ff::Taps rows(row, static_cast<int>(view.source_height), height, view.antialias != 0);
    const ff::Taps columns(column, static_cast<int>(view.source_width), width, view.antialias != 0);
    const uint8_t *source = pixels + view.offset + 3 * (view.source_y * view.width + view.source_x);
    float sum[3] = {0, 0, 0};
    for (int i = rows.first; i <= rows.last; ++i) {
      float line[3] = {0, 0, 0};
      for (int j = columns.first; j <= columns.last; ++j) {
        const float weight = columns.weight(j);
#pragma unroll
        for (int c = 0; c < 3; ++c) line[c] += weight * ff::to_float(source[3 * (i * view.width + j) + c]);
      }
      const float weight = rows.weight(i);
#pragma unroll
      for (int c = 0; c < 3; ++c) sum[c] += weight * line[c];
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) value[c] = static_cast<uint8_t>(rintf(sum[c] / (rows.total * columns.total)));
  }
  const int64_t plane = int64_t(size) * size;
  uint8_t *target = out + 3 * plane * view.image + (view.top + y) * size + view.left + x;
#pragma unroll
  for (int c = 0; c < 3; ++c) target[c * plane] = value[c];
}

}  // namespace

extern "C" int ff_cuda_crop_resize(const void *pixels, const int64_t *views, int64_t count, int64_t largest_side,
                                   void *out, int64_t size, int fill0, int fill1, int fill2, void *stream) {
  if (count > 65535 || largest_side > int64_t(65535) * kHeight || size > (1 << 30)) return FF_BAD_ARGUMENT;
  if (count == 0 || largest_side == 0) return FF_OK;
  const dim3 block(kWidth, kHeight);
  const dim3 grid(static_cast<unsigned>(ff::ceil_div(largest_side, kWidth)),
                  static_cast<unsigned>(ff::ceil_div(largest_side, kHeight)), static_cast<unsigned>(count));
  const Colour fill{static_cast<uint8_t>(fill0), static_cast<uint8_t>(fill1), static_cast<uint8_t>(fill2)};
  crop_resize_kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint8_t *>(pixels), reinterpret_cast<const View *>(views), static_cast<uint8_t *>(out),
      static_cast<int>(size), fill);
  return cudaGetLastError();
}

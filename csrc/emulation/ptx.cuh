// The tensor cores' instructions on the CPU, in the place of csrc/cuda/ptx.cuh: the same functions with the same layout
// of elements in lanes. They bring the lanes together but order no accesses, as on a device.
#ifndef FF_CUDA_PTX_CUH
#define FF_CUDA_PTX_CUH

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulation {

struct Matrices {
  uint16_t row[8];
  uint32_t result[4];

  template <bool Transposed>
  static void complete(void **payloads, unsigned mask) {
    if (mask != 0xffffffffu) fail("ldmatrix has %d lanes, not 32", __builtin_popcount(mask));
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const auto element = [&](int row, int column) -> uint32_t {
          return static_cast<Matrices *>(payloads[8 * i + row])->row[column];
        };
        const int line = lane / 4, first = lane % 4 * 2;
        static_cast<Matrices *>(payloads[lane])->result[i] =
            Transposed ? element(first, line) | element(first + 1, line) << 16
                       : element(line, first) | element(line, first + 1) << 16;
      }
  }
};

// The sum of numbers of one product as tensor cores form it: each is cut to the 24 bits from the leading one of the
// largest (Fasi, Higham, Mikaitis and Pranesh 2021), and the sum is cut to float32.
inline float cut_sum(const double *addends, int count) {
  double largest = 0, total = 0;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(addends[i])) {
      for (int j = 0; j < count; ++j) total += addends[j];
      return float(total);
    }
    largest = std::max(largest, std::fabs(addends[i]));
  }
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(largest) - 23, -149));
  for (int i = 0; i < count; ++i) total += std::trunc(addends[i] / unit);
  const float rounded = float(total * unit);
  return std::fabs(double(rounded)) > std::fabs(total * unit) ? std::nextafter(rounded, 0.0f) : rounded;
}

struct Multiplication {
  const uint32_t *a;
  uint32_t b[2];
  float *sum;

  template <float (*ToFloat)(uint16_t)>
  static void complete(void **payloads, unsigned mask) {
    if (mask != 0xffffffffu) fail("mma has %d lanes, not 32", __builtin_popcount(mask));
    double a[16][16], b[16][8];
    const auto half = [](uint32_t pair, int e) { return double(ToFloat(uint16_t(pair >> 16 * e))); };
    for (int lane = 0; lane < 32; ++lane) {
      const auto &mine = *static_cast<Multiplication *>(payloads[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 8 + e] = half(mine.a[i], e);
        for (int i = 0; i < 2; ++i) b[t + i * 8 + e][g] = half(mine.b[i], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float *sum = static_cast<Multiplication *>(payloads[lane])->sum;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double addends[17] = {sum[i]};
        for (int k = 0; k < 16; ++k) addends[k + 1] = a[row][k] * b[k][column];
        sum[i] = cut_sum(addends, 17);
      }
    }
  }
};

}  // namespace emulation

namespace ff::ptx {

constexpr bool kAvailable = true;

inline float half_value(uint16_t bits) { return __half2float(__half{bits}); }
inline float bfloat16_value(uint16_t bits) { return __bfloat162float(__nv_bfloat16{bits}); }

template <bool Transposed, class T>
__attribute__((noinline, no_sanitize("thread"))) void load_matrices(uint32_t (&out)[4], const T *row,
                                                                    const char *file = __builtin_FILE(),
                                                                    int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2);
  emulation::touch_shared(row, 16, __builtin_return_address(0));
  emulation::Matrices mine;
  std::memcpy(mine.row, row, 16);
  emulation::meet({"ldmatrix", file, line}, 0xffffffffu, &mine, emulation::Matrices::complete<Transposed>, false);
  std::memcpy(out, mine.result, sizeof(out));
}

template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  constexpr bool half = std::is_same_v<T, __half>;
  static_assert(half || std::is_same_v<T, __nv_bfloat16>);
  emulation::Multiplication mine{a, {b0, b1}, sum};
  emulation::meet({"mma", file, line}, 0xffffffffu, &mine,
                  emulation::Multiplication::complete < half ? half_value : bfloat16_value >, false);
}

}  // namespace ff::ptx

#endif

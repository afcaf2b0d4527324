// Small matrix products on strided operands, the inner loop of every convolution.
//
//   C[m][n] (+)= sum over s < segments, k < length of A_s[m * a_row + k * a_step] * B_s[k * b_step + n]
//
// A_s = a[s] + a_offset, B_s = b + s * b_segment. Rows of an image are segments, which makes a convolution a product
// without a copy: the kw * C values under one row of a filter are contiguous in NHWC. B is read in whole vectors, up to
// one vector past n; C is written exactly.
#pragma once
#include <cstdint>

#include "simd.h"

namespace ff {

template <class T>
struct Product {
  int64_t segments = 1, length = 0;
  const T *const *a = nullptr;
  int64_t a_offset = 0, a_row = 0, a_step = 1;
  const T *b = nullptr;
  int64_t b_segment = 0, b_step = 0;
  T *c = nullptr;
  int64_t c_row = 0;
  const T *initial = nullptr;  // per n, or nullptr for zero
  bool accumulate = false;     // start from C itself
};

// Vectors of AVX-512 leave room for 8 rows x 2 vectors of sums in 32 registers; 16 registers for 6 x 2 or 4 x 2.
constexpr int kProductRows = FF_VECTOR_BYTES == 64 ? 8 : FF_VECTOR_BYTES == 32 ? 6 : 4;

template <class T, int Rows, int Vectors>
FF_INLINE void product_tile(const Product<T> &p, int64_t m, int64_t n, int last) {
  constexpr int kLanes = Vec<T>::kLanes;
  Vec<T> sum[Rows][Vectors];
  T *c = p.c + m * p.c_row + n;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const bool partial = j == Vectors - 1 && last < kLanes;
      if (p.accumulate)
        sum[i][j] = partial ? Vec<T>::load_first(c + i * p.c_row + j * kLanes, last)
                            : Vec<T>::load(c + i * p.c_row + j * kLanes);
      else if (p.initial != nullptr)
        sum[i][j] =
            partial ? Vec<T>::load_first(p.initial + n + j * kLanes, last) : Vec<T>::load(p.initial + n + j * kLanes);
      else
        sum[i][j] = Vec<T>::zero();
    }
  for (int64_t s = 0; s < p.segments; ++s) {
    const T *a = p.a[s] + p.a_offset + m * p.a_row;
    const T *b = p.b + s * p.b_segment + n;
    for (int64_t k = 0; k < p.length; ++k, a += p.a_step, b += p.b_step) {
      Vec<T> column[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) column[j] = Vec<T>::load(b + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const Vec<T> value(a[i * p.a_row]);
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[i][j] = sum[i][j] + value * column[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      T *out = c + i * p.c_row + j * kLanes;
      if (j == Vectors - 1 && last < kLanes)
        sum[i][j].store_first(out, last);
      else
        sum[i][j].store(out);
    }
}

// Not inlined: among the values of a caller, the offsets of the rows would not stay in registers.
template <class T, int Rows, int Vectors>
__attribute__((noinline)) void product_rows(const Product<T> &p, int64_t m, int64_t n, int64_t rows, int last) {
  if (rows == Rows)
    product_tile<T, Rows, Vectors>(p, m, n, last);
  else if constexpr (Rows > 1)
    product_rows<T, Rows - 1, Vectors>(p, m, n, rows, last);
}

template <class T, int Vectors>
inline void product_panel(const Product<T> &p, int64_t rows, int64_t n, int last) {
  for (int64_t m = 0; m < rows; m += kProductRows)
    product_rows<T, kProductRows, Vectors>(p, m, n, rows - m < kProductRows ? rows - m : kProductRows, last);
}

template <class T>
inline void multiply(const Product<T> &p, int64_t rows, int64_t columns) {
  constexpr int kLanes = Vec<T>::kLanes;
  for (int64_t n = 0; n < columns; n += 2 * kLanes) {
    const int64_t left = columns - n;
    if (left > kLanes)
      product_panel<T, 2>(p, rows, n, left >= 2 * kLanes ? kLanes : static_cast<int>(left - kLanes));
    else
      product_panel<T, 1>(p, rows, n, static_cast<int>(left));
  }
}

}  // namespace ff

// One small abstraction over GCC/Clang vector extensions. Every libffcpu_<isa> is compiled from the same sources with
// its own flags, and Vec<T> is as wide as those flags allow: 64 bytes with AVX-512, 32 with AVX2, else 16 (SSE2, NEON).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FF_VECTOR_BYTES 32
#else
#define FF_VECTOR_BYTES 16
#endif

#define FF_INLINE inline __attribute__((always_inline))

namespace ff {

template <class T>
struct NativeVector;
template <>
struct NativeVector<float> {
  typedef float Aligned __attribute__((vector_size(FF_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(FF_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct NativeVector<double> {
  typedef double Aligned __attribute__((vector_size(FF_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(FF_VECTOR_BYTES), aligned(8), may_alias));
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits of the first n of eight 32-bit lanes.
FF_INLINE __m256i mask_of_first(int n) {
  alignas(64) static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(kMask + 8 - n));
}
#endif

// FF_VECTOR_BYTES / sizeof(T) lanes of T, T = float or double. Loads and stores need no alignment. a * b + c contracts
// to one FMA where the instruction set has it.
template <class T>
struct Vec {
  static constexpr int kLanes = FF_VECTOR_BYTES / sizeof(T);
  using Native = typename NativeVector<T>::Aligned;
  using Unaligned = typename NativeVector<T>::Unaligned;

  Native v;

  FF_INLINE Vec() = default;
  FF_INLINE Vec(Native value) : v(value) {}
  FF_INLINE Vec(T value) : v(value - Native{}) {}

  static FF_INLINE Vec zero() { return Native{}; }
  static FF_INLINE Vec load(const T *p) { return Native(*reinterpret_cast<const Unaligned *>(p)); }
  FF_INLINE void store(T *p) const { *reinterpret_cast<Unaligned *>(p) = v; }

  // The first n < kLanes lanes only; lanes beyond are zero on load and memory beyond is untouched on store.
  static FF_INLINE Vec load_first(const T *p, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return Native(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
    if constexpr (sizeof(T) == 8) return Native(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return Native(_mm256_maskload_ps(p, mask_of_first(n)));
    if constexpr (sizeof(T) == 8) return Native(_mm256_maskload_pd(p, mask_of_first(2 * n)));
#endif
    Native value{};
    std::memcpy(&value, p, n * sizeof(T));
    return value;
  }
  FF_INLINE void store_first(T *p, int n) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
    if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return _mm256_maskstore_ps(p, mask_of_first(n), v);
    if constexpr (sizeof(T) == 8) return _mm256_maskstore_pd(p, mask_of_first(2 * n), v);
#endif
    std::memcpy(p, &v, n * sizeof(T));
  }

  friend FF_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FF_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FF_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FF_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  FF_INLINE Vec &operator+=(Vec b) { return v += b.v, *this; }
  FF_INLINE Vec &operator*=(Vec b) { return v *= b.v, *this; }

  // value < 0 ? negative : value, per lane; NaN stays NaN.
  static FF_INLINE Vec if_negative(Vec value, Vec negative) { return value.v < Native{} ? negative.v : value.v; }
  // The larger of two; NaN in `value` wins, as in torch.max_pool2d.
  static FF_INLINE Vec larger(Vec kept, Vec value) {
    return (~(value.v <= kept.v) & (kept.v == kept.v)) ? value.v : kept.v;
  }

  // The first n lanes, zero in the others.
  FF_INLINE Vec first(int n) const {
    Native kept{};
    for (int i = 0; i < kLanes; ++i) kept[i] = i < n ? v[i] : T(0);
    return kept;
  }

  FF_INLINE T sum() const {
    T total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
  }
};

// Which lanes of a vector in memory exist: all of them, or the first few. load(p, mask) and store(p, v, mask) let one
// generic lambda serve the body and the tail of a loop.
struct AllLanes {};
struct FirstLanes {
  int count;
};
template <class T>
FF_INLINE Vec<T> load(const T *p, AllLanes) {
  return Vec<T>::load(p);
}
template <class T>
FF_INLINE Vec<T> load(const T *p, FirstLanes mask) {
  return Vec<T>::load_first(p, mask.count);
}
template <class T>
FF_INLINE void store(T *p, Vec<T> value, AllLanes) {
  value.store(p);
}
template <class T>
FF_INLINE void store(T *p, Vec<T> value, FirstLanes mask) {
  value.store_first(p, mask.count);
}
template <class T>
FF_INLINE Vec<T> keep(Vec<T> value, AllLanes) {
  return value;
}
template <class T>
FF_INLINE Vec<T> keep(Vec<T> value, FirstLanes mask) {
  return value.first(mask.count);
}

// exp(x) to about one ulp in float, libm's in double.
FF_INLINE Vec<float> exp(Vec<float> x) {
  using F = Vec<float>::Native;
  typedef int32_t I __attribute__((vector_size(FF_VECTOR_BYTES)));
  const F zero{};
  // NaN passes both comparisons; beyond these bounds the result is 0 or infinity anyway.
  F value = x.v < zero - 150.0f ? zero - 150.0f : x.v;
  value = value > zero + 130.0f ? zero + 130.0f : value;
  const F magic = zero + 12582912.0f;
  const F rounded = (value * 1.44269504088896341f + magic) - magic;
  const F r = (value - rounded * 0.693359375f) + rounded * 2.12194440e-4f;
  F p = zero + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const F finite = rounded == rounded ? rounded : zero;
  const I n = __builtin_convertvector(finite, I);
  // Two factors, so that subnormal and infinite results come out right.
  const I half = n >> 1;
  const I low = (half + 127) << 23, high = (n - half + 127) << 23;
  return Vec<float>(p * (F)low * (F)high);
}
FF_INLINE Vec<double> exp(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < Vec<double>::kLanes; ++i) y.v[i] = std::exp(x.v[i]);
  return y;
}

}  // namespace ff

// Vector arithmetic that the engine needs beyond simd.h: FMA, activations, exp, transposes. All keep NaN.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace ff::engine {

using V = Vec<float>;
constexpr int L = V::kLanes;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

enum Activation { kNone = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3, kTwiceSigmoid = 4 };

// a * b + c, in one rounding where the instruction set has it.
FF_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a.v, b.v, c.v);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a.v, b.v, c.v);
#else
  return a * b + c;
#endif
}

// The larger of both; NaN where `value` is NaN.
FF_INLINE V max_keep(V other, V value) {
#if defined(__AVX512F__)
  return _mm512_max_ps(other.v, value.v);
#elif defined(__AVX2__)
  return _mm256_max_ps(other.v, value.v);
#else
  return other.v > value.v ? other.v : value.v;
#endif
}

FF_INLINE V min_keep(V other, V value) {
#if defined(__AVX512F__)
  return _mm512_min_ps(other.v, value.v);
#elif defined(__AVX2__)
  return _mm256_min_ps(other.v, value.v);
#else
  return other.v < value.v ? other.v : value.v;
#endif
}

// 1 / (1 + e^-x), to about 2 ulp.
FF_INLINE V sigmoid(V x) {
#if defined(__AVX2__)
  // e^-x = 2^n 2^f with f from -0.5 to 0.5 and a minimax polynomial for 2^f. A division takes as long as a product for
  // each lane: an estimate of the reciprocal and one step of Newton's method take four.
  const V bounded = min_keep(V(87.0f), max_keep(V(-87.0f), x)), scale(-1.44269504f), magic(12582912.0f);
  const V n = fma(bounded, scale, magic) - magic;
  const V f = fma(bounded, scale, -n.v);
  V p(1.3264724e-3f);
  p = fma(p, f, V(9.671513e-3f));
  p = fma(p, f, V(5.5507336e-2f));
  p = fma(p, f, V(2.4022242e-1f));
  p = fma(p, f, V(6.93147e-1f));
  p = fma(p, f, V(1.0f));
#if defined(__AVX512F__)
  const V denominator = V(1.0f) + V(_mm512_scalef_ps(p.v, n.v)), guess = _mm512_rcp14_ps(denominator.v);
#else
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  const V denominator = V(1.0f) + V(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), power)));
  const V guess = _mm256_rcp_ps(denominator.v);
#endif
  return guess * fma(-denominator.v, guess, V(2.0f));
#else
  return V(1.0f) / (V(1.0f) + exp(V::zero() - x));
#endif
}

// tanh(x) = sign(x) (1 - 2 / (e^(2|x|) + 1)); below 0.25 the odd Taylor polynomial, which does not cancel.
FF_INLINE V tanh(V x) {
  const V magnitude = V::if_negative(x, V::zero() - x);
  const V large = V(1.0f) - V(2.0f) / (exp(magnitude + magnitude) + V(1.0f));
  const V x2 = x * x;
  V p(62.0f / 2835.0f);
  p = fma(p, x2, V(-17.0f / 315.0f));
  p = fma(p, x2, V(2.0f / 15.0f));
  p = fma(p, x2, V(-1.0f / 3.0f));
  const V small = fma(p * x2, x, x);
  const V signed_large = x.v < V::zero().v ? (V::zero() - large).v : large.v;
  return magnitude.v < V(0.25f).v ? small.v : signed_large.v;
}

template <int Act>
FF_INLINE V activate(V x, V slope) {
  if constexpr (Act == kRelu) return max_keep(V::zero(), x);
  if constexpr (Act == kLeakyRelu) return max_keep(x * slope, x);  // slope <= 1
  if constexpr (Act == kSilu) return x * sigmoid(x);
  if constexpr (Act == kTwiceSigmoid) return V(2.0f) * sigmoid(x);
  return x;
}

// x += 0.1 tanh(x), x *= 1 + 0.1 i for i < steps.
FF_INLINE V enhanced(V x, int64_t steps) {
  for (int64_t i = 0; i < steps; ++i) {
    x = fma(V(0.1f), tanh(x), x);
    if (i > 0) x *= V(1.0f + 0.1f * float(i));
  }
  return x;
}

// Out of line: silu and sigmoid would fill the instruction cache if every tile held them.
__attribute__((noinline)) inline V activate_rare(V x, int act) {
  return act == kSilu ? activate<kSilu>(x, x) : act == kTwiceSigmoid ? activate<kTwiceSigmoid>(x, x) : x;
}

// Calls body with the activation as a function of one vector, so that the choice is made once per tile.
template <class Body>
FF_INLINE void with_activation(int act, V slope, const Body &body) {
  if (act == kLeakyRelu)
    body([&](V y) { return activate<kLeakyRelu>(y, slope); });
  else if (act == kRelu)
    body([](V y) { return activate<kRelu>(y, y); });
  else if (act == kNone)
    body([](V y) { return y; });
  else
    body([&](V y) { return activate_rare(y, act); });
}

// Lanes table[l] (int32_t by their bits) of two vectors side by side.
FF_INLINE V pick(const float *table, V low, V high) {
#if defined(__AVX512F__)
  return _mm512_permutex2var_ps(low.v, _mm512_loadu_si512(table), high.v);
#else
  V picked;
  for (int l = 0; l < L; ++l) {
    int32_t lane;
    std::memcpy(&lane, table + l, sizeof lane);
    picked.v[l] = lane < L ? low.v[lane] : high.v[lane - L];
  }
  return picked;
#endif
}

// out[j * out_stride + i] = in[i * in_stride + j] for i, j < L.
FF_INLINE void transpose(const float *in, int64_t in_stride, float *out, int64_t out_stride) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(out + i * out_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(out + (i + 4) * out_stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_ps(out + (i + 8) * out_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_ps(out + (i + 12) * out_stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
#elif defined(__AVX2__)
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#else
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

}  // namespace ff::engine

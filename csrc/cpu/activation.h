// Activations on vectors. `A` is an ff_activation; slope is that of the leaky ReLU below zero.
#pragma once
#include <type_traits>

#include "ff_api.h"
#include "simd.h"

namespace ff {

template <class T>
FF_INLINE Vec<T> sigmoid(Vec<T> v) {
  return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(Vec<T>::zero() - v));
}

template <int A, class T>
FF_INLINE Vec<T> activate(Vec<T> v, Vec<T> slope) {
  if constexpr (A == FF_RELU) return Vec<T>::if_negative(v, Vec<T>::zero());
  if constexpr (A == FF_LEAKY_RELU) return Vec<T>::if_negative(v, v * slope);
  if constexpr (A == FF_SILU) return v / (Vec<T>(T(1)) + exp(Vec<T>::zero() - v));
  return v;
}

// grad * activation'(v), with torch's choices at zero and NaN.
template <int A, class T>
FF_INLINE Vec<T> activate_backward(Vec<T> v, Vec<T> grad, Vec<T> slope) {
  using Native = typename Vec<T>::Native;
  if constexpr (A == FF_RELU) return v.v <= Native{} ? Native{} : grad.v;
  if constexpr (A == FF_LEAKY_RELU) return v.v > Native{} ? grad.v : (grad * slope).v;
  if constexpr (A == FF_SILU) {
    const Vec<T> one(T(1)), s = sigmoid(v);
    return grad * (s * (one + v * (one - s)));
  }
  return grad;
}

// Calls body(std::integral_constant<int, A>) for a run-time activation.
template <class Body>
FF_INLINE void with_activation(int activation, const Body &body) {
  switch (activation) {
    case FF_RELU:
      return body(std::integral_constant<int, FF_RELU>{});
    case FF_LEAKY_RELU:
      return body(std::integral_constant<int, FF_LEAKY_RELU>{});
    case FF_SILU:
      return body(std::integral_constant<int, FF_SILU>{});
    default:
      return body(std::integral_constant<int, FF_NONE>{});
  }
}

}  // namespace ff

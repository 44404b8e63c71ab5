// Activations of an expert and their derivatives, in loops that the compiler turns into vectors.

#pragma once

#include "gemm.hpp"

static inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // its last bits are x / log 2, rounded
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes, expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, 4);
  return p * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// Abramowitz and Stegun 7.1.26 to 1.5e-7, for x >= 0 as 1 - erf(x).
static inline float erfc_of_positive(float x, float exp_of_minus_square) {
  const float t = 1.0f / (1.0f + 0.3275911f * x);
  return t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)))) *
         exp_of_minus_square;
}

enum Activation { SILU, GELU, RELU, RELU2, CLAMPED_SWISH };

struct Value {
  float value, slope;
};

template <Activation KIND>
static inline Value activate(float x) {
  if constexpr (KIND == SILU) {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (KIND == GELU) {
    const float size = x < 0.0f ? -x : x;
    const float density = exp_of(-0.5f * x * x);
    const float tail = 0.5f * erfc_of_positive(size * 0.70710678118654752f, density);
    const float below = x < 0.0f ? tail : 1.0f - tail;
    return {x * below, below + x * density * 0.39894228040143268f};
  } else if constexpr (KIND == RELU) {
    return {x > 0.0f ? x : 0.0f, x > 0.0f ? 1.0f : 0.0f};
  } else if constexpr (KIND == RELU2) {
    const float positive = x > 0.0f ? x : 0.0f;
    return {positive * positive, 2.0f * positive};
  } else {
    const float clamped = x > 7.0f ? 7.0f : x;
    const float s = sigmoid(1.702f * clamped);
    return {clamped * s, x > 7.0f ? 0.0f : s * (1.0f + 1.702f * clamped * (1.0f - s))};
  }
}

// What a gated activation's gate is multiplied by.
template <Activation KIND>
static inline Value upper(float x) {
  if constexpr (KIND == CLAMPED_SWISH) {
    const float clamped = x > 7.0f ? 7.0f : x < -7.0f ? -7.0f : x;
    return {clamped + 1.0f, clamped == x ? 1.0f : 0.0f};
  } else {
    return {x, 1.0f};
  }
}

// a = activation(z) * scale, for columns [begin, end) of a row; `up` is null without a gate.
template <Activation KIND>
static inline void activate_row(const float* gate, const float* up, Index begin, Index end, float scale, float* a) {
  if (up != nullptr) {
    for (Index f = begin; f < end; f++)
      a[f] = activate<KIND>(gate[f]).value * upper<KIND>(up[f]).value * scale;
  } else {
    for (Index f = begin; f < end; f++) a[f] = activate<KIND>(gate[f]).value * scale;
  }
}

// From da, the gradient of the un-weighted activation: dz, a * scale, and the sum of da * a.
template <Activation KIND>
static inline float activate_row_backward(const float* gate, const float* up, const float* da, Index begin, Index end,
                                          float scale, float* d_gate, float* d_up, float* a) {
  float inner = 0.0f;
  if (up != nullptr) {
#pragma omp simd reduction(+ : inner)
    for (Index f = begin; f < end; f++) {
      const Value g = activate<KIND>(gate[f]), u = upper<KIND>(up[f]);
      const float product = g.value * u.value, grad = da[f];
      inner += grad * product;
      a[f] = product * scale;
      d_gate[f] = grad * scale * u.value * g.slope;
      d_up[f] = grad * scale * g.value * u.slope;
    }
  } else {
#pragma omp simd reduction(+ : inner)
    for (Index f = begin; f < end; f++) {
      const Value g = activate<KIND>(gate[f]);
      const float grad = da[f];
      inner += grad * g.value;
      a[f] = g.value * scale;
      d_gate[f] = grad * scale * g.slope;
    }
  }
  return inner;
}

template <class Function>
static inline auto with_activation(int kind, Function function) {
  switch (kind) {
    case SILU: return function.template operator()<SILU>();
    case GELU: return function.template operator()<GELU>();
    case RELU: return function.template operator()<RELU>();
    case RELU2: return function.template operator()<RELU2>();
    default: return function.template operator()<CLAMPED_SWISH>();
  }
}

// Activations of an expert and their derivatives, a vector at a time.

#pragma once

#include "simd.hpp"

static inline Vector exp_of(Vector x) {
  x = x < -87.0f ? fill(-87.0f) : x;
  x = x > 88.0f ? fill(88.0f) : x;
  const Vector shifted = x * 1.44269504088896341f + 12582912.0f;  // its last bits are x / log 2, rounded
  const Vector n = shifted - 12582912.0f;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes, expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * (Vector)exponent;
}

static inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp_of(-x)); }

// Abramowitz and Stegun 7.1.26 to 1.5e-7, for x >= 0 as 1 - erf(x).
static inline Vector erfc_of_positive(Vector x, Vector exp_of_minus_square) {
  const Vector t = 1.0f / (1.0f + 0.3275911f * x);
  return t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)))) *
         exp_of_minus_square;
}

enum Activation { SILU, GELU, RELU, RELU2, CLAMPED_SWISH };

struct Value {
  Vector value, slope;
};

template <Activation KIND>
static inline Value activate(Vector x) {
  const Vector zero = fill(0.0f), one = fill(1.0f);
  if constexpr (KIND == SILU) {
    const Vector s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (KIND == GELU) {
    const Vector size = x < 0.0f ? -x : x;
    const Vector density = exp_of(-0.5f * x * x);
    const Vector tail = 0.5f * erfc_of_positive(size * 0.70710678118654752f, density);
    const Vector below = x < 0.0f ? tail : 1.0f - tail;
    return {x * below, below + x * density * 0.39894228040143268f};
  } else if constexpr (KIND == RELU) {
    return {x > 0.0f ? x : zero, x > 0.0f ? one : zero};
  } else if constexpr (KIND == RELU2) {
    const Vector positive = x > 0.0f ? x : zero;
    return {positive * positive, 2.0f * positive};
  } else {
    const Vector clamped = x > 7.0f ? fill(7.0f) : x;
    const Vector s = sigmoid(1.702f * clamped);
    return {clamped * s, x > 7.0f ? zero : s * (1.0f + 1.702f * clamped * (1.0f - s))};
  }
}

// What a gated activation's gate is multiplied by.
template <Activation KIND>
static inline Value upper(Vector x) {
  if constexpr (KIND == CLAMPED_SWISH) {
    const Vector high = x > 7.0f ? fill(7.0f) : x;
    const Vector clamped = high < -7.0f ? fill(-7.0f) : high;
    return {clamped + 1.0f, clamped == x ? fill(1.0f) : fill(0.0f)};
  } else {
    return {x, fill(1.0f)};
  }
}

// Calls step(first, lanes) for vectors of the columns [begin, end).
template <class Step>
static inline void by_vectors(Index begin, Index end, Step step) {
  Index f = begin;
  for (; f + LANES <= end; f += LANES) step(f, LANES);
  if (f < end) step(f, int(end - f));
}

// a = activation(z) * scale, for columns [begin, end) of a row; `up` is null without a gate.
template <Activation KIND>
static inline void activate_row(const float* gate, const float* up, Index begin, Index end, float scale, float* a) {
  by_vectors(begin, end, [=](Index f, int lanes) {
    Vector value = activate<KIND>(load(gate + f, lanes)).value;
    if (up != nullptr) value *= upper<KIND>(load(up + f, lanes)).value;
    store(a + f, value * scale, lanes);
  });
}

// From da, the gradient of the un-weighted activation: dz, a * scale, and the sum of da * a.
template <Activation KIND>
static inline float activate_row_backward(const float* gate, const float* up, const float* da, Index begin, Index end,
                                          float scale, float* d_gate, float* d_up, float* a) {
  Vector inner = fill(0.0f);
  by_vectors(begin, end, [=, &inner](Index f, int lanes) {
    const Value g = activate<KIND>(load(gate + f, lanes));
    const Vector grad = load(da + f, lanes), scaled = grad * scale;
    if (up != nullptr) {
      const Value u = upper<KIND>(load(up + f, lanes));
      inner += grad * (g.value * u.value);
      store(a + f, g.value * u.value * scale, lanes);
      store(d_gate + f, scaled * u.value * g.slope, lanes);
      store(d_up + f, scaled * g.value * u.slope, lanes);
    } else {
      inner += grad * g.value;
      store(a + f, g.value * scale, lanes);
      store(d_gate + f, scaled * g.slope, lanes);
    }
  });
  return sum_of(inner);
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

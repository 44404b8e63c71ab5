// What both passes are given (`_Layer` of passes.py), and how work on it is shared out.

#pragma once

#include <algorithm>

#include "simd.hpp"

struct Layer {
  Index tokens, experts, width, hidden, expert_width, rows;  // rows: the most of a piece
  int32_t activation, gated, threads, has_z;
  const void *x, *w_in, *w_out, *b_in, *b_out;  // biases may be null
  const float* weight;
  const int32_t *token, *offsets;
  void* z;    // (N, hidden), or null
  float* out;  // (tokens, width), zero; forward only
  // Backward only; null for what is not needed.
  const void* grad;
  float* grad_x;  // (tokens, width), zero
  void *grad_w_in, *grad_w_out, *grad_b_in, *grad_b_out;
  float* grad_weight;
};

// Part `part` of `parts` of `count` things that stay together by `unit`.
inline Range share(Index count, Index unit, Index part, Index parts) {
  const Index units = (count + unit - 1) / unit;
  return {std::min(count, units * part / parts * unit), std::min(count, units * (part + 1) / parts * unit)};
}

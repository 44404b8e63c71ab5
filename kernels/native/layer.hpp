// What both passes are given (`_Layer` of passes.py), and how work on it is shared out.

#pragma once

#include <algorithm>
#include <vector>

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

// Rows of one expert that are worked on at once.
struct Piece {
  Index expert, first, count;
  Index of_expert;  // rows of all of its pieces
  bool again, last;  // not the first of its expert; the last of it
  Index turn;  // when it may add to the sums by token
  bool early;  // in backward, does so before it computes gradients of weights
};

inline std::vector<Piece> cut(const Layer& l) {
  std::vector<Piece> pieces;
  for (Index e = 0; e < l.experts; e++) {
    const Index begin = l.offsets[e], rows = l.offsets[e + 1] - begin;
    const Index parts = (rows + l.rows - 1) / l.rows;
    for (Index i = 0; i < parts; i++) {
      const Range own = share(rows, 1, i, parts);
      pieces.push_back({e, begin + own.begin, own.size(), rows, i > 0, i == parts - 1, Index(pieces.size()), false});
    }
  }
  return pieces;
}

// The threads that work on the same piece, and their temporaries.
//
// Each member does its own columns of a product (and rows, where there are fewer columns than members). Rows of tokens
// are read where they lie, and sums by token are added where they lie, one piece after the other: same input, same
// bits.

#pragma once

#include "activations.hpp"
#include "arena.hpp"
#include "gemm.hpp"
#include "schedule.hpp"
#include "waiting.hpp"

// A member's place in a grid over a matrix: as many columns of members as there are panels, the rest over the rows.
struct Place {
  Range rows, columns;
  Index column, of_columns;
  Place(Index row_count, Index column_count, Index member, Index members) {
    of_columns = std::max<Index>(1, std::min(members, (column_count + COLUMNS - 1) / COLUMNS));
    const Index of_rows = members / of_columns;
    column = member % of_columns;
    const Index row = member / of_columns;
    columns = share(column_count, COLUMNS, column, of_columns);
    rows = row < of_rows ? share(row_count, ROWS, row, of_rows) : Range{0, 0};
  }
};

template <class T>
class Crew {
 public:
  static constexpr bool WIDE = sizeof(T) == 4;

  Crew(const Layer& layer, Arena& arena, Index members, bool backward)
      : l(layer),
        members(members),
        a_row(layer.expert_width + PADDING),
        z_row(layer.hidden + PADDING),
        barrier(members) {
    const Index m = l.rows;
    a = arena.take(m * a_row);
    z = arena.take(m * z_row);
    if (backward) {
      da = arena.take(m * a_row);
      dz = arena.take(m * z_row);
      if (!WIDE && l.grad_w_in) w_in_wide = arena.take(l.hidden * l.width);
      if (!WIDE && l.grad_w_out) w_out_wide = arena.take(l.expert_width * l.width);
    }
    inner = arena.take(members * m);
    scratch = arena.take(members * Workspace::SIZE);
    x_rows.resize(m), grad_rows.resize(m);
    z_rows.resize(m), token_sums.resize(m);
    w_in_rows.resize(l.hidden), grad_w_in_rows.resize(l.hidden);
    w_out_rows.resize(l.width), grad_w_out_rows.resize(l.width);
    for (Index r = 0; r < m; r++) {
      a_rows.push_back(a + r * a_row);
      da_rows.push_back(da + r * a_row);
      dz_rows.push_back(dz + r * z_row);
    }
  }

  static Index floats(const Layer& l, Index members, bool backward) {
    Index total = 16 * 16 + members * (l.rows + Workspace::SIZE);
    total += l.rows * 2 * (l.expert_width + l.hidden + 2 * PADDING);
    if (backward && !WIDE) total += l.width * (l.hidden + l.expert_width);
    return Arena::aligned(total);
  }

  // Takes jobs until there are no more.
  void work(const std::vector<Job>& jobs, std::atomic<size_t>& next, Turn& turn, Index member, bool backward) {
    for (;;) {
      if (member == 0) job = next++;
      barrier.wait();
      if (job >= jobs.size()) return;
      const Job own = jobs[job];
      for (const Piece* next_piece = own.begin; next_piece < own.end; next_piece++) {
        start(next_piece, member, backward);
        backward ? backward_pass(turn, member) : forward_pass(turn, member);
      }
    }
  }

 private:
  static constexpr Index PADDING = 16;  // so that rows are no power of two apart, see panels.hpp

  const Layer& l;
  const Index members, a_row, z_row;
  Barrier barrier;
  size_t job;
  const Piece* piece;
  float *a, *z, *da = nullptr, *dz = nullptr, *inner, *scratch, *w_in_wide = nullptr, *w_out_wide = nullptr;
  std::vector<const T*> x_rows, grad_rows, w_in_rows, w_out_rows;
  std::vector<const float*> a_rows, dz_rows;
  std::vector<float*> z_rows, da_rows, token_sums, grad_w_in_rows, grad_w_out_rows;

  Workspace workspace(Index member) const {
    float* own = scratch + member * Workspace::SIZE;
    return {own, own + DEPTH * WIDTH};
  }
  const T* w_in() const { return static_cast<const T*>(l.w_in) + piece->expert * l.hidden * l.width; }
  const T* w_out() const { return static_cast<const T*>(l.w_out) + piece->expert * l.width * l.expert_width; }
  const T* b_out() const { return static_cast<const T*>(l.b_out) + piece->expert * l.width; }
  bool stores_z() const { return l.z != nullptr; }
  T* z_place(Index r) const { return static_cast<T*>(l.z) + (piece->first + r) * l.hidden; }
  Index token(Index r) const { return l.token[piece->first + r]; }
  float weight(Index r) const { return l.weight[piece->first + r]; }
  Place over_activation(Index member) const { return Place(piece->count, l.expert_width, member, members); }

  void forward_pass(Turn& turn, Index member) {
    pre_activation(member, true);
    barrier.wait();
    turn.wait_for(piece->turn);
    through_second(member);
    barrier.wait();
    if (member == 0) turn.pass();
  }

  void backward_pass(Turn& turn, Index member) {
    const bool last = piece->last;  // after the barrier, the first member may be at the next one
    if (!l.has_z) pre_activation(member, false);
    gradient_of_activation(member);
    barrier.wait();
    if (piece->early) gradient_of_x(turn, member);
    gradients_of_weights(member);
    if (!piece->early) gradient_of_x(turn, member);
    barrier.wait();
    if (!WIDE && last) {
      narrowed(w_in_wide, l.grad_w_in, l.hidden * l.width, member);
      narrowed(w_out_wide, l.grad_w_out, l.expert_width * l.width, member);
      barrier.wait();
    }
  }

  // Pointers to the rows of this piece.
  void start(const Piece* next, Index member, bool backward) {
    if (member == 0) {
      piece = next;
      for (Index r = 0; r < piece->count; r++) {
        x_rows[r] = static_cast<const T*>(l.x) + token(r) * l.width;
        if (backward) grad_rows[r] = static_cast<const T*>(l.grad) + token(r) * l.width;
        z_rows[r] = z + r * z_row;
        if constexpr (WIDE) z_rows[r] = stores_z() ? z_place(r) : z_rows[r];
        token_sums[r] = (backward ? l.grad_x : l.out) + token(r) * l.width;
      }
      for (Index h = 0; h < l.hidden; h++) w_in_rows[h] = w_in() + h * l.width;
      for (Index d = 0; d < l.width; d++) w_out_rows[d] = w_out() + d * l.expert_width;
      if (backward) {
        float* to = gradient(l.grad_w_in, w_in_wide, l.hidden * l.width);
        for (Index h = 0; h < l.hidden; h++) grad_w_in_rows[h] = to + h * l.width;
        to = gradient(l.grad_w_out, w_out_wide, l.expert_width * l.width);
        for (Index d = 0; d < l.width; d++) grad_w_out_rows[d] = to + d * l.expert_width;
      }
    }
    barrier.wait();
  }

  float* gradient(void* all, float* wide, Index size) const {
    return WIDE ? static_cast<float*>(all) + piece->expert * size : wide;
  }

  // z = x @ w_in^T + b_in, and the weighted activation of it.
  void pre_activation(Index member, bool activated) {
    const Place own = over_activation(member);
    const Columns columns{own.columns, 1 + l.gated, l.expert_width};
    times_transposed(ByRows<T>{x_rows.data()}, Transposed<T>{w_in(), l.width}, own.rows, l.width, columns, member,
                     false, z_rows.data(), [&](Range rows, Range columns) {
                       for (Index r = rows.begin; r < rows.end; r++)
                         for (int half = 0; half <= l.gated; half++) finish_z(r, columns + half * l.expert_width);
                       if (activated) activate(rows, columns);
                     });
  }

  // By the rows of an expert, not by those of a member: both passes give the same bits, however they are cut.
  template <class A, class Finished>
  void times_transposed(A a, Transposed<T> b, Range rows, Index depth, Columns columns, Index member, bool add,
                        float* const* c, Finished finished) {
    if (piece->of_expert <= FEW && FEW * depth <= DEPTH * WIDTH)
      multiply_few(a, b, rows, depth, columns, workspace(member), add, c, finished);
    else
      multiply(a, b, rows, depth, columns, workspace(member), add, c, finished);
  }

  void finish_z(Index r, Range columns) {
    float* here = z_rows[r];
    if (l.b_in != nullptr) {
      const T* bias = static_cast<const T*>(l.b_in) + piece->expert * l.hidden;
      for (Index h = columns.begin; h < columns.end; h++) here[h] += widen(bias[h]);
    }
    if constexpr (!WIDE) {
      for (Index h = columns.begin; h < columns.end; h++) {  // as it is kept
        T kept;
        narrow(here[h], kept);
        here[h] = widen(kept);
        if (stores_z()) z_place(r)[h] = kept;
      }
    }
  }

  void activate(Range rows, Range columns) {
    with_activation(l.activation, [&]<Activation KIND>() {
      for (Index r = rows.begin; r < rows.end; r++) {
        const float* gate = z_rows[r];
        activate_row<KIND>(gate, l.gated ? gate + l.expert_width : nullptr, columns.begin, columns.end, weight(r),
                           a + r * a_row);
      }
    });
  }

  // out[token] += a @ w_out^T + weight * b_out.
  void through_second(Index member) {
    const Range columns = share(l.width, COLUMNS, member, members);
    times_transposed(ByRows<float>{a_rows.data()}, Transposed<T>{w_out(), l.expert_width}, Range{0, piece->count},
                     l.expert_width, Columns{columns}, member, true, token_sums.data(), nothing);
    if (l.b_out == nullptr) return;
    const T* bias = b_out();
    for (Index r = 0; r < piece->count; r++) {
      float* to = token_sums[r];
      for (Index d = columns.begin; d < columns.end; d++) to[d] += weight(r) * widen(bias[d]);
    }
  }

  // da = grad @ w_out; from it and z: dz, the weighted activation, and the gradient of the combine weight.
  void gradient_of_activation(Index member) {
    const Place own = over_activation(member);
    multiply(ByRows<T>{grad_rows.data()}, Straight<T>{w_out_rows.data()}, own.rows, l.width, Columns{own.columns},
             workspace(member), false, da_rows.data(), [&](Range rows, Range columns) {
               with_activation(l.activation, [&]<Activation KIND>() {
                 for (Index r = rows.begin; r < rows.end; r++) {
                   if constexpr (!WIDE)
                     if (l.has_z) widen_z(r, columns);
                   const float* gate = z_rows[r];
                   float* d_gate = dz + r * z_row;
                   const float sum = activate_row_backward<KIND>(
                       gate, l.gated ? gate + l.expert_width : nullptr, da + r * a_row, columns.begin, columns.end,
                       weight(r), d_gate, d_gate + l.expert_width, a + r * a_row);
                   float& all = inner[own.column * l.rows + r];
                   all = columns.begin == own.columns.begin ? sum : all + sum;
                 }
               });
             });
  }

  // What is kept of z, where it is computed again: both give the same bits.
  void widen_z(Index r, Range columns) {
    for (int half = 0; half <= l.gated; half++)
      for (Index f = columns.begin; f < columns.end; f++) {
        const Index h = f + half * l.expert_width;
        z_rows[r][h] = widen(z_place(r)[h]);
      }
  }

  void gradients_of_weights(Index member) {
    if (l.grad_weight != nullptr) gradients_of_combine_weights(member);
    if (l.grad_w_out != nullptr) {
      const Place own(l.width, l.expert_width, member, members);
      multiply(ByColumns<T>{grad_rows.data()}, Straight<float>{a_rows.data()}, own.rows, piece->count, own.columns,
               workspace(member), piece->again, grad_w_out_rows.data());
    }
    if (l.grad_b_out != nullptr) sum_rows(grad_rows.data(), true, l.width, l.grad_b_out, member);
    if (l.grad_w_in != nullptr) {
      const Place own(l.hidden, l.width, member, members);
      multiply(ByColumns<float>{dz_rows.data()}, Straight<T>{x_rows.data()}, own.rows, piece->count, own.columns,
               workspace(member), piece->again, grad_w_in_rows.data());
    }
    if (l.grad_b_in != nullptr) sum_rows(dz_rows.data(), false, l.hidden, l.grad_b_in, member);
  }

  void gradients_of_combine_weights(Index member) {
    const Index parts = over_activation(member).of_columns;
    const Range own = share(piece->count, 1, member, members);
    for (Index r = own.begin; r < own.end; r++) {
      float sum = 0.0f;
      for (Index part = 0; part < parts; part++) sum += inner[part * l.rows + r];
      if (l.b_out != nullptr) sum += dot_product(grad_rows[r], b_out(), l.width);
      l.grad_weight[piece->first + r] = sum;
    }
  }

  void gradient_of_x(Turn& turn, Index member) {
    turn.wait_for(piece->turn);
    if (l.grad_x != nullptr)
      multiply(ByRows<float>{dz_rows.data()}, Straight<T>{w_in_rows.data()}, Range{0, piece->count}, l.hidden,
               share(l.width, COLUMNS, member, members), workspace(member), true, token_sums.data());
    barrier.wait();
    if (member == 0) turn.pass();
  }

  // The sum of rows, by their combine weights if `weighted`, for this expert's bias. Later pieces add to what is there.
  template <class From>
  void sum_rows(const From* const* from, bool weighted, Index columns, void* all, Index member) {
    T* to = static_cast<T*>(all) + piece->expert * columns;
    const Range own = share(columns, COLUMNS, member, members);
    for (Index n = own.begin; n < own.end; n += COLUMNS) {
      const Index width = std::min<Index>(COLUMNS, own.end - n);
      float sum[COLUMNS];
      for (Index i = 0; i < width; i++) sum[i] = piece->again ? widen(to[n + i]) : 0.0f;
      for (Index r = 0; r < piece->count; r++) {
        const float by = weighted ? weight(r) : 1.0f;
        for (Index i = 0; i < width; i++) sum[i] += by * widen(from[r][n + i]);
      }
      for (Index i = 0; i < width; i++) narrow(sum[i], to[n + i]);
    }
  }

  void narrowed(const float* from, void* all, Index size, Index member) {
    if (from == nullptr) return;
    T* to = static_cast<T*>(all) + piece->expert * size;
    const Range own = share(size, 64, member, members);
    for (Index i = own.begin; i < own.end; i++) narrow(from[i], to[i]);
  }
};

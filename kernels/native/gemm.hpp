// C (+)= A @ B on one thread, where rows of A, B and C may lie anywhere: they are given by pointers.
//
// A block of B is copied into panels, a block of A into tiles (panels.hpp). Then each panel stays in the nearest caches
// while the tiles run past it: a copy costs less than reading the operands over and over where they lie.

#pragma once

#include <algorithm>

#include "panels.hpp"

struct Workspace {
  float* b;  // DEPTH * WIDTH
  float* a;
  static constexpr Index SIZE = DEPTH * WIDTH + HEIGHT * (DEPTH + 16);
};

// Columns of a product: `first`, and where there are two `parts` as many again `distance` further on, so that what is
// gate and what is up of an expert's rows is finished at the same time.
struct Columns {
  Range first;
  int parts = 1;
  Index distance = 0;
};

// Out of line, or the compiler would keep all sums of a tile in memory.
__attribute__((noinline)) static void put(Vector sum, int lanes, bool add, float* to) {
  store(to, add ? load(to, lanes) + sum : sum, lanes);
}

static inline void nothing(Range, Range) {}

// A tile of R rows and COLUMNS columns, from copied blocks of A and B.
template <int R, class A>
static void tile(const float* a, Index depth, const float* b, float* const* c, Index columns, bool add) {
  Vector sum[R][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sum[i][v] = Vector{};
  const auto add_products = [&]() __attribute__((always_inline)) {
    Vector of_b[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) of_b[v] = load(b + v * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      const float value = a[i * A::ROW];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[i][v] += value * of_b[v];
    }
    a += A::STEP, b += COLUMNS;
  };
  // C comes into the cache meanwhile, a line at a time: more at once would keep A and B waiting.
  const Index lines = std::min<Index>(depth, R * VECTORS);
  for (Index k = 0; k < lines; k++) {
    __builtin_prefetch(c[k / VECTORS] + k % VECTORS * LANES, 1);
    add_products();
  }
  for (Index k = lines; k < depth; k++) add_products();
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      float* to = c[i] + v * LANES;
      const Index lanes = columns - v * LANES;
      if (lanes >= LANES)
        store(to, add ? load(to) + sum[i][v] : sum[i][v]);
      else
        put(sum[i][v], lanes, add, to);
    }
}

template <class A, int R = ROWS>
static void tile_of(Index rows, const float* a, Index depth, const float* b, float* const* c, Index columns, bool add) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<R, A>(a, depth, b, c, columns, add);
    else
      tile_of<A, R - 1>(rows, a, depth, b, c, columns, add);
  }
}

// Copied rows of A by copied columns of B.
template <class A>
static void multiply_block(const float* a, const float* b, Range rows, Index depth, Range columns, bool add,
                           float* const* c) {
  for (Index n = columns.begin; n < columns.end; n += COLUMNS, b += depth * COLUMNS) {
    const float* own = a;
    for (Index m = rows.begin; m < rows.end; m += ROWS, own += A::TILE) {
      const Index count = std::min<Index>(ROWS, rows.end - m);
      float* to[ROWS];
      for (Index i = 0; i < count; i++) to[i] = c[m + i] + n;
      tile_of<A>(count, own, depth, b, to, columns.end - n, add);
    }
  }
}

template <class A, class B>
static float dot_product(const A* a, const B* b, Index depth) {
  Vector sums[2]{};
  Index k = 0;
  for (; k + 2 * LANES <= depth; k += 2 * LANES)
    for (int i = 0; i < 2; i++) sums[i] += load_wide(a + k + i * LANES) * load_wide(b + k + i * LANES);
  float total = sum_of(sums[0] + sums[1]);
  for (; k < depth; k++) total += widen(a[k]) * widen(b[k]);
  return total;
}

// C (+)= A @ B for a few rows, without copying B, whose columns lie in a row each: that would take longer than it
// saves.
constexpr Index FEW = 3;

template <class A, class T, class Finished>
static void multiply_few(A a, Transposed<T> b, Range rows, Index depth, Columns columns, Workspace work, bool add,
                         float* const* c, Finished finished) {
  for (Index m = rows.begin; m < rows.end; m++) copy(a, {m, m + 1}, {0, depth}, work.b + (m - rows.begin) * depth);
  for (int p = 0; p < columns.parts; p++) {
    const Range own = columns.first + p * columns.distance;
    for (Index n = own.begin; n < own.end; n++) {
      const float* row = work.b;
      for (Index m = rows.begin; m < rows.end; m++, row += depth)
        c[m][n] = dot_product(row, b.from + n * b.stride, depth) + (add ? c[m][n] : 0.0f);
    }
  }
  finished(rows, columns.first);
}

// C[rows][columns] = A @ B, or += where `add`; row i of C is c[i]. Calls finished(rows, columns of the first part) for
// what will not change any more, while it is in cache.
template <class A, class B, class Finished>
static void multiply(A a, B b, Range rows, Index depth, Columns columns, Workspace work, bool add, float* const* c,
                     Finished finished) {
  if (rows.size() == 0 || depth == 0) return;
  const Index blocks = (depth + DEPTH - 1) / DEPTH;
  const Index deep = ((depth + blocks - 1) / blocks + LANES - 1) / LANES * LANES;  // all about the same
  const Index wide = WIDTH / columns.parts;
  for (Index n = columns.first.begin; n < columns.first.end; n += wide) {
    const Range first{n, std::min(n + wide, columns.first.end)};
    const Index panels = (first.size() + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (Index k = 0; k < depth; k += deep) {
      const Range part{k, std::min(k + deep, depth)};
      for (int p = 0; p < columns.parts; p++)
        pack(b, part, first + p * columns.distance, work.b + p * panels * part.size());
      for (Index m = rows.begin; m < rows.end; m += HEIGHT) {
        const Range own{m, std::min(m + HEIGHT, rows.end)};
        copy(a, own, part, work.a);
        for (int p = 0; p < columns.parts; p++)
          multiply_block<A>(work.a, work.b + p * panels * part.size(), own, part.size(), first + p * columns.distance,
                            add || k > 0, c);
        if (part.end == depth) finished(own, first);
      }
    }
  }
}

template <class A, class B>
static void multiply(A a, B b, Range rows, Index depth, Range columns, Workspace work, bool add, float* const* c) {
  multiply(a, b, rows, depth, Columns{columns}, work, add, c, nothing);
}

// C (+)= A @ B on one thread, where rows of A, B and C may lie anywhere: they are given by pointers.
//
// B is copied block by block into panels of COLUMNS columns, which stay in the first cache while tiles of ROWS rows of A
// run past them. A, given by its rows or by its columns, is copied too: a copy costs less than reading it over and over
// where it lies.

#pragma once

#include <algorithm>
#include <cstring>

#include "simd.hpp"

typedef int64_t Index;

constexpr Index DEPTH = 256;  // of a block, along the sum
constexpr Index WIDTH = 16 * COLUMNS;  // of a block of B
constexpr Index HEIGHT = 10 * ROWS;  // of a block of A

struct Range {
  Index begin, end;
  Index size() const { return end > begin ? end - begin : 0; }
};

// Row i is from[i]. Value k of row i of a copied block is at i * ROW + k.
struct ByRows {
  const float* const* from;
  static constexpr Index ROW = DEPTH + 16, STEP = 1, BLOCK = ROWS * ROW;
};

// Column k is from[k]. Value k of row i of a copied block is at i + k * STEP.
struct ByColumns {
  const float* const* from;
  static constexpr Index ROW = 1, STEP = ROWS, BLOCK = ROWS * DEPTH + 16;
};

// B[k][n] = from[k][n].
template <class T>
struct Straight {
  const T* const* from;
};

// B[k][n] = from[n * stride + k].
template <class T>
struct Transposed {
  const T* from;
  Index stride;
};

struct Workspace {
  float* b;  // DEPTH * WIDTH
  float* a;  // HEIGHT * ByRows::ROW
  static constexpr Index SIZE = DEPTH * WIDTH + HEIGHT * ByRows::ROW;
};

template <int SIZE, class T>
static inline void copy_row(const T* from, Index count, float* to) {
  if (count >= SIZE) {
    if constexpr (sizeof(T) == 4) {
      std::memcpy(to, from, 4 * SIZE);
    } else {
      for (int i = 0; i < SIZE; i++) to[i] = widen(from[i]);
    }
  } else {
    for (Index i = 0; i < SIZE; i++) to[i] = i < count ? widen(from[i]) : 0.0f;
  }
}

template <class T>
static void pack(Straight<T> b, Range depth, Range columns, float* to) {
  for (Index n = columns.begin; n < columns.end; n += COLUMNS)
    for (Index k = depth.begin; k < depth.end; k++, to += COLUMNS)
      copy_row<COLUMNS>(b.from[k] + n, columns.end - n, to);
}

// LANES rows of LANES values become columns, by LANES interleavings at each of log2(LANES) levels.
static inline void transpose(Vector (&v)[LANES]) {
  Vector other[LANES];
#pragma GCC unroll 4
  for (int level = 1; level < LANES; level *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      Vector low = v[i], high = v[i + LANES / 2];
#if defined(__AVX512F__)
      typedef int Indices __attribute__((vector_size(64)));
      other[2 * i] = __builtin_shuffle(
          low, high, Indices{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
      other[2 * i + 1] = __builtin_shuffle(
          low, high, Indices{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#elif defined(__AVX__)
      typedef int Indices __attribute__((vector_size(32)));
      other[2 * i] = __builtin_shuffle(low, high, Indices{0, 8, 1, 9, 2, 10, 3, 11});
      other[2 * i + 1] = __builtin_shuffle(low, high, Indices{4, 12, 5, 13, 6, 14, 7, 15});
#else
      typedef int Indices __attribute__((vector_size(16)));
      other[2 * i] = __builtin_shuffle(low, high, Indices{0, 4, 1, 5});
      other[2 * i + 1] = __builtin_shuffle(low, high, Indices{2, 6, 3, 7});
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) v[i] = other[i];
  }
}

template <class T>
static inline Vector load_wide(const T* from) {
  float wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = widen(from[i]);
  return load(wide);
}

static inline Vector load_wide(const float* from) { return load(from); }

template <class T>
static void pack(Transposed<T> b, Range depth, Range columns, float* to) {
  for (Index n = columns.begin; n < columns.end; n += COLUMNS, to += depth.size() * COLUMNS) {
    for (int half = 0; half < COLUMNS; half += LANES) {
      Index first = n + half;
      const T* from = b.from + first * b.stride;
      Index k = depth.begin;
      if (first + LANES <= columns.end) {
        for (; k + LANES <= depth.end; k += LANES) {
          Vector v[LANES];
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) v[i] = load_wide(from + i * b.stride + k);
          transpose(v);
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) store(to + (k - depth.begin + i) * COLUMNS + half, v[i]);
        }
      }
      for (; k < depth.end; k++)
        for (int i = 0; i < LANES; i++)
          to[(k - depth.begin) * COLUMNS + half + i] = first + i < columns.end ? widen(from[i * b.stride + k]) : 0.0f;
    }
  }
}

__attribute__((noinline)) static void put(const float* row, Index columns, bool add, float* to) {
  for (Index n = 0; n < columns; n++) to[n] = add ? to[n] + row[n] : row[n];
}

// A tile of R rows and COLUMNS columns, from copied blocks of A and B.
template <int R, class A>
static void tile(const float* a, Index depth, const float* b, float* const* c, Index columns, bool add) {
  Vector sum[R][2];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
    sum[i][0] = sum[i][1] = Vector{};
    __builtin_prefetch(c[i], 1);  // there when the sums are
    __builtin_prefetch(c[i] + COLUMNS - 1, 1);
    if (LANES == 16) __builtin_prefetch(c[i] + LANES, 1);
  }
  for (Index k = 0; k < depth; k++, a += A::STEP, b += COLUMNS) {
    Vector b0 = load(b), b1 = load(b + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      float value = a[i * A::ROW];
      sum[i][0] += value * b0;
      sum[i][1] += value * b1;
    }
  }
  if (columns >= COLUMNS) {
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      store(c[i], add ? load(c[i]) + sum[i][0] : sum[i][0]);
      store(c[i] + LANES, add ? load(c[i] + LANES) + sum[i][1] : sum[i][1]);
    }
  } else {
    float row[COLUMNS];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      store(row, sum[i][0]);
      store(row + LANES, sum[i][1]);
      put(row, columns, add, c[i]);
    }
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

// Copies a block of A, of at most HEIGHT rows and DEPTH columns. Rows keep to themselves, apart by a distance that is no
// power of two: lines that are needed together must not fall on the same few places of a cache.
static void copy(ByRows a, Range rows, Range depth, float* to) {
  for (Index m = rows.begin; m < rows.end; m++, to += ByRows::ROW)
    std::memcpy(to, a.from[m] + depth.begin, 4 * depth.size());
}

// Values of ROWS rows lie beside each other.
static void copy(ByColumns a, Range rows, Range depth, float* to) {
  for (Index k = depth.begin; k < depth.end; k++, to += ROWS) {
    float* panel = to;
    for (Index m = rows.begin; m < rows.end; m += ROWS, panel += ByColumns::BLOCK)
      copy_row<ROWS>(a.from[k] + m, rows.end - m, panel);
  }
}

template <class A>
static void multiply_block(A a, Workspace work, Range rows, Range depth, Range columns, bool add, float* const* c) {
  for (Index top = rows.begin; top < rows.end; top += HEIGHT) {
    const Range own{top, std::min(top + HEIGHT, rows.end)};
    copy(a, own, depth, work.a);
    const float* block = work.a;
    for (Index m = own.begin; m < own.end; m += ROWS, block += A::BLOCK) {
      const Index count = std::min<Index>(ROWS, own.end - m);
      const float* panel = work.b;
      for (Index n = columns.begin; n < columns.end; n += COLUMNS, panel += depth.size() * COLUMNS) {
        float* to[ROWS];
        for (Index i = 0; i < count; i++) to[i] = c[m + i] + n;
        tile_of<A>(count, block, depth.size(), panel, to, columns.end - n, add);
      }
    }
  }
}

// C[rows][columns] = A @ B, or += where `add`; row i of C is c[i].
template <class A, class B>
static void multiply(A a, B b, Range rows, Index depth, Range columns, Workspace work, bool add, float* const* c) {
  if (rows.size() == 0) return;
  for (Index n = columns.begin; n < columns.end; n += WIDTH) {
    const Range own{n, std::min(n + WIDTH, columns.end)};
    for (Index k = 0; k < depth; k += DEPTH) {
      const Range part{k, std::min(k + DEPTH, depth)};
      pack(b, part, own, work.b);
      multiply_block(a, work, rows, part, own, add || k > 0, c);
    }
  }
}

// How blocks of matrices are copied for the product of gemm.hpp. bfloat16 is widened on the way.
//
// B goes into panels of COLUMNS columns, one row of a panel after the other. A goes into tiles of ROWS rows.

#pragma once

#include <cstring>

#include "simd.hpp"

constexpr Index DEPTH = 192;  // the most of a block, along the sum
constexpr Index WIDTH = 48 * LANES;  // of a block of B
constexpr Index HEIGHT = 6 * ROWS;  // of a block of A

// Row i is from[i]. Value k of row i of a copied block is at i * ROW + k: rows keep to themselves, apart by a distance
// that is no power of two, as lines that are needed together must not fall on the same few places of a cache.
template <class T>
struct ByRows {
  const T* const* from;
  static constexpr Index ROW = DEPTH + 16, STEP = 1, TILE = ROWS * ROW;
};

// Column k is from[k]. Value k of row i of a copied block is at i + k * STEP, within its tile.
template <class T>
struct ByColumns {
  const T* const* from;
  static constexpr Index ROW = 1, STEP = ROWS, TILE = ROWS * DEPTH + 16;
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

constexpr Index LINE = 64;  // bytes
constexpr Index AHEAD = 4;  // rows: those of tokens lie anywhere, where no processor looks ahead

template <class T>
static inline void fetch(const T* from, Index count) {
  for (Index i = 0; i < count; i += LINE / Index(sizeof(T))) __builtin_prefetch(from + i);
}

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
static void copy(ByRows<T> a, Range rows, Range depth, float* to) {
  for (Index m = rows.begin; m < rows.end; m++, to += ByRows<T>::ROW) {
    if (m + AHEAD < rows.end) fetch(a.from[m + AHEAD] + depth.begin, depth.size());
    const T* from = a.from[m] + depth.begin;
    for (Index k = 0; k < depth.size(); k++) to[k] = widen(from[k]);
  }
}

template <class T>
static void copy(ByColumns<T> a, Range rows, Range depth, float* to) {
  for (Index k = depth.begin; k < depth.end; k++, to += ROWS) {
    if (k + AHEAD < depth.end) fetch(a.from[k + AHEAD] + rows.begin, rows.size());
    float* tile = to;
    for (Index m = rows.begin; m < rows.end; m += ROWS, tile += ByColumns<T>::TILE)
      copy_row<ROWS>(a.from[k] + m, rows.end - m, tile);
  }
}

template <class T>
static void pack(Straight<T> b, Range depth, Range columns, float* to) {
  for (Index k = depth.begin; k < depth.end; k++, to += COLUMNS) {
    if (k + AHEAD < depth.end) fetch(b.from[k + AHEAD] + columns.begin, columns.size());
    float* panel = to;
    for (Index n = columns.begin; n < columns.end; n += COLUMNS, panel += depth.size() * COLUMNS)
      copy_row<COLUMNS>(b.from[k] + n, columns.end - n, panel);
  }
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
static void pack(Transposed<T> b, Range depth, Range columns, float* to) {
  for (Index n = columns.begin; n < columns.end; n += COLUMNS, to += depth.size() * COLUMNS) {
    for (int offset = 0; offset < COLUMNS; offset += LANES) {
      Index first = n + offset;
      const T* from = b.from + first * b.stride;
      Index k = depth.begin;
      if (first + LANES <= columns.end) {
        for (; k + LANES <= depth.end; k += LANES) {
          Vector v[LANES];
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) v[i] = load_wide(from + i * b.stride + k);
          transpose(v);
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) store(to + (k - depth.begin + i) * COLUMNS + offset, v[i]);
        }
      }
      for (; k < depth.end; k++)
        for (int i = 0; i < LANES; i++)
          to[(k - depth.begin) * COLUMNS + offset + i] = first + i < columns.end ? widen(from[i * b.stride + k]) : 0.0f;
    }
  }
}

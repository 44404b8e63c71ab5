// Vectors of the widest registers that the compiler may use, what is stored in two bytes, and ranges of indices.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int VECTORS = 4;  // of columns of a tile
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int VECTORS = 2;
#else
constexpr int LANES = 4;
constexpr int VECTORS = 2;
#endif
constexpr int ROWS = 6;  // of a tile, whose sums fill the registers
constexpr int COLUMNS = VECTORS * LANES;

typedef int64_t Index;

struct Range {
  Index begin, end;
  Index size() const { return end > begin ? end - begin : 0; }
};

static inline Range operator+(Range range, Index by) { return {range.begin + by, range.end + by}; }

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

static inline Vector fill(float value) { return Vector{} + value; }

static inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

static inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// The first `lanes` only; the others are zero.
static inline Vector load(const float* from, int lanes) {
  if (lanes == LANES) return load(from);
  Vector v{};
  for (int i = 0; i < lanes; i++) v[i] = from[i];
  return v;
}

static inline void store(float* to, Vector v, int lanes) {
  if (lanes == LANES) return store(to, v);
  for (int i = 0; i < lanes; i++) to[i] = v[i];
}

static inline float sum_of(Vector v) {
  float sum = 0.0f;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

struct BFloat16 {
  uint16_t bits;
};

static inline float widen(float x) { return x; }

static inline float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <class T>
static inline Vector load_wide(const T* from) {
  float wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = widen(from[i]);
  return load(wide);
}

static inline Vector load_wide(const float* from) { return load(from); }

static inline void narrow(float x, float& to) { to = x; }

// Rounds to nearest, ties to even; NaN stays NaN.
static inline void narrow(float x, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

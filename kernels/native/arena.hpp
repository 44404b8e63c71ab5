// Memory between calls, so that each call does not touch new pages.

#pragma once

#include <atomic>
#include <cstdlib>

#include "simd.hpp"

// A second caller at the same time gets its own, for that call.
class Arena {
 public:
  explicit Arena(Index floats) {
    mine_ = !taken_.exchange(true);
    if (mine_ && size_ < floats) {
      std::free(kept_);
      kept_ = allocate(floats);
      size_ = floats;
    }
    memory_ = mine_ ? kept_ : allocate(floats);
    next_ = memory_;
  }
  ~Arena() {
    if (mine_)
      taken_ = false;
    else
      std::free(memory_);
  }
  float* take(Index floats) {
    float* here = next_;
    next_ += aligned(floats);
    return here;
  }
  static Index aligned(Index floats) { return (floats + 15) / 16 * 16; }

 private:
  static float* allocate(Index floats) { return static_cast<float*>(std::aligned_alloc(64, 4 * aligned(floats))); }
  static inline std::atomic<bool> taken_{false};
  static inline float* kept_ = nullptr;
  static inline Index size_ = 0;
  bool mine_;
  float *memory_, *next_;
};

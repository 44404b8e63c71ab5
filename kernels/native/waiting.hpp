// How threads wait for each other: for a short while awake, then they let others run.

#pragma once

#include <atomic>
#include <sched.h>

#include "simd.hpp"

template <class Condition>
static inline void wait_until(Condition met) {
  for (int tries = 0; !met(); tries++) {
    if (tries < 4096)
      __builtin_ia32_pause();
    else
      sched_yield();
  }
}

class Barrier {
 public:
  explicit Barrier(Index members) : members_(members) {}
  void wait() {
    if (members_ == 1) return;
    const Index round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      wait_until([&] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

 private:
  const Index members_;
  std::atomic<Index> arrived_{0}, round_{0};
};

class Turn {
 public:
  void wait_for(Index turn) const {
    wait_until([&] { return now_.load(std::memory_order_acquire) == turn; });
  }
  void pass() { now_.store(now_.load(std::memory_order_relaxed) + 1, std::memory_order_release); }

 private:
  std::atomic<Index> now_{0};
};

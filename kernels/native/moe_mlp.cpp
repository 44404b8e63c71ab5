// Both passes of an expert layer on CPU: see passes.py for what they are given.
//
// Experts are cut into pieces of rows whose temporaries stay in cache. Where there are experts enough, up to three crews
// of threads work on one each; what they add to the sums by token comes in the order of pieces. That is a third of the
// work, so more crews would wait for each other.

#include <omp.h>

#include <memory>

#include "crew.hpp"

namespace {

Jobs jobs_of(const std::vector<Piece>& pieces, bool backward) {
  Jobs jobs;
  for (const Piece& piece : pieces) {
    if (backward && piece.again)
      jobs.back().second++;
    else
      jobs.emplace_back(&piece, &piece + 1);
  }
  return jobs;
}

// Jobs of several pieces keep others waiting for their turn, and one long job would keep them waiting at the end.
Index number_of_crews(const Jobs& jobs, size_t pieces, Index threads) {
  Index rows = 0, longest = 0;
  for (auto [begin, end] : jobs) {
    Index own = 0;
    for (const Piece* piece = begin; piece < end; piece++) own += piece->count;
    rows += own, longest = std::max(longest, own);
  }
  for (Index crews : {3, 2})
    if (threads % crews == 0 && 2 * crews * longest <= rows && 4 * pieces <= 5 * jobs.size()) return crews;
  return 1;
}

template <class T>
void run(const Layer& l, bool backward) {
  const std::vector<Piece> pieces = cut(l);
  const Jobs jobs = jobs_of(pieces, backward);
  std::unique_ptr<Arena> arena;
  std::vector<std::unique_ptr<Crew<T>>> crews;
  Turn turn(pieces.data());
  std::atomic<size_t> next{0};
#pragma omp parallel num_threads(l.threads)
  {
    const Index threads = omp_get_num_threads();  // may be fewer than were asked for
#pragma omp single
    {
      const Index count = number_of_crews(jobs, pieces.size(), threads);
      arena = std::make_unique<Arena>(count * Crew<T>::floats(l, threads / count, backward));
      for (Index i = 0; i < count; i++) crews.push_back(std::make_unique<Crew<T>>(l, *arena, threads / count, backward));
    }
    const Index members = threads / Index(crews.size()), member = omp_get_thread_num() % members;
    Crew<T>& own = *crews[omp_get_thread_num() / members];
    own.work(jobs, next, turn, member, backward);
  }
}

}  // namespace

extern "C" {

int scatterfold_layer_bytes() { return sizeof(Layer); }

void scatterfold_moe_mlp(const Layer* layer, int is_bfloat16, int backward) {
  if (is_bfloat16)
    run<BFloat16>(*layer, backward);
  else
    run<float>(*layer, backward);
}
}

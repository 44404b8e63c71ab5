// Both passes of an expert layer on CPU: see passes.py for what they are given.
//
// Experts are cut into pieces of rows whose temporaries stay in cache, see crew.hpp and schedule.hpp.

#include <omp.h>

#include <memory>

#include "crew.hpp"

namespace {

template <class T>
void run(const Layer& l, bool backward) {
  std::vector<Piece> pieces = cut(l);
  std::vector<Job> jobs = jobs_of(pieces, backward);
  std::unique_ptr<Arena> arena;
  std::vector<std::unique_ptr<Crew<T>>> crews;
  Turn turn;
  std::atomic<size_t> next{0};
#pragma omp parallel num_threads(l.threads)
  {
    const Index threads = omp_get_num_threads();  // may be fewer than were asked for
#pragma omp single
    {
      const Index count = number_of_crews(jobs, threads);
      set_turns(jobs, count);
      arena = std::make_unique<Arena>(count * Crew<T>::floats(l, threads / count, backward));
      for (Index i = 0; i < count; i++)
        crews.push_back(std::make_unique<Crew<T>>(l, *arena, threads / count, backward));
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

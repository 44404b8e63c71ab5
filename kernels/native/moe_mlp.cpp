// Both passes of an expert layer on CPU: see passes.py for what they are given.
//
// Experts come one after the other, in chunks of rows whose temporaries stay in cache. All threads work on the same
// chunk: they share out columns (and rows, where there are fewer columns than threads) and wait for each other between
// steps. Rows of tokens are read where they lie, and sums by token are added where they lie, each column by one thread
// in the order of experts: same input, same bits, for the same number of threads.

#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include "activations.hpp"
#include "gemm.hpp"

struct Layer {
  Index tokens, experts, width, hidden, expert_width, rows;  // rows: the most of a chunk
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

namespace {

// Memory between calls, so that each call does not touch new pages; a second caller at the same time gets its own.
class Arena {
 public:
  explicit Arena(size_t floats) {
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
  static float* allocate(size_t floats) { return static_cast<float*>(std::aligned_alloc(64, 4 * floats)); }
  static inline std::atomic<bool> taken_{false};
  static inline float* kept_ = nullptr;
  static inline size_t size_ = 0;
  bool mine_;
  float *memory_, *next_;
};

Range share(Index count, Index unit, Index part, Index parts) {
  const Index units = (count + unit - 1) / unit;
  return {std::min(count, units * part / parts * unit), std::min(count, units * (part + 1) / parts * unit)};
}

// A thread's place in a grid over a matrix: as many columns of threads as there are blocks, the rest over the rows.
struct Place {
  Range rows, columns;
  Index column, of_columns;
  Place(Index row_count, Index column_count, Index thread, Index threads) {
    of_columns = std::max<Index>(1, std::min(threads, (column_count + COLUMNS - 1) / COLUMNS));
    const Index of_rows = threads / of_columns;
    column = thread % of_columns;
    const Index row = thread / of_columns;
    columns = share(column_count, COLUMNS, column, of_columns);
    rows = row < of_rows ? share(row_count, ROWS, row, of_rows) : Range{0, 0};
  }
};

template <class T>
class Pass {
 public:
  static constexpr bool WIDE = sizeof(T) == 4;

  Pass(const Layer& layer, Arena& arena, bool backward)
      : l(layer), a_row(layer.expert_width + PADDING), z_row(layer.hidden + PADDING) {
    const Index m = l.rows;
    a = arena.take(m * a_row);
    z = arena.take(m * z_row);
    if (!WIDE) x_wide = arena.take(m * l.width);
    if (backward) {
      da = arena.take(m * a_row);
      dz = arena.take(m * z_row);
      if (!WIDE) grad_wide = arena.take(m * l.width);
      if (!WIDE && l.grad_w_in) w_in_wide = arena.take(l.hidden * l.width);
      if (!WIDE && l.grad_w_out) w_out_wide = arena.take(l.expert_width * l.width);
    }
    inner = arena.take(l.threads * m);
    work = arena.take(l.threads * Workspace::SIZE);
    for (auto* rows : {&x_rows, &grad_rows, &a_rows, &dz_rows}) rows->resize(m);
    for (auto* rows : {&z_rows, &da_rows, &token_sums}) rows->resize(m);
    w_in_rows.resize(l.hidden), grad_w_in_rows.resize(l.hidden);
    w_out_rows.resize(l.width), grad_w_out_rows.resize(l.width);
    for (Index r = 0; r < m; r++) {
      a_rows[r] = a + r * a_row;
      da_rows[r] = da + r * a_row;
      dz_rows[r] = dz + r * z_row;
    }
  }

  static size_t floats(const Layer& l, bool backward) {
    const Index m = l.rows;
    Index total = 16 * 16 + l.threads * (m + Workspace::SIZE);
    total += m * (2 * l.expert_width + 2 * l.hidden + 2 * l.width + 4 * PADDING);
    if (backward && !WIDE) total += l.width * (l.hidden + l.expert_width);
    return Arena::aligned(total);
  }

  void forward() {
#pragma omp parallel num_threads(l.threads)
    for (Index e = 0; e < l.experts; e++)
      for (Index begin = l.offsets[e]; begin < l.offsets[e + 1]; begin += l.rows) {
        start(e, begin, false);
        pre_activation();
        activated();
#pragma omp barrier
        through_second();
#pragma omp barrier
      }
  }

  void backward() {
#pragma omp parallel num_threads(l.threads)
    for (Index e = 0; e < l.experts; e++)
      for (Index begin = l.offsets[e]; begin < l.offsets[e + 1]; begin += l.rows) {
        start(e, begin, true);
        if (!l.has_z) pre_activation();
        gradient_of_activation();
#pragma omp barrier
        gradients_of_second();
        gradients_of_first();
#pragma omp barrier
        if (!WIDE && begin + count == l.offsets[e + 1]) {
          narrowed(w_in_wide, l.grad_w_in, l.hidden * l.width);
          narrowed(w_out_wide, l.grad_w_out, l.expert_width * l.width);
#pragma omp barrier
        }
      }
  }

 private:
  static constexpr Index PADDING = 16;  // so that rows are no power of two apart, see gemm.hpp

  const Layer& l;
  const Index a_row, z_row;
  float *a, *z = nullptr, *x_wide = nullptr, *da = nullptr, *dz = nullptr, *grad_wide = nullptr, *inner, *work;
  float *w_in_wide = nullptr, *w_out_wide = nullptr;
  std::vector<const float*> x_rows, grad_rows, a_rows, dz_rows;
  std::vector<float*> z_rows, da_rows, token_sums, grad_w_in_rows, grad_w_out_rows;
  std::vector<const T*> w_in_rows, w_out_rows;
  Index expert, first, count;
  bool again;  // a later chunk of the same expert

  Index thread() const { return omp_get_thread_num(); }
  Index threads() const { return omp_get_num_threads(); }  // may be fewer than were asked for
  Workspace workspace() const {
    float* own = work + thread() * Workspace::SIZE;
    return {own, own + DEPTH * WIDTH};
  }
  const T* w_in() const { return static_cast<const T*>(l.w_in) + expert * l.hidden * l.width; }
  const T* w_out() const { return static_cast<const T*>(l.w_out) + expert * l.width * l.expert_width; }
  bool stores_z() const { return l.z != nullptr; }
  T* z_place(Index r) const { return static_cast<T*>(l.z) + (first + r) * l.hidden; }
  Index token(Index r) const { return l.token[first + r]; }
  Place over_activation() const { return Place(count, l.expert_width, thread(), threads()); }

  // Pointers to the rows of this chunk; wide copies of them where they are narrow.
  void start(Index e, Index begin, bool backward) {
#pragma omp single
    {
      expert = e, first = begin, again = begin > l.offsets[e];
      count = std::min<Index>(l.rows, l.offsets[e + 1] - begin);
      for (Index h = 0; h < l.hidden; h++) w_in_rows[h] = w_in() + h * l.width;
      for (Index d = 0; d < l.width; d++) w_out_rows[d] = w_out() + d * l.expert_width;
      if (backward) {
        float* to = gradient(l.grad_w_in, w_in_wide, l.hidden * l.width);
        for (Index h = 0; h < l.hidden; h++) grad_w_in_rows[h] = to + h * l.width;
        to = gradient(l.grad_w_out, w_out_wide, l.expert_width * l.width);
        for (Index d = 0; d < l.width; d++) grad_w_out_rows[d] = to + d * l.expert_width;
      }
    }
    const Range own = share(count, 1, thread(), threads());
    for (Index r = own.begin; r < own.end; r++) {
      x_rows[r] = row(l.x, x_wide, r);
      if (backward) grad_rows[r] = row(l.grad, grad_wide, r);
      z_rows[r] = z + r * z_row;
      if constexpr (WIDE) z_rows[r] = stores_z() ? z_place(r) : z_rows[r];
      token_sums[r] = (backward ? l.grad_x : l.out) + token(r) * l.width;
    }
#pragma omp barrier
  }

  float* gradient(void* all, float* wide, Index size) const {
    return WIDE ? static_cast<float*>(all) + expert * size : wide;
  }

  const float* row(const void* from, float* wide, Index r) {
    const T* narrow_row = static_cast<const T*>(from) + token(r) * l.width;
    if constexpr (WIDE) {
      return narrow_row;
    } else {
      float* to = wide + r * l.width;
      for (Index d = 0; d < l.width; d++) to[d] = widen(narrow_row[d]);
      return to;
    }
  }

  // z = x @ w_in^T + b_in, of the columns of this thread: those of the gate and the same of the other half.
  void pre_activation() {
    const Place own = over_activation();
    for (int half = 0; half <= l.gated; half++) {
      const Index shift = half * l.expert_width;
      const Range columns{own.columns.begin + shift, own.columns.end + shift};
      multiply(ByRows{x_rows.data()}, Transposed<T>{w_in(), l.width}, own.rows, l.width, columns, workspace(), false,
               z_rows.data());
      for (Index r = own.rows.begin; r < own.rows.end; r++) {
        float* here = z_rows[r];
        if (l.b_in != nullptr) {
          const T* bias = static_cast<const T*>(l.b_in) + expert * l.hidden;
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
    }
  }

  void activated() {
    const Place own = over_activation();
    with_activation(l.activation, [&]<Activation KIND>() {
      for (Index r = own.rows.begin; r < own.rows.end; r++) {
        const float* gate = z_rows[r];
        activate_row<KIND>(gate, l.gated ? gate + l.expert_width : nullptr, own.columns.begin, own.columns.end,
                           l.weight[first + r], a + r * a_row);
      }
    });
  }

  // out[token] += a @ w_out^T + weight * b_out.
  void through_second() {
    const Range columns = share(l.width, COLUMNS, thread(), threads());
    multiply(ByRows{a_rows.data()}, Transposed<T>{w_out(), l.expert_width}, Range{0, count}, l.expert_width, columns,
             workspace(), true, token_sums.data());
    if (l.b_out == nullptr) return;
    const T* bias = static_cast<const T*>(l.b_out) + expert * l.width;
    for (Index r = 0; r < count; r++) {
      float* to = l.out + token(r) * l.width;
      for (Index d = columns.begin; d < columns.end; d++) to[d] += l.weight[first + r] * widen(bias[d]);
    }
  }

  // da = grad @ w_out; from it and z: dz, the weighted activation, and the gradient of the combine weight.
  void gradient_of_activation() {
    const Place own = over_activation();
    multiply(ByRows{grad_rows.data()}, Straight<T>{w_out_rows.data()}, own.rows, l.width, own.columns, workspace(),
             false, da_rows.data());
    with_activation(l.activation, [&]<Activation KIND>() {
      for (Index r = own.rows.begin; r < own.rows.end; r++) {
        if constexpr (!WIDE)
          if (l.has_z) widened(r, own.columns);
        const float* gate = z_rows[r];
        float* d_gate = dz + r * z_row;
        float sum = activate_row_backward<KIND>(gate, l.gated ? gate + l.expert_width : nullptr, da + r * a_row,
                                                own.columns.begin, own.columns.end, l.weight[first + r], d_gate,
                                                d_gate + l.expert_width, a + r * a_row);
        if (l.b_out != nullptr && own.column == 0) {
          const T* bias = static_cast<const T*>(l.b_out) + expert * l.width;
          const float* grad = grad_rows[r];
#pragma omp simd reduction(+ : sum)
          for (Index d = 0; d < l.width; d++) sum += grad[d] * widen(bias[d]);
        }
        inner[own.column * l.rows + r] = sum;
      }
    });
  }

  // What is kept of z, where it is computed again: both give the same bits.
  void widened(Index r, Range columns) {
    for (int half = 0; half <= l.gated; half++)
      for (Index f = columns.begin; f < columns.end; f++) {
        const Index h = f + half * l.expert_width;
        z_rows[r][h] = widen(z_place(r)[h]);
      }
  }

  // Of the combine weights, w_out and b_out.
  void gradients_of_second() {
    if (l.grad_weight != nullptr) {
      const Index parts = over_activation().of_columns;
      const Range own = share(count, 1, thread(), threads());
      for (Index r = own.begin; r < own.end; r++) {
        float sum = 0.0f;
        for (Index part = 0; part < parts; part++) sum += inner[part * l.rows + r];
        l.grad_weight[first + r] = sum;
      }
    }
    if (l.grad_w_out != nullptr) {
      const Place own(l.width, l.expert_width, thread(), threads());
      multiply(ByColumns{grad_rows.data()}, Straight<float>{a_rows.data()}, own.rows, count, own.columns, workspace(),
               again, grad_w_out_rows.data());
    }
    if (l.grad_b_out != nullptr)
      sum_rows(grad_rows.data(), l.weight + first, l.width, static_cast<T*>(l.grad_b_out) + expert * l.width);
  }

  // Of w_in, b_in and x.
  void gradients_of_first() {
    if (l.grad_w_in != nullptr) {
      const Place own(l.hidden, l.width, thread(), threads());
      multiply(ByColumns{dz_rows.data()}, Straight<float>{x_rows.data()}, own.rows, count, own.columns, workspace(),
               again, grad_w_in_rows.data());
    }
    if (l.grad_b_in != nullptr)
      sum_rows(dz_rows.data(), nullptr, l.hidden, static_cast<T*>(l.grad_b_in) + expert * l.hidden);
    if (l.grad_x != nullptr)
      multiply(ByRows{dz_rows.data()}, Straight<T>{w_in_rows.data()}, Range{0, count}, l.hidden,
               share(l.width, COLUMNS, thread(), threads()), workspace(), true, token_sums.data());
  }

  // to (+)= the sum of rows, by `scale`. Later chunks add to what is there.
  void sum_rows(const float* const* from, const float* scale, Index columns, T* to) {
    const Range own = share(columns, COLUMNS, thread(), threads());
    for (Index n = own.begin; n < own.end; n += COLUMNS) {
      const Index width = std::min<Index>(COLUMNS, own.end - n);
      float sum[COLUMNS];
      for (Index i = 0; i < width; i++) sum[i] = again ? widen(to[n + i]) : 0.0f;
      for (Index r = 0; r < count; r++) {
        const float by = scale == nullptr ? 1.0f : scale[r];
        for (Index i = 0; i < width; i++) sum[i] += by * from[r][n + i];
      }
      for (Index i = 0; i < width; i++) narrow(sum[i], to[n + i]);
    }
  }

  void narrowed(const float* from, void* all, Index size) {
    if (from == nullptr) return;
    T* to = static_cast<T*>(all) + expert * size;
    const Range own = share(size, 64, thread(), threads());
    for (Index i = own.begin; i < own.end; i++) narrow(from[i], to[i]);
  }
};

template <class T>
void run(const Layer& layer, bool backward) {
  Arena arena(Pass<T>::floats(layer, backward));
  Pass<T> pass(layer, arena, backward);
  backward ? pass.backward() : pass.forward();
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

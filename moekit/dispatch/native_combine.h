// The way of rows back to their tokens.

#pragma once

#include "native_call.h"

namespace {

// out[n] = Σ_k weight[n][k] · row of slot k, where no weight is one, and no row zero.
//
// So many rows that they would lie in fresh memory are added run by run, while they are in the
// cache, and leave their place to the next run; not in bfloat16, where sums would be rounded on the
// way.
template <class Row, class T>
class Combined {
 public:
  // For `most` rows a run; without `out`, nothing is to be called.
  Combined(const Call& call, const Layout& layout, const float* weight_NK, Size columns, Size most,
           T* out)
      : call_(call), layout_(layout), weight_NK_(weight_NK), columns_(columns), out_(out),
        by_run_(std::is_same_v<T, float> && call.rows * columns * Size(sizeof(Row)) >= FRESH),
        memory_(out ? (by_run_ ? most : call.rows) * columns : 0) {}

  // Before the first run; threads must meet before they add.
  void start() const {
    if (!by_run_) return;
#pragma omp for schedule(static) nowait
    for (Size n = 0; n < call_.tokens; ++n) std::fill_n(out_ + n * columns_, columns_, T{});
  }

  // Where the rows of a run go, counted from row 0 of all on.
  Row* rows(Size run_start) const {
    return memory_.get() - (by_run_ ? run_start * columns_ : 0);
  }

  // After a run, whose rows are there.
  void add(const Groups& run, Size run_start) const {
    if (by_run_) add_rows(run_start, run_start + run.rows());
  }

  // After the last one.
  void finish() const {
    if (!by_run_) add_slots();
  }

 private:
  // Each thread looks for the rows of some tokens.
  void add_rows(Size start, Size stop) const {
    const Size threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const Size first = call_.tokens * thread / threads;
    const Size last = call_.tokens * (thread + 1) / threads;
    const Row* rows = memory_.get();
    for (Size r = start; r < stop; ++r) {
      const Size slot = call_.assignment_R[r], n = slot / call_.slots;
      if (n < first || n >= last) continue;
      const Row* row = rows + (r - start) * columns_;
      T* out = out_ + n * columns_;
      const float scale = weight(slot);
      each_vector(columns_, [&](Size c, Size count) {
        store_some(out + c, load_some(out + c, count) + scale * load_some(row + c, count), count);
      });
    }
  }

  void add_slots() const {
    const Size* place = layout_.place();
    const Row* rows = memory_.get();
#pragma omp for schedule(static)
    for (Size n = 0; n < call_.tokens; ++n)
      each_vector(columns_, [&](Size c, Size count) {
        Vector total = {};
        for (Size slot = n * call_.slots; slot < (n + 1) * call_.slots; ++slot)
          if (place[slot] >= 0)
            total += weight(slot) * load_some(rows + place[slot] * columns_ + c, count);
        store_some(out_ + n * columns_ + c, total, count);
      });
  }

  float weight(Size slot) const { return weight_NK_ ? weight_NK_[slot] : 1.f; }

  const Call& call_;
  const Layout& layout_;
  const float* weight_NK_;
  Size columns_;
  T* out_;
  bool by_run_;
  Room<Row> memory_;
};

}  // namespace

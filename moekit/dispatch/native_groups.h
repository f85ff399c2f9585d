// Rows that are sorted by expert, how threads share them out, and their way from tokens.
//
// Functions with an `omp for` are called by all threads of a region.

#pragma once

#include "native_tiles.h"

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <numeric>
#include <vector>

namespace {

// A stack of matrices (E, out, in), each with rows without gaps between elements.
template <class T>
struct Stack {
  const T* data;
  Size expert, ld;
  const T* row(Size e, Size o) const { return data + e * expert + o * ld; }
};

// Rows in float32.
struct Matrix {
  float* data;
  Size columns, ld;
  float* row(Size r) const { return data + r * ld; }
};

// Rows of a run of experts on the way, in memory of the caller's for all rows, or of their own.
class RunRows {
 public:
  RunRows(float* given, Size columns, Size rows)
      : given_(given), columns_(columns), own_(given ? 0 : rows * ld()) {}

  // Counted from row 0 of all on.
  Matrix from(Size run_start) const {
    if (given_) return {given_, columns_, columns_};
    return {own_.get() - run_start * ld(), columns_, ld()};
  }

 private:
  // Rows that lie some powers of two apart would drive each other out of the cache.
  Size ld() const { return columns_ + APART; }

  float* given_;
  Size columns_;
  Room<float> own_;
};

// Rows of an expert from which on strips pay, where the operand runs along the result already.
constexpr Size STRIP_ROWS = 16;

// Rows `first` to `last` of an expert that has STRIP_ROWS; at most STRETCH of them.
struct Stretch {
  Size expert, first, last;
};
constexpr Size STRETCH = 384;

// Rows sorted by expert. `used` lists the experts that have some; `stretch`, in parts of about the
// same size, the rows of those that have many.
struct Groups {
  Size experts, used_count;
  const Size* start;
  const Size* used;
  Size stretch_count;
  const Stretch* stretch;
  Size rows(Size e) const { return start[e + 1] - start[e]; }
  Size rows() const { return used_count ? start[used[used_count - 1] + 1] - start[used[0]] : 0; }
};

// The order that sorts ids below `size`, of equal ids the first first, and how many there are of
// each. The first id that is not one of them ends it, and false is returned.
inline bool sort_ids(Size count, const Size* ids, Size size, Size* order, Size* counts) {
  std::fill(counts, counts + size, 0);
  for (Size i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= size) return false;
    ++counts[ids[i]];
  }
  const Room<Size> next(size);
  std::exclusive_scan(counts, counts + size, next.get(), Size(0));
  for (Size i = 0; i < count; ++i) order[next.get()[ids[i]]++] = i;
  return true;
}

// Which rows are each expert's, by how many each has.
class RowLayout {
 public:
  RowLayout(Size experts, const Size* count_E) : start_(experts + 1) {
    used_.reserve(experts);
    for (Size e = 0; e < experts; ++e) {
      start_[e + 1] = start_[e] + count_E[e];
      if (count_E[e]) used_.push_back(e);
      if (count_E[e] >= STRIP_ROWS) add_stretches(e, start_[e], count_E[e]);
    }
  }
  Groups groups() const {
    return {Size(start_.size()) - 1, Size(used_.size()), start_.data(), used_.data(),
            Size(stretches_.size()), stretches_.data()};
  }

 private:
  void add_stretches(Size e, Size first, Size rows) {
    const Size parts = ceil_div(rows, STRETCH);
    for (Size i = 0; i < parts; ++i)
      stretches_.push_back({e, first + rows * i / parts, first + rows * (i + 1) / parts});
  }

  std::vector<Size> start_, used_;
  std::vector<Stretch> stretches_;
};

// Calls `step(some groups, their first row)` for runs of experts with few rows together, so that
// what is made of these on the way stays in the cache and is written over by the next run.
constexpr Size RUN = 1024;  // rows for each thread

inline Size rows_at_once(const Groups& groups, Size threads) {
  Size most = RUN * threads;
  for (Size u = 0; u < groups.used_count; ++u) most = std::max(most, groups.rows(groups.used[u]));
  return most;
}

template <class Step>
void each_run(const Groups& groups, Size most, Step step) {
  const Stretch* stretch = groups.stretch;
  const Stretch* const last_stretch = stretch + groups.stretch_count;
  for (Size u = 0; u < groups.used_count;) {
    const Size first = groups.start[groups.used[u]];
    Size end = u;
    while (end < groups.used_count && groups.start[groups.used[end] + 1] - first <= most) ++end;
    const Size stop = groups.start[groups.used[end - 1] + 1];
    const Stretch* const own = stretch;
    while (stretch != last_stretch && stretch->first < stop) ++stretch;
    step(Groups{groups.experts, end - u, groups.start, groups.used + u, stretch - own, own}, first);
    u = end;
  }
}

// Calls step(part, first, last) for each of `count` parts and each block of `width` in `size`,
// shared out among the threads, which do not wait for each other.
template <class Part, class Step>
void each_block(Size count, const Part* parts, Size size, Size width, Step step) {
  const Size blocks = ceil_div(size, width), items = count * blocks;
#pragma omp for schedule(dynamic) nowait
  for (Size item = 0; item < items; ++item) {
    const Size first = item % blocks * width;
    step(parts[item / blocks], first, first + width < size ? first + width : size);
  }
}

// Bytes from which on memory comes fresh from the system, and goes back to it, at each use.
constexpr Size FRESH = Size(1) << 25;

// Asks the system at once for all pages of fresh memory that will be written: one by one, as they
// are written, they take several times as long.
inline void populate(void* from, Size bytes) {
#if defined(MADV_POPULATE_WRITE)
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(from), page = sysconf(_SC_PAGESIZE);
  const std::uintptr_t first = (start + page - 1) / page * page;
  const std::uintptr_t last = (start + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
#endif
}

// All threads wait for each other.
inline void meet() {
#pragma omp barrier
}

// Zero for each expert without rows.
template <class T>
void clear_unused(const Groups& groups, Size size, T* out) {
  constexpr Size PARTS = 8;
#pragma omp for schedule(dynamic)
  for (Size item = 0; item < groups.experts * PARTS; ++item) {
    const Size e = item / PARTS, first = item % PARTS * size / PARTS;
    const Size last = (item % PARTS + 1) * size / PARTS;
    if (!groups.rows(e)) std::memset(out + e * size + first, 0, (last - first) * sizeof(T));
  }
}

// The tokens of rows `start` to `stop`.
template <class T>
void gather(Size start, Size stop, const Size* assignment, Size slots, const T* x, Size ld,
            const Matrix& out) {
#pragma omp for schedule(static) nowait
  for (Size r = start; r < stop; ++r) copy(x + assignment[r] / slots * ld, out.columns, out.row(r));
}

}  // namespace

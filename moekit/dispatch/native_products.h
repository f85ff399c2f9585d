// Products of rows that are sorted by expert, and the way of rows from tokens and back.
//
// A leading dimension (`ld`) is a stride in elements. Functions with an `omp for` are called by all
// threads of a region, which wait for each other at its end.

#pragma once

#include "native_pairs.h"

#include <omp.h>

namespace {

// Values in float32.
template <class T>
void copy(const T* from, Size size, float* to) {
  each_vector(size, [&](Size i, Size count) {
    store_some(to + i, load_some(from + i, count), count);
  });
}

// A stack of matrices (E, out, in), each with rows without gaps between elements.
template <class T>
struct Stack {
  const T* data;
  Size expert, ld;
  const T* row(Size e, Size o) const { return data + e * expert + o * ld; }
};

// Rows sorted by expert; `used` lists the experts that have some.
struct Groups {
  Size experts, used_count;
  const Size* start;
  const Size* used;
  Size rows(Size e) const { return start[e + 1] - start[e]; }
  Size rows() const { return used_count ? start[used[used_count - 1] + 1] - start[used[0]] : 0; }
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
  for (Size u = 0; u < groups.used_count;) {
    const Size first = groups.start[groups.used[u]];
    Size end = u;
    while (end < groups.used_count && groups.start[groups.used[end] + 1] - first <= most) ++end;
    step(Groups{groups.experts, end - u, groups.start, groups.used + u}, first);
    u = end;
  }
}

// Σ over pairs (used expert, block of `width` in `size`) of step(expert, first, last), shared out
// among the threads.
template <class Step>
void each_block(const Groups& groups, Size size, Size width, Step step) {
  const Size blocks = ceil_div(size, width), items = groups.used_count * blocks;
#pragma omp for schedule(dynamic)
  for (Size item = 0; item < items; ++item) {
    const Size first = item % blocks * width;
    step(groups.used[item / blocks], first, first + width < size ? first + width : size);
  }
}

// The type in which rows and weights of type T are multiplied: bfloat16 only where the CPU does.
#if defined(__AVX512BF16__)
template <class T>
using Multiplied = T;
#else
template <class T>
using Multiplied = float;
#endif

// Up to GROUP rows as they are multiplied.
template <class T>
class Rows {
 public:
  template <class Row>
  const Multiplied<T>* const* take(Size m, Row row, Size depth) {
    for (Size i = 0; i < m; ++i) {
      if constexpr (std::is_same_v<T, Multiplied<T>>) {
        rows_[i] = row(i);
      } else {
        float* to = memory_.get(GROUP * depth) + i * depth;
        copy(row(i), depth, to);
        rows_[i] = to;
      }
    }
    return rows_;
  }

 private:
  const Multiplied<T>* rows_[GROUP];
  Scratch<float> memory_;
};

// `deep` rows of `count` columns, in float32 and without gaps.
template <class T>
const float* panel_of(const T* from, Size ld, Size count, Size deep, Scratch<float>& memory) {
  float* panel = memory.get(deep * count);
  for (Size k = 0; k < deep; ++k) copy(from + k * ld, count, panel + k * count);
  return panel;
}

// Rows of an expert up to which a copy of weights in float32 does not pay.
constexpr Size COPIED_ROWS = 24;

// Up to a BLOCK of weights of an expert, whose rows run along the sum, as its number of rows calls
// for: where they lie, in panels of pairs, or in float32.
template <class T>
class Weights {
  using M = Multiplied<T>;

 public:
  void take(const T* weight, Size ld, Size count, Size depth, Size rows) {
    weight_ = weight, ld_ = ld, count_ = count, depth_ = depth;
    panel_ = nullptr, copy_ = nullptr;
    if constexpr (!std::is_same_v<T, M>) {
      if (rows > COPIED_ROWS) copy_ = panel_of(weight, ld, depth, count, floats_);
    }
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (rows >= PAIRED_ROWS && depth % 2 == 0) {
        Pair* panel = pairs_.get(depth / 2 * WIDE);
        panel_of_rows(weight, ld, count, depth, panel);
        panel_ = panel;
      }
    }
#endif
  }

  // The products of m rows, a GROUP at most, a BLOCK of places a row. The weights at `after` will
  // be next.
  void multiply(Size m, const M* const* rows, const T* after, float* out) const {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (panel_) return pair_tiles_of_group(m, rows, panel_, depth_ / 2, count_, out);
    }
#endif
    if (copy_) return dots_of(m, rows, copy_, depth_, count_, depth_, copy_, out);
    dots_of(m, rows, weight_, ld_, count_, depth_, after, out);
  }

 private:
  const T* weight_ = nullptr;
  Size ld_ = 0, count_ = 0, depth_ = 0;
  const Pair* panel_ = nullptr;
  const M* copy_ = nullptr;
  Scratch<Pair> pairs_;
  Scratch<float> floats_;
};

// Weights in an item of work: in eights, as many as fit the cache beside those of a second factor.
template <class T>
Size block_of(Size depth) {
  const Size fit = BLOCK_BYTES / 2 / (depth * Size(sizeof(Multiplied<T>))) / 8 * 8;
  return std::clamp<Size>(fit, 8, BLOCK<Multiplied<T>>);
}

// rows Wᵀ: `finish(e, r, first, count, sums, sums_of_second)` gets a BLOCK of results or fewer of a
// row. With `second` > 0, also those of the weights that lie so many rows further on.
template <class T, class Row, class Finish>
void products(const Groups& groups, Row row, const Stack<T>& weight, Size columns, Size second,
              Size depth, Finish finish) {
  constexpr Size ROOM = BLOCK<Multiplied<T>>;
  Rows<T> some;
  Weights<T> weights, others;
  const Size width = block_of<T>(depth);
  each_block(groups, columns, width, [&](Size e, Size first, Size last) {
    const Size count = last - first, all = groups.rows(e);
    weights.take(weight.row(e, first), weight.ld, count, depth, all);
    if (second) others.take(weight.row(e, first + second), weight.ld, count, depth, all);
    float out[GROUP * ROOM], out_second[GROUP * ROOM];
    for (Size r = groups.start[e]; r < groups.start[e + 1]; r += GROUP) {
      const Size m = std::min<Size>(groups.start[e + 1] - r, GROUP);
      const auto rows = some.take(m, [&](Size i) { return row(r + i); }, depth);
      // What this thread will most likely get after this.
      const T* next = weight.row(e, first + omp_get_num_threads() * width);
      weights.multiply(m, rows, second ? weight.row(e, first + second) : next, out);
      if (second) others.multiply(m, rows, next, out_second);
      for (Size i = 0; i < m; ++i)
        finish(e, r + i, first, count, out + i * ROOM, out_second + i * ROOM);
    }
  });
}

// Rows of an expert from which on what they are multiplied with is laid out in a panel first:
// `tile` then walks through the nearest cache, whatever the strides of the operand are.
constexpr Size PANEL_ROWS = 16;
constexpr Size PANEL = 96;  // columns

// out = rows W for float32 rows (R, depth) without gaps.
template <class T>
void back_products(const Groups& groups, const float* rows, const Stack<T>& weight, Size columns,
                   Size depth, float* out) {
  Scratch<float> memory;
  each_block(groups, columns, CHUNK, [&](Size e, Size first, Size last) {
    const auto multiply = [&](const auto* operand, Size ld, Size c, Size count, Size k, Size deep) {
      for (Size r = groups.start[e]; r < groups.start[e + 1]; r += ROWS)
        tiles_of(std::min<Size>(groups.start[e + 1] - r, ROWS), rows + r * depth + k, depth, 1,
                 operand, ld, count, deep, out + r * columns + c, columns, k > 0);
    };
    const bool panels = groups.rows(e) >= PANEL_ROWS;
    const Size width = panels ? PANEL : CHUNK;
    for (Size c = first; c < last; c += width)
      for (Size k = 0; k < depth; k += DEPTH) {
        const Size deep = std::min(depth - k, DEPTH), count = std::min(last - c, width);
        const T* part = weight.row(e, k) + c;
        if (panels) {
          multiply(panel_of(part, weight.ld, count, deep, memory), count, c, count, k, deep);
        } else {
          multiply(part, weight.ld, c, count, k, deep);
        }
      }
  });
}

// out[e] = leftᵀ right over the rows of each expert that has some.
template <class T>
void weight_gradient(const Groups& groups, const float* left, Size height, const float* right,
                     Size columns, T* out) {
  const bool exact = sizeof(T) == sizeof(float);  // otherwise sums are not to be rounded on the way
  Scratch<float> left_memory, right_memory;
  each_block(groups, height, PANEL, [&](Size e, Size first, Size last) {
    const Size start = groups.start[e], stop = groups.start[e + 1], rows = stop - start;
    const bool panels = rows >= PANEL_ROWS;
    const Size step = exact ? DEPTH : rows, width = panels ? PANEL : columns;
    for (Size r = start; r < stop; r += step) {
      const Size deep = std::min(stop - r, step), some = last - first;
      const float* from = left + r * height + first;
      if (panels) from = panel_of(from, height, some, deep, left_memory);
      for (Size c = 0; c < columns; c += width) {
        const Size count = std::min(columns - c, width);
        const float* operand = right + r * columns + c;
        if (panels) operand = panel_of(operand, columns, count, deep, right_memory);
        for (Size o = 0; o < some; o += ROWS)
          tiles_of(std::min<Size>(some - o, ROWS), from + o, 1, panels ? some : height, operand,
                   panels ? count : columns, count, deep,
                   out + (e * height + first + o) * columns + c, columns, r > start);
      }
    }
  });
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

// out[n] = Σ_k weight[n][k] rows[place[n][k]]; a slot without a row has place -1.
template <class Row, class T>
void combine(Size tokens, Size slots, const Size* place, const float* weight, const Row* rows,
             Size columns, T* out) {
#pragma omp for schedule(static)
  for (Size n = 0; n < tokens; ++n)
    each_vector(columns, [&](Size c, Size count) {
      Vector total = {};
      for (Size k = n * slots; k < (n + 1) * slots; ++k)
        if (place[k] >= 0)
          total += (weight ? weight[k] : 1.f) * load_some(rows + place[k] * columns + c, count);
      store_some(out + n * columns + c, total, count);
    });
}

// The tokens of rows `start` to `stop`.
template <class T>
void gather(Size start, Size stop, const Size* assignment, Size slots, const T* x, Size ld,
            Size columns, float* out) {
#pragma omp for schedule(static)
  for (Size r = start; r < stop; ++r) {
    copy(x + assignment[r] / slots * ld, columns, out + r * columns);
  }
}

#if defined(__AVX512BF16__)

// `finish(e, r, m, first, count, sums)` gets WIDE results or fewer of each of m rows W; rows are
// TALL, an even number, or, at an expert's end, fewer.
template <class Row, class Finish>
void paired_back_products(const Groups& groups, Row row, const Stack<bfloat16>& weight,
                          Size columns, Size depth, Finish finish) {
  Scratch<Pair> memory;
  each_block(groups, columns, WIDE, [&](Size e, Size first, Size last) {
    Pair* panel = memory.get(depth / 2 * WIDE);
    panel_of_columns(weight.row(e, 0) + first, weight.ld, last - first, depth, panel);
    float out[TALL * WIDE];
    for (Size r = groups.start[e]; r < groups.start[e + 1]; r += TALL) {
      const Size m = std::min<Size>(groups.start[e + 1] - r, TALL);
      const bfloat16* rows[TALL];
      for (Size i = 0; i < m; ++i) rows[i] = row(r + i);
      pair_tiles(m, rows, 1, panel, depth / 2, last - first, out, WIDE);
      finish(e, r, m, first, last - first, out);
    }
  });
}

// Rows as panels.
template <class Row, Size WIDTH>
void put_rows(const Groups& groups, Row row, Size columns, const Panels<WIDTH>& panels) {
  constexpr Size PARTS = 8;  // of an expert's rows
#pragma omp for schedule(dynamic)
  for (Size item = 0; item < groups.used_count * PARTS; ++item) {
    const Size e = groups.used[item / PARTS], part = item % PARTS, pairs = panels.pairs(e);
    for (Size p = part * pairs / PARTS; p < (part + 1) * pairs / PARTS; ++p) {
      const Size r = groups.start[e] + 2 * p;
      for (Size ahead = r + 2; ahead < std::min(r + 4, groups.start[e + 1]); ++ahead)
        fetch(row(ahead), columns);
      const bfloat16* first = row(r);
      const bfloat16* second = r + 1 < groups.start[e + 1] ? row(r + 1) : nullptr;
      for (Size c = 0; c < columns; c += LANES)
        panels.put(e, p, c,
                   paired(first + c, second ? second + c : nullptr,
                          std::min<Size>(columns - c, LANES)));
    }
  }
}

// out[e] = leftᵀ right over the rows of each expert that has some.
void paired_weight_gradient(const Groups& groups, const Panels<LEFT>& left, Size height,
                            const Panels<WIDE>& right, Size columns, bfloat16* out) {
  each_block(groups, height, WIDE, [&](Size e, Size first, Size last) {
    bfloat16* to = out + e * height * columns;
    for (Size c = 0; c < columns; c += WIDE)
      for (Size o = first, some; o < last; o += some) {
        // The rows of a left panel in tiles of about as many.
        const Size rest = std::min(last - o, LEFT - o % LEFT);
        some = ceil_div(rest, ceil_div(rest, TALL));
        const Pair* rows[TALL];
        for (Size i = 0; i < some; ++i) rows[i] = left.panel(e, o / LEFT) + o % LEFT + i;
        pair_tiles(some, rows, LEFT, right.panel(e, c / WIDE), right.pairs(e),
                   std::min<Size>(columns - c, WIDE), to + o * columns + c, columns);
      }
  });
}

#endif

}  // namespace

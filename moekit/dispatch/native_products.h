// Products of rows that are sorted by expert with the transposes of weights, rows Wᵀ: those of the
// forward pass.

#pragma once

#include "native_groups.h"
#include "native_pairs.h"

#include <limits>

namespace {

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

// Rows of an expert from which on strips pay here, where weights must be turned over. With AVX-512,
// dot products are ahead of other libraries at any number.
#if defined(__AVX512F__)
constexpr Size MANY_ROWS = std::numeric_limits<Size>::max();
#else
constexpr Size MANY_ROWS = 96;
#endif

// The rows of a stretch in float32, kept for the next block of columns.
template <class T>
class StretchRows {
 public:
  template <class Row>
  const float* const* take(const Stretch& part, Row row, Size depth) {
    if (part.first == first_ && part.last == last_) return rows_;
    first_ = part.first, last_ = part.last;
    for (Size i = 0; i < last_ - first_; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        rows_[i] = row(first_ + i);
      } else {
        float* to = memory_.get(STRETCH * depth) + i * depth;
        copy(row(first_ + i), depth, to);
        rows_[i] = to;
      }
    }
    return rows_;
  }

 private:
  Size first_ = -1, last_ = -1;
  const float* rows_[STRETCH];
  Scratch<float> memory_;
};

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

// rows Wᵀ for experts with few rows.
template <class T, class Row, class Finish>
void products_of_few(const Groups& groups, Row row, const Stack<T>& weight, Size columns,
                     Size second, Size depth, Finish finish) {
  constexpr Size ROOM = BLOCK<Multiplied<T>>;
  Rows<T> some;
  Weights<T> weights, others;
  const Size width = block_of<T>(depth);
  each_block(groups.used_count, groups.used, columns, width, [&](Size e, Size first, Size last) {
    const Size count = last - first, all = groups.rows(e);
    if (all >= MANY_ROWS) return;
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

// rows Wᵀ for experts with many rows.
template <class T, class Row, class Finish>
void products_of_many(const Groups& groups, Row row, const Stack<T>& weight, Size columns,
                      Size second, Size depth, Finish finish) {
  StretchRows<T> some;
  Scratch<float> strips, sums, border;
  const Size width = second ? WIDTH / 2 : WIDTH;
  const auto step = [&](const Stretch& part, Size first, Size last) {
    const Size e = part.expert, m = part.last - part.first, count = last - first;
    if (groups.rows(e) < MANY_ROWS) return;
    const auto rows = some.take(part, row, depth);
    float* const out = sums.get(STRETCH * WIDTH);
    float* const out_second = out + STRETCH * WIDTH / 2;
    const auto multiply = [&](Size o, Size k, float* to) {
      const Size deep = std::min(depth - k, DEPTH);
      float* const operand = strips.get(WIDTH * DEPTH);
      strips_of_columns(weight.row(e, o) + k, weight.ld, count, deep, operand);
      multiply_strips(m, {rows, k, 1}, operand, ceil_div(count, LANES) * LANES, deep,
                      {to, width, k > 0}, border);
    };
    for (Size k = 0; k < depth; k += DEPTH) {
      multiply(first, k, out);
      if (second) multiply(first + second, k, out_second);
    }
    for (Size i = 0; i < m; ++i)
      finish(e, part.first + i, first, count, out + i * width, out_second + i * width);
  };
  each_block(groups.stretch_count, groups.stretch, columns, width, step);
}

// rows Wᵀ: `finish(e, r, first, count, sums, sums_of_second)` gets some results of a row. With
// `second` > 0, also those of the weights that lie so many rows further on.
template <class T, class Row, class Finish>
void products(const Groups& groups, Row row, const Stack<T>& weight, Size columns, Size second,
              Size depth, Finish finish) {
  products_of_few(groups, row, weight, columns, second, depth, finish);
  products_of_many(groups, row, weight, columns, second, depth, finish);
}

}  // namespace

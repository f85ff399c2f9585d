// Products of the backward pass: rows W, and gradients of weights.

#pragma once

#include "native_groups.h"
#include "native_pairs.h"

namespace {

constexpr Size HEIGHT = 192;  // rows of a gradient in an item of work
constexpr Size CHUNK = 512;   // columns, likewise
constexpr Size WIDEST = 4096; // the same where weights are read as streams, the longer the faster

// out[m][c] (+)= Σ_j values[m][j] b[j][c] for four rows of b that lie `apart`.
template <int M, class B>
KERNEL add_four(const float (*values)[4], const B* b, Size apart, Size columns,
                const Result<float>& out) {
  Vector value[M][4];
  UNROLLED (int m = 0; m < M; ++m)
    UNROLLED (int j = 0; j < 4; ++j) value[m][j] = splat(values[m][j]);
  each_vector(columns, [&](Size c, Size count) {
    Vector row[4];
    UNROLLED (int j = 0; j < 4; ++j) row[j] = load_some(b + j * apart + c, count);
    UNROLLED (int m = 0; m < M; ++m) {
      float* const to = out.data + m * out.ld + c;
      Vector total = out.add ? load_some(to, count) : Vector{};
      UNROLLED (int j = 0; j < 4; ++j) total += value[m][j] * row[j];
      store_some(to, total, count);
    }
  });
}

// out (+)= values b for m rows, some at a time.
template <class B>
void add_four_to(Size m, const float (*values)[4], const B* b, Size apart, Size columns,
                 Result<float> out) {
  for (; m >= 3; m -= 3, values += 3, out.data += 3 * out.ld)
    add_four<3>(values, b, apart, columns, out);
  if (m == 2) add_four<2>(values, b, apart, columns, out);
  if (m == 1) add_four<1>(values, b, apart, columns, out);
}

// out (+)= left b for m rows, fewer than STRIP_ROWS: the first rows of four parts of b, the second
// ones, and so on, so that b passes by as four long streams, which a CPU reads ahead of. Returns how
// many rows of b this are.
template <class B>
Size four_streams(Size m, const float* left, Size left_ld, const B* b, Size ld, Size columns,
                  Size depth, const Result<float>& out) {
  const Size apart = depth / 4;
  float values[STRIP_ROWS][4];
  for (Size k = 0; k < apart; ++k) {
    for (Size i = 0; i < m; ++i)
      for (Size j = 0; j < 4; ++j) values[i][j] = left[i * left_ld + k + j * apart];
    add_four_to(m, values, b + k * ld, apart * ld, columns, {out.data, out.ld, out.add || k > 0});
  }
  return 4 * apart;
}

// Columns in an item of work that reads streams: all, but where threads would have nothing to do.
inline Size stream_width(const Groups& groups, Size columns) {
  const Size parts = ceil_div(2 * omp_get_num_threads(), std::max<Size>(groups.used_count, 1));
  const Size some = ceil_div(ceil_div(columns, parts), LANES) * LANES;
  return std::clamp(some, CHUNK, WIDEST);
}

// out = rows W, plus a bias (E, columns) where there is one. A weight matrix of few rows is read
// where it lies.
template <class T>
void back_products(const Groups& groups, const Matrix& rows, const Stack<T>& weight,
                   const Matrix& out, const T* bias = nullptr) {
  const Size depth = rows.columns, columns = out.columns;
  const bool biased = bias;
  const auto begin = [&](Size e, Size start, Size stop, Size first, Size last) {
    for (Size r = start; biased && r < stop; ++r)
      copy(bias + e * columns + first, last - first, out.row(r) + first);
  };
  const auto few = [&](Size e, Size first, Size last) {
    if (groups.rows(e) >= STRIP_ROWS) return;
    const Size start = groups.start[e];
    const Result<float> to = {out.row(start) + first, out.ld, biased};
    begin(e, start, groups.start[e + 1], first, last);
    const Size done = four_streams(groups.rows(e), rows.row(start), rows.ld,
                                   weight.row(e, 0) + first, weight.ld, last - first, depth, to);
    for (Size k = done; k < depth; k += SHALLOW)
      for (Size r = groups.start[e]; r < groups.start[e + 1]; r += ROWS) {
        const Size m = std::min<Size>(groups.start[e + 1] - r, ROWS);
        const Pointers<ROWS> left(m, rows.row(r), rows.ld);
        tiles_of(m, {left.get(), k, 1}, weight.row(e, k) + first, weight.ld, last - first,
                 std::min(depth - k, SHALLOW),
                 Result<float>{out.row(r) + first, out.ld, biased || k > 0});
      }
  };
  each_block(groups.used_count, groups.used, columns, stream_width(groups, columns), few);
  Scratch<float> strips, border;
  const auto many = [&](const Stretch& part, Size first, Size last) {
    const Size e = part.expert, m = part.last - part.first, count = last - first;
    const Pointers<STRETCH> left(m, rows.row(part.first), rows.ld);
    float* const operand = strips.get(WIDTH * DEPTH);
    begin(e, part.first, part.last, first, last);
    for (Size k = 0; k < depth; k += DEPTH) {
      const Size deep = std::min(depth - k, DEPTH);
      strips_of_rows(weight.row(e, k) + first, weight.ld, count, deep, operand);
      multiply_strips(m, {left.get(), k, 1}, operand, count, deep,
                      {out.row(part.first) + first, out.ld, biased || k > 0}, border);
    }
  };
  each_block(groups.stretch_count, groups.stretch, columns, WIDTH, many);
}

// out = leftᵀ right over the few rows of an expert.
template <class T>
void gradient_of_few(Size rows, const Matrix& left, const Matrix& right, T* out) {
  for (Size o = 0; o < left.columns; o += ROWS) {
    const Size m = std::min<Size>(left.columns - o, ROWS);
    const Pointers<ROWS> some(m, left.data + o, 1);
    tiles_of(m, {some.get(), 0, left.ld}, right.data, right.ld, right.columns, rows,
             Result<T>{out + o * right.columns, right.columns, false});
  }
}

// What a thread needs for the gradient of an expert with many rows.
struct GradientRoom {
  Scratch<float> left, strips, sums, border;
};

// The same over many rows, for HEIGHT columns on the left at most.
template <class T>
void gradient_of_many(Size rows, const Matrix& left, const Matrix& right, T* out,
                      GradientRoom& room) {
  constexpr Size LD = DEPTH + APART;
  const Size height = left.columns, columns = right.columns;
  float* const turned = room.left.get(HEIGHT * LD);
  float* const strips = room.strips.get(WIDTH * DEPTH);
  const Pointers<HEIGHT> some(height, turned, LD);
  for (Size first = 0; first < columns; first += CHUNK) {
    const Size chunk = std::min(columns - first, CHUNK);
    Result<float> sums = {room.sums.get(HEIGHT * CHUNK), CHUNK, false};
    if constexpr (std::is_same_v<T, float>) sums = {out + first, columns, false};
    for (Size r = 0; r < rows; r += DEPTH) {
      const Size deep = std::min(rows - r, DEPTH);
      sums.add = r > 0;
      transpose(left.row(r), left.ld, deep, height, turned, LD);
      for (Size c = 0; c < chunk; c += WIDTH) {
        const Size count = std::min(chunk - c, WIDTH);
        strips_of_rows(right.row(r) + first + c, right.ld, count, deep, strips);
        multiply_strips(height, {some.get(), 0, 1}, strips, count, deep, sums.at(0, c),
                        room.border);
      }
    }
    if constexpr (!std::is_same_v<T, float>)
      for (Size o = 0; o < height; ++o)
        each_vector(chunk, [&](Size c, Size count) {
          store_some(out + o * columns + first + c, load_some(sums.at(o, c).data, count), count);
        });
  }
}

// out[e] = leftᵀ right over the rows of each expert that has some.
template <class T>
void weight_gradient(const Groups& groups, const Matrix& left, const Matrix& right, T* out) {
  GradientRoom room;
  const Size height = left.columns, bytes = right.columns * sizeof(T);
  const bool fresh = groups.experts * height * bytes >= FRESH;
  each_block(groups.used_count, groups.used, height, HEIGHT, [&](Size e, Size first, Size last) {
    const Size start = groups.start[e], rows = groups.rows(e);
    const Matrix some = {left.row(start) + first, last - first, left.ld};
    const Matrix others = {right.row(start), right.columns, right.ld};
    T* to = out + (e * height + first) * right.columns;
    if (fresh) populate(to, (last - first) * bytes);
    if (rows < STRIP_ROWS) {
      gradient_of_few(rows, some, others, to);
    } else {
      gradient_of_many(rows, some, others, to, room);
    }
  });
}

#if defined(__AVX512BF16__)

// `finish(e, r, m, first, count, sums)` gets WIDE results or fewer of each of m rows W; rows are
// TALL, an even number, or, at an expert's end, fewer.
template <class Row, class Finish>
void paired_back_products(const Groups& groups, Row row, const Stack<bfloat16>& weight,
                          Size columns, Size depth, Finish finish) {
  Scratch<Pair> memory;
  each_block(groups.used_count, groups.used, columns, WIDE, [&](Size e, Size first, Size last) {
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
  const Size bytes = columns * sizeof(bfloat16);
  const bool fresh = groups.experts * height * bytes >= FRESH;
  each_block(groups.used_count, groups.used, height, WIDE, [&](Size e, Size first, Size last) {
    bfloat16* to = out + e * height * columns;
    if (fresh) populate(to + first * columns, (last - first) * bytes);
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

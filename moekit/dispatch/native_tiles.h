// Products of rows with an operand that runs along the result.
//
// For few rows it is read where it lies. For many it is first laid out as strips, through which
// `tile` walks from one end to the other, in the nearest cache; the left operand is read where it
// lies, along the sum. A leading dimension (`ld`) is a stride in elements.

#pragma once

#include "native_vectors.h"

namespace {

constexpr int ROWS = TILE / 3;  // of a tile
constexpr Size SHALLOW = 64;    // rows of an operand between two visits of the result, where it lies
constexpr Size DEPTH = 256;     // the same in strips
constexpr Size WIDTH = 96;      // columns that are laid out as strips at once
constexpr Size APART = 16;      // values between rows of own memory, see `RunRows`

// The left operand: element k of row m is rows[m][first + k * step].
struct Left {
  const float* const* rows;
  Size first, step;
};

// Where a product goes; with `add`, what it is added to.
template <class C>
struct Result {
  C* data;
  Size ld;
  bool add;
  Result at(Size row, Size column) const { return {data + row * ld + column, ld, add}; }
};

// result[m][c] (+)= Σ_k left[m][k] b[k][c] for M rows and V vectors of columns, of which a single
// one may be a PART with `some` columns.
template <int M, int V, bool PART, class B, class C>
KERNEL tile(const Left& left, const B* b, Size ld, Size depth, const Result<C>& result,
            Size some) {
  const Size count = PART ? some : LANES, step = left.step;
  C* out = result.data;
  Vector total[M][V] = {};
  const float* row[M];
  UNROLLED (int m = 0; m < M; ++m) row[m] = left.rows[m] + left.first;
  if (result.add)
    UNROLLED (int m = 0; m < M; ++m)
      UNROLLED (int v = 0; v < V; ++v)
        total[m][v] = load_some(out + m * result.ld + v * LANES, count);
  for (Size k = 0; k < depth; ++k, b += ld) {
    Vector column[V];
    UNROLLED (int v = 0; v < V; ++v) column[v] = kept(load_some(b + v * LANES, count));
    UNROLLED (int m = 0; m < M; ++m) {
      const Vector value = splat(row[m][k * step]);
      UNROLLED (int v = 0; v < V; ++v) total[m][v] += value * column[v];
    }
  }
  UNROLLED (int m = 0; m < M; ++m)
    UNROLLED (int v = 0; v < V; ++v)
      store_some(out + m * result.ld + v * LANES, total[m][v], count);
}

// The same for any number of columns.
template <int M, class B, class C>
void tiles_of_rows(const Left& left, const B* b, Size ld, Size columns, Size depth,
                   const Result<C>& out) {
  constexpr int V = TILE == 12 ? (M == 1 ? 8 : M == 2 ? 4 : 3) : M <= 2 ? 8 : M <= 4 ? 6 : 3;
  Size c = 0;
  for (; c + V * LANES <= columns; c += V * LANES)
    tile<M, V, false>(left, b + c, ld, depth, out.at(0, c), 0);
  for (; c + LANES <= columns; c += LANES)
    tile<M, 1, false>(left, b + c, ld, depth, out.at(0, c), 0);
  if (c < columns) tile<M, 1, true>(left, b + c, ld, depth, out.at(0, c), columns - c);
}

// The same for m rows, ROWS at most.
template <class B, class C>
void tiles_of(Size m, const Left& left, const B* b, Size ld, Size columns, Size depth,
              const Result<C>& out) {
  switch (m) {
    case 1: return tiles_of_rows<1>(left, b, ld, columns, depth, out);
    case 2: return tiles_of_rows<2>(left, b, ld, columns, depth, out);
    case 3: return tiles_of_rows<3>(left, b, ld, columns, depth, out);
    case 4: return tiles_of_rows<4>(left, b, ld, columns, depth, out);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 5: return tiles_of_rows<5>(left, b, ld, columns, depth, out);
    case 6: return tiles_of_rows<6>(left, b, ld, columns, depth, out);
    case 7: return tiles_of_rows<7>(left, b, ld, columns, depth, out);
    case 8: return tiles_of_rows<8>(left, b, ld, columns, depth, out);
#endif
  }
}

// Vectors of the next strip for so many columns: three, or two where a single one would be left
// over, whose products would keep the CPU waiting for each other.
inline Size vectors_of_strip(Size columns) {
  const Size vectors = ceil_div(columns, LANES);
  return vectors == 4 ? 2 : std::min<Size>(vectors, 3);
}

// Calls `step(first column, vectors, columns)` for each strip. It lies, one row after another and
// filled up to whole vectors, behind those of the columns before.
template <class Step>
inline void each_strip(Size columns, Step step) {
  for (Size c = 0, vectors; c < columns; c += vectors * LANES) {
    vectors = vectors_of_strip(columns - c);
    step(c, vectors, std::min<Size>(columns - c, vectors * LANES));
  }
}

// Strips of a matrix (depth, columns).
template <class T>
void strips_of_rows(const T* from, Size ld, Size columns, Size depth, float* strips) {
  constexpr Size AHEAD = 8;  // rows lie apart, so that the CPU does not see the next one coming
  for (Size k = 0; k < depth; ++k) {
    if (k + AHEAD < depth) fetch(from + (k + AHEAD) * ld, columns);
    each_strip(columns, [&](Size c, Size vectors, Size count) {
      float* to = strips + c * depth + k * vectors * LANES;
      for (Size i = 0; i < count; i += LANES)
        store(to + i, load_some(from + k * ld + c + i, std::min<Size>(count - i, LANES)));
    });
  }
}

// to[c][r] = from[r][c] for eight rows and eight columns.
inline void transpose_eight(const float* from, Size ld, float* to, Size ld_to) {
#if defined(__AVX__)
  __m256 row[8], two[8], four[8];
  UNROLLED (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * ld);
  UNROLLED (int i = 0; i < 8; i += 2) {
    two[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    two[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  UNROLLED (int i = 0; i < 8; i += 4)
    UNROLLED (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0x44);
      four[i + 2 * j + 1] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0xee);
    }
  UNROLLED (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * ld_to, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ld_to, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
  }
#else
  for (Size c = 0; c < 8; ++c)
    for (Size r = 0; r < 8; ++r) to[c * ld_to + r] = from[r * ld + c];
#endif
}

// to[c][r] = from[r][c].
inline void transpose(const float* from, Size ld, Size rows, Size columns, float* to, Size ld_to) {
  for (Size r = 0; r < rows; r += 8)
    for (Size c = 0; c < columns; c += 8) {
      const float* block = from + r * ld + c;
      float* turned = to + c * ld_to + r;
      const Size high = std::min<Size>(rows - r, 8), wide = std::min<Size>(columns - c, 8);
      if (c % 16 == 0)  // a line of the cache; rows lie apart, the CPU does not see these coming
        for (Size j = 8; j < std::min<Size>(16, rows - r); ++j) __builtin_prefetch(block + j * ld);
      if (high == 8 && wide == 8) {
        transpose_eight(block, ld, turned, ld_to);
      } else {
        for (Size i = 0; i < wide; ++i)
          for (Size j = 0; j < high; ++j) turned[i * ld_to + j] = block[j * ld + i];
      }
    }
}

// Strips of a matrix that is given transposed, (columns, depth); at most DEPTH.
template <class T>
void strips_of_columns(const T* from, Size ld, Size columns, Size depth, float* strips) {
  each_strip(columns, [&](Size c, Size vectors, Size count) {
    const Size width = vectors * LANES;
    float* strip = strips + c * depth;
    if (count < width) std::fill(strip, strip + width * depth, 0.f);
    if constexpr (std::is_same_v<T, float>) {
      transpose(from + c * ld, ld, count, depth, strip, width);
    } else {
      float rows[8 * DEPTH];
      for (Size i = 0; i < count; i += 8) {
        const Size some = std::min<Size>(count - i, 8);
        for (Size j = 0; j < some; ++j) copy(from + (c + i + j) * ld, depth, rows + j * DEPTH);
        transpose(rows, DEPTH, some, depth, strip + i, width);
      }
    }
  });
}

// Pointers to rows of a matrix.
template <int MOST>
class Pointers {
 public:
  Pointers(Size count, const float* first, Size ld) {
    for (Size i = 0; i < count; ++i) rows_[i] = first + i * ld;
  }
  const float* const* get() const { return rows_; }

 private:
  const float* rows_[MOST];
};

// Multiplies m rows with a strip, ROWS of them or a few less at a time.
template <int V>
void tiles_of_strip(Size m, Left left, const float* strip, Size depth, const Result<float>& out) {
  constexpr Size WIDTH = V * LANES;
  const Size some = ceil_div(m, ceil_div(m, ROWS));
  for (Size i = 0; i < m; i += some, left.rows += some) {
    const Result<float> to = out.at(i, 0);
    switch (std::min(some, m - i)) {
      case 1: tile<1, V, false>(left, strip, WIDTH, depth, to, 0); break;
      case 2: tile<2, V, false>(left, strip, WIDTH, depth, to, 0); break;
      case 3: tile<3, V, false>(left, strip, WIDTH, depth, to, 0); break;
      case 4: tile<4, V, false>(left, strip, WIDTH, depth, to, 0); break;
#if defined(__AVX512F__) || defined(__aarch64__)
      case 5: tile<5, V, false>(left, strip, WIDTH, depth, to, 0); break;
      case 6: tile<6, V, false>(left, strip, WIDTH, depth, to, 0); break;
      case 7: tile<7, V, false>(left, strip, WIDTH, depth, to, 0); break;
      case 8: tile<8, V, false>(left, strip, WIDTH, depth, to, 0); break;
#endif
    }
  }
}

// out[m][c] (+)= Σ_k left[m][k] b[k][c] for any number of rows, and b in strips.
inline void multiply_strips(Size m, const Left& left, const float* strips, Size columns,
                            Size depth, const Result<float>& out, Scratch<float>& memory) {
  each_strip(columns, [&](Size c, Size vectors, Size count) {
    const Size width = vectors * LANES;
    const bool whole = count == width;
    Result<float> to = out.at(0, c);
    if (!whole) {
      to = {memory.get(m * width), width, out.add};
      if (out.add)
        for (Size i = 0; i < m; ++i) std::copy_n(out.at(i, c).data, count, to.at(i, 0).data);
    }
    const float* strip = strips + c * depth;
    if (vectors == 1) tiles_of_strip<1>(m, left, strip, depth, to);
    if (vectors == 2) tiles_of_strip<2>(m, left, strip, depth, to);
    if (vectors == 3) tiles_of_strip<3>(m, left, strip, depth, to);
    if (!whole)
      for (Size i = 0; i < m; ++i) std::copy_n(to.at(i, 0).data, count, out.at(i, c).data);
  });
}

}  // namespace

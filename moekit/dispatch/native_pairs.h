// Products of bfloat16 by the instruction that multiplies and adds two neighbours at once.
//
// The two lie side by side along the sum, a `Pair`. Of the right operand a panel of 64 results is
// laid out pair by pair, so that a vector holds one pair of each of 16 results; of the left one
// a pair at a time is broadcast. Nothing is then left to be summed across a vector, and 24
// accumulators keep the two units of the CPU busy. Making a panel costs about what one row costs
// to multiply with it.

#pragma once

#include "native_dots.h"

namespace {

// Rows of an expert from which on panels pay, measured: forward, where they are transposed, and
// backward.
constexpr Size PAIRED_ROWS = 40, PAIRED_ROWS_BACK = 12;

using Pair = std::uint32_t;

#if defined(__AVX512BF16__)

constexpr int TALL = DOT_ROWS;          // rows of a tile
constexpr Size WIDE = BLOCK<bfloat16>;  // columns of a tile and of a right panel
constexpr Size LEFT = LANES;            // pairs side by side in a left panel

// out[m][c] = Σ_k left[m][k] · panel[k][c] for M rows and V vectors of columns, of which the last
// has `count`. The pairs of row m are `step` pairs apart from left[m] on.
template <int M, int V, class T, class C>
KERNEL pair_tile(const T* const* left, Size step, const Pair* panel, Size pairs, C* out,
                 Size ld_out, Size count) {
  __m512 total[M][V];
  UNROLLED (int m = 0; m < M; ++m)
    UNROLLED (int v = 0; v < V; ++v) total[m][v] = _mm512_setzero_ps();
  for (Size k = 0; k < pairs; ++k) {
    __m512bh right[V];
    UNROLLED (int v = 0; v < V; ++v)
      right[v] = (__m512bh)_mm512_loadu_si512(panel + k * WIDE + v * LANES);
    UNROLLED (int m = 0; m < M; ++m) {
      int pair;
      std::memcpy(&pair, reinterpret_cast<const char*>(left[m]) + k * step * sizeof(Pair),
                  sizeof pair);
      const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
      UNROLLED (int v = 0; v < V; ++v) total[m][v] = _mm512_dpbf16_ps(total[m][v], row, right[v]);
    }
  }
  UNROLLED (int m = 0; m < M; ++m) {
    UNROLLED (int v = 0; v < V - 1; ++v) store(out + m * ld_out + v * LANES, (Vector)total[m][v]);
    store_some(out + m * ld_out + (V - 1) * LANES, (Vector)total[m][V - 1], count);
  }
}

template <int M, class T, class C>
void pair_tiles_of_rows(const T* const* left, Size step, const Pair* panel, Size pairs,
                        Size columns, C* out, Size ld_out) {
  const Size last = (columns - 1) % LANES + 1;
  switch (ceil_div(columns, LANES)) {
    case 1: return pair_tile<M, 1>(left, step, panel, pairs, out, ld_out, last);
    case 2: return pair_tile<M, 2>(left, step, panel, pairs, out, ld_out, last);
    case 3: return pair_tile<M, 3>(left, step, panel, pairs, out, ld_out, last);
    default: return pair_tile<M, 4>(left, step, panel, pairs, out, ld_out, last);
  }
}

// The same for `rows` of up to TALL rows and `columns` of up to WIDE columns.
template <class T, class C>
void pair_tiles(Size rows, const T* const* left, Size step, const Pair* panel, Size pairs,
                Size columns, C* out, Size ld_out) {
  switch (rows) {
    case 1: return pair_tiles_of_rows<1>(left, step, panel, pairs, columns, out, ld_out);
    case 2: return pair_tiles_of_rows<2>(left, step, panel, pairs, columns, out, ld_out);
    case 3: return pair_tiles_of_rows<3>(left, step, panel, pairs, columns, out, ld_out);
    case 4: return pair_tiles_of_rows<4>(left, step, panel, pairs, columns, out, ld_out);
    case 5: return pair_tiles_of_rows<5>(left, step, panel, pairs, columns, out, ld_out);
    case 6: return pair_tiles_of_rows<6>(left, step, panel, pairs, columns, out, ld_out);
  }
}

// The same for any number of rows, one pair after another, with WIDE places a row of results.
template <class T, class C>
void pair_tiles_of_group(Size rows, const T* const* left, const Pair* panel, Size pairs,
                         Size columns, C* out) {
  for (Size r = 0; r < rows; r += TALL)
    pair_tiles(std::min<Size>(rows - r, TALL), left + r, 1, panel, pairs, columns, out + r * WIDE,
               WIDE);
}

// 16 pairs of each of 16 rows, from one row after another to one pair after another.
inline void transposed(__m512i* row) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    row[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    row[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

// The panel of up to WIDE weights whose rows run along the sum, of even depth.
inline void panel_of_rows(const bfloat16* weight, Size ld, Size count, Size depth, Pair* panel) {
  for (Size c = 0; c < count; c += LANES)
    for (Size k = 0; k < depth / 2; k += LANES) {
      const Size some = std::min<Size>(depth / 2 - k, LANES);
      const __mmask16 mask = __mmask16((1u << some) - 1);
      __m512i rows[16];
      for (int i = LANES; i < 2 * LANES; ++i)  // the next ones
        __builtin_prefetch(weight + (c + i) * ld + 2 * k);
      for (int i = 0; i < LANES; ++i)
        rows[i] = c + i < count ? _mm512_maskz_loadu_epi32(mask, weight + (c + i) * ld + 2 * k)
                                : _mm512_setzero_si512();
      transposed(rows);
      for (Size i = 0; i < some; ++i) _mm512_storeu_si512(panel + (k + i) * WIDE + c, rows[i]);
    }
}

// Two values a place, from two rows.
inline __m512i paired(Vector first, Vector second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The same of `count` values as they lie; a missing row is zero.
inline __m512i paired(const bfloat16* first, const bfloat16* second, Size count) {
  const __mmask16 mask = __mmask16((1u << count) - 1);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
  if (!second) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The panel of up to WIDE columns of `depth` rows, an even number.
inline void panel_of_columns(const bfloat16* weight, Size ld, Size count, Size depth, Pair* panel) {
  constexpr Size AHEAD = 32;  // rows
  for (Size k = 0; k < depth; k += 2) {
    fetch(weight + (k + AHEAD) * ld, count);
    fetch(weight + (k + AHEAD + 1) * ld, count);
    for (Size c = 0; c < count; c += LANES)
      _mm512_storeu_si512(
          panel + k / 2 * WIDE + c,
          paired(weight + k * ld + c, weight + (k + 1) * ld + c, std::min<Size>(count - c, LANES)));
  }
}

// Rows of some experts as panels for a sum over rows: pairs of neighbouring rows, WIDTH columns
// wide. An odd last row of an expert stands beside zeros.
template <Size WIDTH>
struct Panels {
  Pair* data;
  Size blocks;
  const Size* start;            // first row of each expert
  Size first_row, first_expert; // where those that are held begin

  static Room<Pair> room(Size rows, Size experts, Size columns) {
    const Size pairs = rows / 2 + experts + 1;
    return Room<Pair>(pairs * ceil_div(columns, WIDTH) * WIDTH);
  }

  Size pairs(Size e) const { return (start[e + 1] - start[e] + 1) / 2; }
  Pair* panel(Size e, Size block) const {
    const Size before = (start[e] - first_row) / 2 + e - first_expert;  // or a few fewer
    return data + (before * blocks + block * pairs(e)) * WIDTH;
  }
  // LANES columns from `column` on, a multiple of LANES, of pair `p` of an expert.
  void put(Size e, Size p, Size column, __m512i values) const {
    _mm512_storeu_si512(panel(e, column / WIDTH) + p * WIDTH + column % WIDTH, values);
  }
};

#endif

}  // namespace

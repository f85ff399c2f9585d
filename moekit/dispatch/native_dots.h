// Dot products of a few rows with a few weights, of which both run along the sum.
//
// Nothing is laid out anew, so that weights are read once, where they lie. A leading dimension
// (`ld`) is a stride in elements.

#pragma once

#include "native_vectors.h"

namespace {

constexpr int DOT_ROWS = TILE / 4;   // rows of a block of dots
constexpr int GROUP = 8 * DOT_ROWS;  // rows that pass by weights in the nearest cache
// Bytes of a row between two visits of a sum, and of weights in an item of work.
#if defined(__AVX512F__)
constexpr Size ROW_BYTES = 1 << 12, BLOCK_BYTES = 1 << 20;
#else
constexpr Size ROW_BYTES = 1 << 11, BLOCK_BYTES = 1 << 18;
#endif

// Results a row of dots in an item of work, at most, by the type of the operands.
template <class T>
constexpr Size BLOCK = 48;
#if defined(__AVX512BF16__)
template <>
constexpr Size BLOCK<bfloat16> = 64;
#endif

// What one step of a dot product takes from rows of type T and from weights.
template <class T>
struct Steps {
  static constexpr int WIDTH = LANES;
  template <class W>
  static Vector take(const W* from) { return kept(load(from)); }
  static Vector add(Vector total, Vector a, Vector b) { return total + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Steps<bfloat16> {
  static constexpr int WIDTH = 2 * LANES;
  static __m512bh take(const bfloat16* from) { return kept((__m512bh)_mm512_loadu_si512(from)); }
  static Vector add(Vector total, __m512bh a, __m512bh b) {
    return (Vector)_mm512_dpbf16_ps((__m512)total, a, b);
  }
};
#endif

// The sums of four vectors, side by side.
inline Four sums(const Vector* four) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)four[0], b = (__m512)four[1], c = (__m512)four[2], d = (__m512)four[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX__)
  const __m256 a = (__m256)four[0], b = (__m256)four[1], c = (__m256)four[2], d = (__m256)four[3];
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  return Four{sum(four[0]), sum(four[1]), sum(four[2]), sum(four[3])};
#endif
}

// A part of a sum, elements `first` to `last`, over weights that lie `ld` apart, with results that
// lie `apart` from each other; meanwhile what is at `ahead` is asked for, in steps of so many bytes.
template <class W>
struct Dots {
  const W* weight;
  Size ld, first, last;
  Size apart = 1;
  const char* ahead = nullptr;
  Size step = 0;
};

// Adds to out[m][v], a BLOCK a row, the elements from `first` on, too few for a step.
template <class T, class W>
void add_rest(int m, int v, const T* const* rows, const Dots<W>& part, Size first, float* out) {
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < v; ++j)
      for (Size k = first; k < part.last; ++k)
        out[i * BLOCK<T> + j * part.apart] += number(rows[i][k]) * number(part.weight[j * part.ld + k]);
}

// Four results, added to what is there or not.
inline void put(Four four, bool added, Size apart, float* to) {
  if (apart > 1) {
    for (int i = 0; i < 4; ++i) to[i * apart] = four[i] + (added ? to[i * apart] : 0.f);
    return;
  }
  if (added) {
    Four before;
    std::memcpy(&before, to, sizeof before);
    four += before;
  }
  std::memcpy(to, &four, sizeof four);
}

// out[m][v] (+)= row m · weight v, for M rows and V weights; from the second part of a sum on it is
// added to. FETCH lines of the cache are asked for at each step.
template <int M, int V, int FETCH, class T, class W>
KERNEL dots(const T* const* rows, const Dots<W>& part, float* out) {
  using S = Steps<T>;
  Vector total[M][V] = {};
  const char* ahead = part.ahead;
  Size k = part.first;
  for (; k + S::WIDTH <= part.last; k += S::WIDTH) {
    decltype(S::take(rows[0])) row[M];
    UNROLLED (int m = 0; m < M; ++m) row[m] = S::take(rows[m] + k);
    UNROLLED (int i = 0; i < FETCH; ++i) __builtin_prefetch(ahead + i * 64);
    if constexpr (FETCH > 0) ahead += part.step;
    UNROLLED (int v = 0; v < V; ++v) {
      const auto weight = S::take(part.weight + v * part.ld + k);
      UNROLLED (int m = 0; m < M; ++m) total[m][v] = S::add(total[m][v], row[m], weight);
    }
  }
  UNROLLED (int m = 0; m < M; ++m) {
    float* to = out + m * BLOCK<T>;
    if constexpr (V % 4 == 0) {
      UNROLLED (int v = 0; v < V; v += 4) {
        put(sums(total[m] + v), part.first > 0, part.apart, to + v * part.apart);
      }
    } else {
      UNROLLED (int v = 0; v < V; ++v) {
        float& result = to[v * part.apart];
        result = sum(total[m][v]) + (part.first ? result : 0.f);
      }
    }
  }
  if (k < part.last) add_rest(M, V, rows, part, k, out);
}

// The same for `m` rows, of M and up to as many as there are accumulators for.
template <int V, int FETCH, int M = 1, class T, class W>
void one_pass(Size m, const T* const* rows, const Dots<W>& part, float* out) {
  if (m == M) return dots<M, V, FETCH>(rows, part, out);
  if constexpr (M < DOT_ROWS && (M + 1) * V <= TILE) one_pass<V, FETCH, M + 1>(m, rows, part, out);
}

// Lines of the cache that V weights fill in a step.
template <int V, class T, class W>
constexpr Size LINES = ceil_div(V * Steps<T>::WIDTH * sizeof(W), 64);

// The dots of any number of rows with V weights. In each pass over the rows the same weights are in
// the nearest cache, and the next ones are asked for, a line now and then: asked for at once, they
// would keep the CPU from going on.
template <int V, class T, class W>
void passes(Size m, const T* const* rows, const W* weight, Size ld, Size depth, const W* next,
            float* out) {
  const Size count = ceil_div(m, DOT_ROWS), some = ceil_div(m, count);
  const Size step = V * Steps<T>::WIDTH * sizeof(W) / count;
  constexpr Size DEEP = ROW_BYTES / sizeof(T);
  for (Size first = 0; first < depth; first += DEEP) {
    const Size last = std::min(depth, first + DEEP);
    const Size bytes = V * (last - first) * sizeof(W);
    const char* ahead = reinterpret_cast<const char*>(next + V * first);
    for (Size i = 0, pass = 0; i < m; i += some, ++pass) {
      const Dots<W> part = {weight, ld, first, last, 1, ahead + bytes * pass / count, step};
      const Size rest = std::min(some, m - i);
      float* to = out + i * BLOCK<T>;
      if (count > 1) {
        one_pass<V, ceil_div(LINES<V, T, W>, 2)>(rest, rows + i, part, to);
      } else {
        one_pass<V, LINES<V, T, W>>(rest, rows + i, part, to);
      }
    }
  }
}

// The dots of rows, TILE / V at most, with the first weights of V parts, the second ones, and so on;
// returns how many weights this are. They pass by once, from memory: a CPU reads ahead where a few
// streams each run on for long, and little where rows that lie side by side are read at once.
template <int V, class T, class W>
Size streams(Size m, const T* const* rows, const W* weight, Size ld, Size count, Size depth,
             float* out) {
  const Size apart = count / V;
  for (Size v = 0; v < apart; ++v)
    one_pass<V, 0>(m, rows, Dots<W>{weight + v * ld, apart * ld, 0, depth, apart}, out + v);
  return apart * V;
}

// Bytes of weights from which on a stream is long.
constexpr Size LONG = 2048;

// The dots of m rows with `count` weights, at most a BLOCK of them. Those at `after` will be next.
template <class T, class W>
void dots_of(Size m, const T* const* rows, const W* weight, Size ld, Size count, Size depth,
             const W* after, float* out) {
  const auto next = [&](Size v) { return v < count ? weight + v * ld : after; };
  const bool by_eight = m * 8 <= TILE;
  Size v = 0;
  if (m <= DOT_ROWS && count / 8 * depth * Size(sizeof(W)) >= LONG) {
    if (by_eight) v = streams<8>(m, rows, weight, ld, count, depth, out);
    v += streams<4>(m, rows, weight + v * ld, ld, count - v, depth, out + v);
  }
  for (; by_eight && v + 8 <= count; v += 8)
    passes<8>(m, rows, weight + v * ld, ld, depth, next(v + 8), out + v);
  for (; v + 4 <= count; v += 4)
    passes<4>(m, rows, weight + v * ld, ld, depth, next(v + 4), out + v);
  for (; v < count; ++v) passes<1>(m, rows, weight + v * ld, ld, depth, next(v + 1), out + v);
}

}  // namespace

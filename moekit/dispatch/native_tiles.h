// Vectors, and products of a few rows with a few columns.
//
// Two kernels serve all six products of a training step. `dots` is for rows Wᵀ, where both operands
// run along the sum, and ends in horizontal sums. `tile` is for the others, where the right operand
// runs along the result. Sums are in float32. A leading dimension (`ld`) is a stride in elements.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using Size = std::int64_t;

inline Size ceil_div(Size a, Size b) { return (a + b - 1) / b; }

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE = 24;  // accumulators, of 32 registers
#elif defined(__aarch64__)
constexpr int LANES = 4;
constexpr int TILE = 24;
#else
constexpr int LANES = 8;
constexpr int TILE = 12;  // of 16
#endif
constexpr int ROWS = TILE / 3;      // rows of a tile
constexpr int DOT_ROWS = TILE / 4;  // rows of a block of dots
constexpr Size DEPTH = 64;          // of a sum, between two visits of its result
constexpr Size TOKENS = 128;        // the same for weight gradients
constexpr Size CHUNK = 512;         // results a row in an item of work of `tile`

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef std::int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef std::uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
  std::uint16_t bits;
};

// Results a row that an item of work holds in the cache, by the type of the weights.
template <class T>
constexpr Size BLOCK = 48;
#if defined(__AVX512BF16__)
template <>
constexpr Size BLOCK<bfloat16> = 64;
#endif

// Room for `count` values that starts where a line of the cache does.
template <class T>
class Room {
 public:
  explicit Room(Size count = 0) : lines_(new Line[ceil_div(count, PER_LINE)]) {}
  T* get() const { return lines_[0].values; }

 private:
  static constexpr Size PER_LINE = 64 / sizeof(T);
  struct alignas(64) Line {
    T values[PER_LINE];
  };
  std::unique_ptr<Line[]> lines_;
};

// Asks for `size` values that will be read soon.
template <class T>
inline void fetch(const T* from, Size size) {
  for (Size i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

Vector splat(float value) { return Vector{} + value; }

Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

Vector load(const bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
}

template <class T>
Vector load(const T* from, Size count) {
  T values[LANES] = {};
  std::memcpy(values, from, count * sizeof(T));
  return load(values);
}

void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

void store(bfloat16* to, Vector value) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
#else
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Words quiet = (bits >> 16) | 0x40;                           // a NaN stays one
  const Halves halves = __builtin_convertvector((Words)(value == value ? rounded : quiet), Halves);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

template <class T>
void store(T* to, Vector value, Size count) {
  T values[LANES];
  store(values, value);
  std::memcpy(to, values, count * sizeof(T));
}

// Calls `step(position, count)` for each vector of `size` elements; the last may be part of one.
template <class Step>
inline void each_vector(Size size, Step step) {
  Size i = 0;
  for (; i + LANES <= size; i += LANES) step(i, Size(LANES));
  if (i < size) step(i, size - i);
}

template <class T>
inline Vector load_some(const T* from, Size count) {
  return count == LANES ? load(from) : load(from, count);
}

template <class T>
inline void store_some(T* to, Vector value, Size count) {
  if (count == LANES) {
    store(to, value);
  } else {
    store(to, value, count);
  }
}

float sum(Vector value) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += value[i];
  return total;
}

// e to the power of x to about two units in the last place.
Vector exponential(Vector x) {
  x = x > splat(88.f) ? splat(88.f) : x;
  x = x < splat(-87.f) ? splat(-87.f) : x;
  const Vector shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer
  const Vector whole = shifted - 12582912.f;
  const Vector part = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector power = splat(1.f / 5040);
  power = power * part + 1.f / 720;
  power = power * part + 1.f / 120;
  power = power * part + 1.f / 24;
  power = power * part + 1.f / 6;
  power = power * part + 0.5f;
  power = power * part + 1.f;
  power = power * part + 1.f;
  const Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
  return power * (Vector)exponent;
}

// 1 / x to about one unit in the last place.
inline Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
  const Vector near = (Vector)_mm512_rcp14_ps((__m512)x);
  return near * (2.f - x * near);  // one step of Newton's doubles its 14 bits
#else
  return 1.f / x;
#endif
}

inline Vector sigmoid(Vector x, float) { return reciprocal(1.f + exponential(-x)); }

// The same to about four digits, more than bfloat16 holds.
inline Vector sigmoid(Vector x, bfloat16) {
#if defined(__AVX512F__)
  const __m512 power = (__m512)(x * -1.44269504f), whole = _mm512_roundscale_ps(power, 0);
  const Vector part = (Vector)_mm512_sub_ps(power, whole);  // -1/2 to 1/2
  Vector two_to = splat(0.00956051f);
  two_to = two_to * part + 0.05591704f;
  two_to = two_to * part + 0.24024981f;
  two_to = two_to * part + 0.69312197f;
  two_to = two_to * part + 0.99999919f;
  return (Vector)_mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.f),
                                               _mm512_scalef_ps((__m512)two_to, whole)));
#else
  return sigmoid(x, 0.f);
#endif
}

// What one step of a dot product takes from each operand.
template <class T>
struct Steps {
  static constexpr int WIDTH = LANES;
  using Operand = Vector;
  static Operand take(const T* from) { return load(from); }
  static Operand take(const T* from, Size count) { return load(from, count); }
  static Vector add(Vector total, Operand a, Operand b) { return total + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Steps<bfloat16> {
  static constexpr int WIDTH = 2 * LANES;
  using Operand = __m512bh;
  static Operand take(const bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Operand take(const bfloat16* from, Size count) {
    bfloat16 values[WIDTH] = {};
    std::memcpy(values, from, count * sizeof(bfloat16));
    return take(values);
  }
  static Vector add(Vector total, Operand a, Operand b) {
    return (Vector)_mm512_dpbf16_ps((__m512)total, a, b);
  }
};
#endif

// The sums of four vectors, side by side.
inline void sums(const Vector* four, float* out) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)four[0], b = (__m512)four[1], c = (__m512)four[2], d = (__m512)four[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(four[i]);
#endif
}

// out[m][v] = row m · weight v, for M rows and V weights.
template <int M, int V, class T>
inline void dots(const T* const* rows, const T* weight, Size ld, Size depth, float* out) {
  using S = Steps<T>;
  Vector total[M][V] = {};
  Size k = 0;
  for (; k + S::WIDTH <= depth; k += S::WIDTH) {
    typename S::Operand w[V];
    for (int v = 0; v < V; ++v) {
      if constexpr (M >= 4) __builtin_prefetch(weight + (v + V) * ld + k);  // the next ones
      w[v] = S::take(weight + v * ld + k);
    }
    for (int m = 0; m < M; ++m) {
      const typename S::Operand row = S::take(rows[m] + k);
      for (int v = 0; v < V; ++v) total[m][v] = S::add(total[m][v], row, w[v]);
    }
  }
  if (k < depth) {
    for (int v = 0; v < V; ++v) {
      const typename S::Operand w = S::take(weight + v * ld + k, depth - k);
      for (int m = 0; m < M; ++m)
        total[m][v] = S::add(total[m][v], S::take(rows[m] + k, depth - k), w);
    }
  }
  for (int m = 0; m < M; ++m) {
    if constexpr (V % 4 == 0) {
      for (int v = 0; v < V; v += 4) sums(total[m] + v, out + m * BLOCK<T> + v);
    } else {
      for (int v = 0; v < V; ++v) out[m * BLOCK<T> + v] = sum(total[m][v]);
    }
  }
}

// The dots of M rows with `count` weights, at most a BLOCK of them.
template <int M, class T>
void dots_of_rows(const T* const* rows, const T* weight, Size ld, Size count, Size depth,
                  float* out) {
  constexpr int V = M * 8 <= TILE ? 8 : 4;
  Size v = 0;
  for (; v + V <= count; v += V) dots<M, V>(rows, weight + v * ld, ld, depth, out + v);
  for (; v + 4 <= count; v += 4) dots<M, 4>(rows, weight + v * ld, ld, depth, out + v);
  for (; v < count; ++v) dots<M, 1>(rows, weight + v * ld, ld, depth, out + v);
}

template <class T>
void dots_of(int m, const T* const* rows, const T* weight, Size ld, Size count, Size depth,
             float* out) {
  switch (m) {
    case 1: return dots_of_rows<1>(rows, weight, ld, count, depth, out);
    case 2: return dots_of_rows<2>(rows, weight, ld, count, depth, out);
    case 3: return dots_of_rows<3>(rows, weight, ld, count, depth, out);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4: return dots_of_rows<4>(rows, weight, ld, count, depth, out);
    case 5: return dots_of_rows<5>(rows, weight, ld, count, depth, out);
    case 6: return dots_of_rows<6>(rows, weight, ld, count, depth, out);
#endif
  }
}

// out[m][c] (+)= Σ_k a[m][k] b[k][c] for M rows and V vectors of columns; `count` < LANES only for
// part of a single vector. `a` has the strides (am, ak).
template <int M, int V, class B, class C>
inline void tile(const float* a, Size am, Size ak, const B* b, Size ld, Size depth, C* out,
                 Size ld_out, bool add, Size count = LANES) {
  Vector total[M][V] = {};
  if (add)
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v)
        total[m][v] = load_some(out + m * ld_out + v * LANES, count);
  for (Size k = 0; k < depth; ++k) {
    Vector column[V];
    for (int v = 0; v < V; ++v) column[v] = load_some(b + k * ld + v * LANES, count);
    for (int m = 0; m < M; ++m) {
      const Vector row = splat(a[m * am + k * ak]);
      for (int v = 0; v < V; ++v) total[m][v] += row * column[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store_some(out + m * ld_out + v * LANES, total[m][v], count);
}

template <int M, class B, class C>
void tiles_of_rows(const float* a, Size am, Size ak, const B* b, Size ld, Size columns, Size depth,
                   C* out, Size ld_out, bool add) {
  constexpr int V = M <= 2 ? 8 : TILE / M < 6 ? 3 : 6;
  Size c = 0;
  for (; c + V * LANES <= columns; c += V * LANES)
    tile<M, V>(a, am, ak, b + c, ld, depth, out + c, ld_out, add);
  for (; c + LANES <= columns; c += LANES)
    tile<M, 1>(a, am, ak, b + c, ld, depth, out + c, ld_out, add);
  if (c < columns)
    tile<M, 1>(a, am, ak, b + c, ld, depth, out + c, ld_out, add, columns - c);
}

template <class B, class C>
void tiles_of(Size m, const float* a, Size am, Size ak, const B* b, Size ld, Size columns,
              Size depth, C* out, Size ld_out, bool add) {
  switch (m) {
    case 1: return tiles_of_rows<1>(a, am, ak, b, ld, columns, depth, out, ld_out, add);
    case 2: return tiles_of_rows<2>(a, am, ak, b, ld, columns, depth, out, ld_out, add);
    case 3: return tiles_of_rows<3>(a, am, ak, b, ld, columns, depth, out, ld_out, add);
    case 4: return tiles_of_rows<4>(a, am, ak, b, ld, columns, depth, out, ld_out, add);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 5: return tiles_of_rows<5>(a, am, ak, b, ld, columns, depth, out, ld_out, add);
    case 6: return tiles_of_rows<6>(a, am, ak, b, ld, columns, depth, out, ld_out, add);
    case 7: return tiles_of_rows<7>(a, am, ak, b, ld, columns, depth, out, ld_out, add);
    case 8: return tiles_of_rows<8>(a, am, ak, b, ld, columns, depth, out, ld_out, add);
#endif
  }
}

}  // namespace

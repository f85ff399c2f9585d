// Vectors: as many floats as a register of the CPU holds, and how values become such and back.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// A loop of a fixed, small number of rounds, unrolled before the compiler decides what lives in
// registers.
#define UNROLLED _Pragma("GCC unroll 24") for
// Kernels have all registers for themselves, none for what surrounds their call.
#define KERNEL __attribute__((noinline)) void

namespace {

using Size = std::int64_t;

constexpr Size ceil_div(Size a, Size b) { return (a + b - 1) / b; }

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4;
#else
constexpr int LANES = 8;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE = 24;  // accumulators of a kernel, of 32 registers
#else
constexpr int TILE = 12;  // of 16
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Four __attribute__((vector_size(16)));
typedef std::int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef std::uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
  std::uint16_t bits;
};

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

// Room that a thread of its own uses again and again, and that grows.
template <class T>
class Scratch {
 public:
  T* get(Size count) {
    if (count > size_) room_ = Room<T>(size_ = count);
    return room_.get();
  }

 private:
  Room<T> room_;
  Size size_ = 0;
};

// Asks for `size` values that will be read soon.
template <class T>
inline void fetch(const T* from, Size size) {
  for (Size i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// Less zero, which is the value itself; a sum with zero is none for -0, and is made.
Vector splat(float value) { return value - Vector{}; }

// A value in a register, where the compiler might read memory anew at each use.
template <class T>
inline T kept(T value) {
#if defined(__AVX__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

inline float number(float value) { return value; }
inline float number(bfloat16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

Vector load(const bfloat16* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // which the compiler takes apart
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
#endif
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

// Values in float32.
template <class T>
void copy(const T* from, Size size, float* to) {
  each_vector(size, [&](Size i, Size count) {
    store_some(to + i, load_some(from + i, count), count);
  });
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

}  // namespace

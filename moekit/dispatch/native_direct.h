// What copies and constant experts add to tokens, and its backward pass: one way through the rows
// of tokens, whatever the number of experts.

#pragma once

#include "native_groups.h"

// What Python hands over: FIELDS of moekit/dispatch/direct.py. Tensors have no gaps unless they
// have a leading dimension.
struct DirectCall {
  Size threads, tokens, width, constants;
  const void* x_ND;
  Size x_ld;
  const float *copied_N, *weight_NC;  // null for none
  const void *gap_CD, *constant_CD;
  void* y_ND;  // forward: what is added to
  // Backward.
  const void* grad_ND;
  Size grad_ld;
  void* grad_x_ND;
  float *grad_copied_N, *grad_weight_NC, *grad_gap_CD, *grad_constant_CD;
};

namespace {

template <class T>
float dot(const T* a, const T* b, Size size) {
  constexpr int SUMS = 4;  // that do not wait for each other
  Vector total[SUMS] = {};
  Size i = 0;
  for (; i + SUMS * LANES <= size; i += SUMS * LANES)
    UNROLLED (int s = 0; s < SUMS; ++s)
      total[s] += load(a + i + s * LANES) * load(b + i + s * LANES);
  each_vector(size - i, [&](Size j, Size count) {
    total[0] += load_some(a + i + j, count) * load_some(b + i + j, count);
  });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

inline float sigmoid(float x) { return 1.f / (1.f + exponential(splat(-x))[0]); }

// to += scale · from, in float32.
template <class T>
void add_scaled(float scale, const T* from, Size size, float* to) {
  each_vector(size, [&](Size i, Size count) {
    store_some(to + i, load_some(to + i, count) + scale * load_some(from + i, count), count);
  });
}

template <class T>
void add_direct(const DirectCall& call) {
  const Size width = call.width, constants = call.constants;
  const T* gap_CD = static_cast<const T*>(call.gap_CD);
  const T* constant_CD = static_cast<const T*>(call.constant_CD);
#pragma omp parallel num_threads(call.threads)
  {
    const Room<float> sum_D(width);
#pragma omp for schedule(static)
    for (Size n = 0; n < call.tokens; ++n) {
      const T* x_D = static_cast<const T*>(call.x_ND) + n * call.x_ld;
      const float* weight_C = call.weight_NC + n * constants;
      float scale = call.copied_N ? call.copied_N[n] : 0.f;
      const bool used = std::any_of(weight_C, weight_C + constants, [](float w) { return w != 0; });
      if (!scale && !used) continue;
      std::fill_n(sum_D.get(), width, 0.f);
      for (Size c = 0; c < constants; ++c) {
        if (!weight_C[c]) continue;
        const float kept = weight_C[c] * sigmoid(dot(x_D, gap_CD + c * width, width));
        scale += kept;
        add_scaled(weight_C[c] - kept, constant_CD + c * width, width, sum_D.get());
      }
      T* y_D = static_cast<T*>(call.y_ND) + n * width;
      each_vector(width, [&](Size d, Size count) {
        const Vector added = load_some(sum_D.get() + d, count) + scale * load_some(x_D + d, count);
        store_some(y_D + d, load_some(y_D + d, count) + added, count);
      });
    }
  }
}

// A chunk of tokens through the backward pass; their share of the gradients of gaps and constants is
// added to `grad_gap_CD` and `grad_constant_CD`.
template <class T>
void chunk_backward(const DirectCall& call, Size first, Size last, float* sum_D,
                    float* grad_gap_CD, float* grad_constant_CD) {
  const Size width = call.width, constants = call.constants;
  for (Size n = first; n < last; ++n) {
    const T* x_D = static_cast<const T*>(call.x_ND) + n * call.x_ld;
    const T* grad_D = static_cast<const T*>(call.grad_ND) + n * call.grad_ld;
    const float of_scale = dot(grad_D, x_D, width);
    float scale = call.copied_N ? call.copied_N[n] : 0.f;
    if (call.grad_copied_N) call.grad_copied_N[n] = of_scale;
    std::fill_n(sum_D, width, 0.f);
    for (Size c = 0; c < constants; ++c) {
      const T* gap_D = static_cast<const T*>(call.gap_CD) + c * width;
      const T* constant_D = static_cast<const T*>(call.constant_CD) + c * width;
      const float weight = call.weight_NC[n * constants + c];
      const float share = sigmoid(dot(x_D, gap_D, width));
      const float of_rest = dot(grad_D, constant_D, width);
      call.grad_weight_NC[n * constants + c] = share * of_scale + (1.f - share) * of_rest;
      if (!weight) continue;
      const float of_gap = weight * share * (1.f - share) * (of_scale - of_rest);
      scale += weight * share;
      add_scaled(of_gap, gap_D, width, sum_D);
      add_scaled(of_gap, x_D, width, grad_gap_CD + c * width);
      add_scaled(weight * (1.f - share), grad_D, width, grad_constant_CD + c * width);
    }
    T* grad_x_D = static_cast<T*>(call.grad_x_ND) + n * width;
    each_vector(width, [&](Size d, Size count) {
      store_some(grad_x_D + d,
                 load_some(sum_D + d, count) + scale * load_some(grad_D + d, count), count);
    });
  }
}

// Gradients of gaps and constants are summed over chunks of tokens and then over these, in one
// order for any number of threads.
template <class T>
void direct_backward(const DirectCall& call) {
  constexpr Size CHUNK = 256;
  const Size size = call.constants * call.width, chunks = ceil_div(call.tokens, CHUNK);
  const Room<float> parts(2 * chunks * size);  // of gaps and constants in turn
#pragma omp parallel num_threads(call.threads)
  {
    const Room<float> sum_D(call.width);
#pragma omp for schedule(static)
    for (Size chunk = 0; chunk < chunks; ++chunk) {
      float* own = parts.get() + 2 * chunk * size;
      std::fill_n(own, 2 * size, 0.f);
      chunk_backward<T>(call, chunk * CHUNK, std::min(call.tokens, (chunk + 1) * CHUNK),
                        sum_D.get(), own, own + size);
    }
#pragma omp for schedule(static)
    for (Size i = 0; i < size; ++i) {
      float gap = 0.f, constant = 0.f;
      for (Size chunk = 0; chunk < chunks; ++chunk) {
        gap += parts.get()[2 * chunk * size + i];
        constant += parts.get()[(2 * chunk + 1) * size + i];
      }
      call.grad_gap_CD[i] = gap, call.grad_constant_CD[i] = constant;
    }
  }
}

}  // namespace

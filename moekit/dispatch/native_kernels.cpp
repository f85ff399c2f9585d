// The feed-forward pass of a mixture and its backward pass, for CPUs.
//
// Rows are sorted by expert: expert e has the rows start[e] to start[e + 1], each a token's copy in
// name only, since products read tokens where they lie. Every weight is read once, in the layout it
// has, whatever the number of rows; nothing is packed, padded or transposed in memory.
//
// Letters are those of the library: N tokens, K slots a token, R rows, E experts, D width in, J
// width before the activation (2 H), H after it, O width out. Sizes are int64; a leading dimension
// (`ld`) is a stride in elements. Sums are in float32. Threads are OpenMP's; functions with an
// `omp for` are called by all threads of a region, which wait for each other at its end.

#include "native_products.h"

namespace {

// out[n] = Σ_k weight[n][k] rows[place[n][k]]; a slot without a row has place -1.
template <class T>
void combine(Size tokens, Size slots, const Size* place, const float* weight, const float* rows,
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

template <class T>
void gather(Size rows, const Size* assignment, Size slots, const T* x, Size ld, Size columns,
            float* out) {
#pragma omp for schedule(static)
  for (Size r = 0; r < rows; ++r) {
    const T* from = x + assignment[r] / slots * ld;
    each_vector(columns, [&](Size c, Size count) {
      store_some(out + r * columns + c, load_some(from + c, count), count);
    });
  }
}

}  // namespace

// What Python hands over; see moekit/dispatch/native_library.py, whose fields are the same.
struct Call {
  Size threads, tokens, slots, rows, experts, width, hidden, out_width;
  const Size *count_E, *assignment_R;
  const float* weight_NK;
  const void* x_ND;
  Size x_ld;
  const void* up_EJD;
  Size up_expert, up_ld;
  const void* down_EOH;
  Size down_expert, down_ld;
  const void *up_bias_EJ, *down_bias_EO;  // without gaps; null for none
  void* inner_RJ;                         // forward: null if it is not to be kept
  Size *place_NK, *start_E, *used_E;      // room for N K, E + 1 and E
  // Forward.
  void* outer_RH;
  float* out_RO;
  void* y_NO;
  // Backward; the gradients that are not wanted are null.
  const void* grad_NO;
  Size grad_ld;
  float *grad_RO, *rows_RD, *back_RH, *scaled_RH, *back_RJ, *back_RD, *grad_R;
  void *grad_x_ND, *grad_up_EJD, *grad_down_EOH;
};

namespace {

Groups grouped(const Call& call) {
  Size used = 0;
  call.start_E[0] = 0;
  for (Size e = 0; e < call.experts; ++e) {
    call.start_E[e + 1] = call.start_E[e] + call.count_E[e];
    if (call.count_E[e]) call.used_E[used++] = e;
  }
  if (call.rows < call.tokens * call.slots)
    for (Size i = 0; i < call.tokens * call.slots; ++i) call.place_NK[i] = -1;
  for (Size r = 0; r < call.rows; ++r) call.place_NK[call.assignment_R[r]] = r;
  return {call.experts, used, call.start_E, call.used_E};
}

template <class T>
void forward_pass(const Call& call) {
  const Groups groups = grouped(call);
  const T* x_ND = static_cast<const T*>(call.x_ND);
  const Stack<T> up = {static_cast<const T*>(call.up_EJD), call.up_expert, call.up_ld};
  const Stack<T> down = {static_cast<const T*>(call.down_EOH), call.down_expert, call.down_ld};
  const T* up_bias = static_cast<const T*>(call.up_bias_EJ);
  const T* down_bias = static_cast<const T*>(call.down_bias_EO);
  T* inner_RJ = static_cast<T*>(call.inner_RJ);
  T* outer_RH = static_cast<T*>(call.outer_RH);
  const Size hidden = call.hidden, out_width = call.out_width;
#pragma omp parallel num_threads(call.threads)
  {
    products(
        groups, [&](Size r) { return x_ND + call.assignment_R[r] / call.slots * call.x_ld; }, up,
        hidden, hidden, call.width,
        [&](Size e, Size r, Size first, Size size, const float* gates, const float* ups) {
          each_vector(size, [&](Size i, Size count) {
            Vector gate = load_some(gates + i, count), value = load_some(ups + i, count);
            if (up_bias) {
              gate += load_some(up_bias + 2 * e * hidden + first + i, count);
              value += load_some(up_bias + (2 * e + 1) * hidden + first + i, count);
            }
            if (inner_RJ) {
              store_some(inner_RJ + 2 * r * hidden + first + i, gate, count);
              store_some(inner_RJ + (2 * r + 1) * hidden + first + i, value, count);
            }
            store_some(outer_RH + r * hidden + first + i, gate * sigmoid(gate) * value, count);
          });
        });
    products(
        groups, [&](Size r) { return outer_RH + r * hidden; }, down, out_width, 0, hidden,
        [&](Size e, Size r, Size first, Size size, const float* values, const float*) {
          each_vector(size, [&](Size i, Size count) {
            Vector value = load_some(values + i, count);
            if (down_bias) value += load_some(down_bias + e * out_width + first + i, count);
            store_some(call.out_RO + r * out_width + first + i, value, count);
          });
        });
    combine(call.tokens, call.slots, call.place_NK, call.weight_NK, call.out_RO, out_width,
            static_cast<T*>(call.y_NO));
  }
}

// One row through SwiGLU backward: from dA' to the router's gradient, s A, and s dA' before the
// activation.
template <class T>
float pull_back(Size hidden, const T* inner_J, const float* back_H, float weight, float* scaled_H,
                float* back_J) {
  Vector total = {};
  each_vector(hidden, [&](Size h, Size count) {
    const Vector gate = load_some(inner_J + h, count), up = load_some(inner_J + hidden + h, count);
    const Vector back = load_some(back_H + h, count), share = sigmoid(gate);
    const Vector passed = gate * share, scaled = weight * back;
    total += back * passed * up;
    store_some(scaled_H + h, weight * passed * up, count);
    store_some(back_J + h, scaled * up * share * (1.f + gate * (1.f - share)), count);
    store_some(back_J + hidden + h, scaled * passed, count);
  });
  return sum(total);
}

template <class T>
void backward_pass(const Call& call) {
  const Groups groups = grouped(call);
  const Stack<T> up = {static_cast<const T*>(call.up_EJD), call.up_expert, call.up_ld};
  const Stack<T> down = {static_cast<const T*>(call.down_EOH), call.down_expert, call.down_ld};
  const T* inner_RJ = static_cast<const T*>(call.inner_RJ);
  const Size hidden = call.hidden;
#pragma omp parallel num_threads(call.threads)
  {
    gather(call.rows, call.assignment_R, call.slots, static_cast<const T*>(call.grad_NO),
           call.grad_ld, call.out_width, call.grad_RO);
    back_products(groups, call.grad_RO, down, hidden, call.out_width, call.back_RH);
#pragma omp for schedule(static)
    for (Size r = 0; r < call.rows; ++r)
      call.grad_R[r] =
          pull_back(hidden, inner_RJ + 2 * r * hidden, call.back_RH + r * hidden,
                    call.weight_NK[call.assignment_R[r]], call.scaled_RH + r * hidden,
                    call.back_RJ + 2 * r * hidden);
    if (call.grad_down_EOH)
      weight_gradient(groups, call.grad_RO, call.out_width, call.scaled_RH, hidden,
                      static_cast<T*>(call.grad_down_EOH));
    if (call.grad_up_EJD) {
      gather(call.rows, call.assignment_R, call.slots, static_cast<const T*>(call.x_ND), call.x_ld,
             call.width, call.rows_RD);
      weight_gradient(groups, call.back_RJ, 2 * hidden, call.rows_RD, call.width,
                      static_cast<T*>(call.grad_up_EJD));
    }
    if (call.grad_x_ND) {
      back_products(groups, call.back_RJ, up, call.width, 2 * hidden, call.back_RD);
      combine(call.tokens, call.slots, call.place_NK, nullptr, call.back_RD, call.width,
              static_cast<T*>(call.grad_x_ND));
    }
  }
}

}  // namespace

extern "C" {

void moekit_forward_float32(const Call* call) { forward_pass<float>(*call); }
void moekit_forward_bfloat16(const Call* call) { forward_pass<bfloat16>(*call); }
void moekit_backward_float32(const Call* call) { backward_pass<float>(*call); }
void moekit_backward_bfloat16(const Call* call) { backward_pass<bfloat16>(*call); }
}

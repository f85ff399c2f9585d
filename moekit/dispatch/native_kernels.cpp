// The feed-forward pass of a mixture and its backward pass, for CPUs.
//
// Rows are sorted by expert: expert e has the rows start[e] to start[e + 1], each a token's copy in
// name only, since products read tokens where they lie. Every weight is read once, in the layout it
// has; only for many rows a block of weights at a time is laid out anew in the cache.
//
// Letters are those of the library: N tokens, K slots a token, R rows, E experts, D width in, J
// width before the activation (2 H), H after it, O width out. Sizes are int64; a leading dimension
// (`ld`) is a stride in elements. Sums are in float32. Threads are OpenMP's; those of a
// region all call each function that shares out work, and go on to the next one until they `meet`.

#include "native_combine.h"
#include "native_direct.h"
#include "native_gradients.h"
#include "native_grouped.h"
#include "native_products.h"

namespace {

template <class T>
void forward_pass(const Call& call) {
  const Layout layout(call);
  const Groups groups = layout.groups();
  const CombineWeights weights(call);
  const T* x_ND = static_cast<const T*>(call.x_ND);
  const Stack<T> up = {static_cast<const T*>(call.up_EJD), call.up_expert, call.up_ld};
  const Stack<T> down = {static_cast<const T*>(call.down_EOH), call.down_expert, call.down_ld};
  const T* up_bias = static_cast<const T*>(call.up_bias_EJ);
  const T* down_bias = static_cast<const T*>(call.down_bias_EO);
  T* inner_RJ = static_cast<T*>(call.inner_RJ);
  const Size hidden = call.hidden, out_width = call.out_width;
  const Size most = std::min(rows_at_once(groups, call.threads), call.rows);
  const Room<T> outer(most * hidden);
  const Combined<T, T> y(call, layout, weights.get(), out_width, most, static_cast<T*>(call.y_NO));
#pragma omp parallel num_threads(call.threads)
  {
    y.start();
    each_run(groups, most, [&](const Groups& run, Size run_start) {
      T *outer_RH = outer.get() - run_start * hidden, *out_RO = y.rows(run_start);
      products(
          run, [&](Size r) { return x_ND + call.assignment_R[r] / call.slots * call.x_ld; }, up,
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
              store_some(outer_RH + r * hidden + first + i, gate * sigmoid(gate, T{}) * value, count);
            });
          });
      meet();
      products(
          run, [&](Size r) { return outer_RH + r * hidden; }, down, out_width, 0, hidden,
          [&](Size e, Size r, Size first, Size size, const float* values, const float*) {
            each_vector(size, [&](Size i, Size count) {
              Vector value = load_some(values + i, count);
              if (down_bias) value += load_some(down_bias + e * out_width + first + i, count);
              store_some(out_RO + r * out_width + first + i, value, count);
            });
          });
      meet();
      y.add(run, run_start);
    });
    y.finish();
  }
}

// A forward pass of few tokens, from their experts' ids on; 1 if one of them is no id, else 0.
template <class T>
int decode(const DecodeCall& given) {
  const Size rows = given.tokens * given.slots;
  const Room<Size> assignment_R(rows);
  if (!sort_ids(rows, given.expert_NK, given.experts, assignment_R.get(), given.count_E)) return 1;
  Call call = {given.threads, given.tokens, given.slots,  rows,
               given.experts, given.width,  given.hidden, given.out_width};
  call.count_E = given.count_E;
  call.assignment_R = assignment_R.get();
  call.weight_NK = given.weight_NK;
  call.half_weights = given.half_weights;
  call.x_ND = given.x_ND;
  call.x_ld = given.width;
  call.up_EJD = given.up_EJD;
  call.up_expert = given.up_expert;
  call.up_ld = given.up_ld;
  call.down_EOH = given.down_EOH;
  call.down_expert = given.down_expert;
  call.down_ld = given.down_ld;
  call.y_NO = given.y_NO;
  forward_pass<T>(call);
  return 0;
}

// One row through SwiGLU backward: from dA' to the router's gradient, s A, and s dA' before the
// activation.
template <class T>
float pull_back(Size hidden, const T* inner_J, const float* back_H, float weight, float* scaled_H,
                float* back_J) {
  Vector total = {};
  each_vector(hidden, [&](Size h, Size count) {
    const Vector gate = load_some(inner_J + h, count), up = load_some(inner_J + hidden + h, count);
    const Vector back = load_some(back_H + h, count), share = sigmoid(gate, T{});
    const Vector passed = gate * share, scaled = weight * back;
    total += back * passed * up;
    store_some(scaled_H + h, weight * passed * up, count);
    store_some(back_J + h, scaled * up * share * (1.f + gate * (1.f - share)), count);
    store_some(back_J + hidden + h, scaled * passed, count);
  });
  return sum(total);
}

// Gradients of the weights of experts without rows, unless they lie in memory that is zero.
template <class T>
void clear(const Call& call, const Groups& groups, T* grad_up_EJD, T* grad_down_EOH) {
  if (grad_up_EJD && !call.zero_grad_up)
    clear_unused(groups, 2 * call.hidden * call.width, grad_up_EJD);
  if (grad_down_EOH && !call.zero_grad_down)
    clear_unused(groups, call.out_width * call.hidden, grad_down_EOH);
}

// The combine weights' gradients; slots without a row keep zero.
void clear_slots(const Call& call) {
  if (call.rows < call.tokens * call.slots)
    std::fill(call.grad_NK, call.grad_NK + call.tokens * call.slots, 0.f);
}

template <class T>
void backward_pass(const Call& call) {
  const Layout layout(call);
  const Groups groups = layout.groups();
  const CombineWeights weights(call);
  const Stack<T> up = {static_cast<const T*>(call.up_EJD), call.up_expert, call.up_ld};
  const Stack<T> down = {static_cast<const T*>(call.down_EOH), call.down_expert, call.down_ld};
  const T* inner_RJ = static_cast<const T*>(call.inner_RJ);
  T* grad_up_EJD = static_cast<T*>(call.grad_up_EJD);
  T* grad_down_EOH = static_cast<T*>(call.grad_down_EOH);
  const Size hidden = call.hidden, inner = 2 * hidden, width = call.width;
  const Size most = std::min(rows_at_once(groups, call.threads), call.rows);
  const RunRows grads(call.grad_RO, call.out_width, most), backs(call.back_RJ, inner, most);
  const RunRows backs_H(nullptr, hidden, most), scaled_H(nullptr, hidden, most);
  const RunRows xs(nullptr, width, grad_up_EJD ? most : 0);
  const Combined<float, T> grad_x(call, layout, nullptr, width, most,
                                  static_cast<T*>(call.grad_x_ND));
  clear_slots(call);
#pragma omp parallel num_threads(call.threads)
  {
    if (call.grad_x_ND) grad_x.start();
    each_run(groups, most, [&](const Groups& run, Size run_start) {
      const Matrix grad_RO = grads.from(run_start), back_RJ = backs.from(run_start);
      const Matrix back_RH = backs_H.from(run_start), scaled_RH = scaled_H.from(run_start);
      const Matrix x_RD = xs.from(run_start);
      const Size stop = run_start + run.rows();
      gather(run_start, stop, call.assignment_R, call.slots, static_cast<const T*>(call.grad_NO),
             call.grad_ld, grad_RO);
      if (grad_up_EJD)
        gather(run_start, stop, call.assignment_R, call.slots, static_cast<const T*>(call.x_ND),
               call.x_ld, x_RD);
      meet();
      back_products(run, grad_RO, down, back_RH);
      meet();
#pragma omp for schedule(static)
      for (Size r = run_start; r < stop; ++r) {
        const Size slot = call.assignment_R[r];
        call.grad_NK[slot] =
            pull_back(hidden, inner_RJ + r * inner, back_RH.row(r), weights.get()[slot],
                      scaled_RH.row(r), back_RJ.row(r));
      }
      if (grad_down_EOH) weight_gradient(run, grad_RO, scaled_RH, grad_down_EOH);
      if (grad_up_EJD) weight_gradient(run, back_RJ, x_RD, grad_up_EJD);
      if (call.grad_x_ND) back_products(run, back_RJ, up, {grad_x.rows(run_start), width, width});
      meet();
      if (call.grad_x_ND) grad_x.add(run, run_start);
    });
    clear(call, groups, grad_up_EJD, grad_down_EOH);
    if (call.grad_x_ND) grad_x.finish();
  }
}

#if defined(__AVX512BF16__)

// Sizes that the kernels in pairs take.
bool pairs_take(Size width, Size hidden, Size out_width) {
  return width % 2 == 0 && out_width % 2 == 0 && hidden % LANES == 0;
}

// What a run of experts leaves between the products of its backward pass.
struct Between {
  bfloat16* back_RJ;   // gradient before the activation, from the run's first row on
  const float* weight_NK;
  float* grad_RB;      // the router's gradient, from each block of columns, likewise
  Panels<WIDE> scaled; // s A
  Panels<LEFT> back;   // the gradient before the activation
};

// TALL rows or fewer through SwiGLU backward, in a block of columns; `r` is even in its expert.
inline void pull_back_pairs(const Call& call, Size e, Size r, Size m, Size first, Size size,
                            const float* sums, const Between& to) {
  const Size hidden = call.hidden, blocks = ceil_div(hidden, WIDE), run_start = to.back.first_row;
  const Size pair = (r - to.back.start[e]) / 2;
  const bfloat16* inner_RJ = static_cast<const bfloat16*>(call.inner_RJ);
  for (Size row = r + m; row < std::min(r + 2 * m, to.back.start[e + 1]); ++row) {
    fetch(inner_RJ + 2 * row * hidden + first, size);
    fetch(inner_RJ + (2 * row + 1) * hidden + first, size);
  }
  for (Size i = 0; i < m; i += 2) {
    Vector total[2] = {};
    for (Size c = 0; c < size; c += LANES) {
      Vector scaled[2] = {}, gates[2] = {}, ups[2] = {};
      for (Size j = 0; j < 2 && i + j < m; ++j) {
        const Size row = r + i + j, place = first + c;
        const bfloat16* inner = inner_RJ + 2 * row * hidden;
        const Vector gate = load(inner + place), up = load(inner + hidden + place);
        const Vector back = load(sums + (i + j) * WIDE + c), share = sigmoid(gate, bfloat16{});
        const Vector passed = gate * share, weight = splat(to.weight_NK[call.assignment_R[row]]);
        total[j] += back * passed * up;
        scaled[j] = weight * passed * up;
        gates[j] = weight * back * up * share * (1.f + gate * (1.f - share));
        ups[j] = weight * back * passed;
        store(to.back_RJ + 2 * (row - run_start) * hidden + place, gates[j]);
        store(to.back_RJ + (2 * (row - run_start) + 1) * hidden + place, ups[j]);
      }
      to.scaled.put(e, pair + i / 2, first + c, paired(scaled[0], scaled[1]));
      to.back.put(e, pair + i / 2, first + c, paired(gates[0], gates[1]));
      to.back.put(e, pair + i / 2, hidden + first + c, paired(ups[0], ups[1]));
    }
    for (Size j = 0; j < 2 && i + j < m; ++j)
      to.grad_RB[(r + i + j - run_start) * blocks + first / WIDE] = sum(total[j]);
  }
}

void backward_pass_in_pairs(const Call& call) {
  const Layout layout(call);
  const Groups groups = layout.groups();
  const CombineWeights weights(call);
  const Stack<bfloat16> up = {static_cast<const bfloat16*>(call.up_EJD), call.up_expert,
                              call.up_ld};
  const Stack<bfloat16> down = {static_cast<const bfloat16*>(call.down_EOH), call.down_expert,
                                call.down_ld};
  bfloat16* grad_up_EJD = static_cast<bfloat16*>(call.grad_up_EJD);
  bfloat16* grad_down_EOH = static_cast<bfloat16*>(call.grad_down_EOH);
  const Size hidden = call.hidden, width = call.width, out_width = call.out_width;
  const Size blocks = ceil_div(hidden, WIDE), inner = 2 * hidden;
  const Size most = std::min(rows_at_once(groups, call.threads), call.rows);
  const Room<bfloat16> back_RJ(most * inner);
  const Room<float> grad_RB(most * blocks);
  const Combined<bfloat16, bfloat16> grad_x(call, layout, nullptr, width, most,
                                            static_cast<bfloat16*>(call.grad_x_ND));
  bfloat16* back_RD = grad_x.rows(0);
  const auto grads = Panels<LEFT>::room(most, call.experts, out_width);
  const auto scaled = Panels<WIDE>::room(most, call.experts, hidden);
  const auto backs = Panels<LEFT>::room(most, call.experts, inner);
  const auto xs = Panels<WIDE>::room(most, call.experts, width);
  const auto x_row = [&](Size r) {
    return static_cast<const bfloat16*>(call.x_ND) + call.assignment_R[r] / call.slots * call.x_ld;
  };
  const auto grad_row = [&](Size r) {
    return static_cast<const bfloat16*>(call.grad_NO) +
           call.assignment_R[r] / call.slots * call.grad_ld;
  };
  clear_slots(call);
#pragma omp parallel num_threads(call.threads)
  {
    each_run(groups, most, [&](const Groups& run, Size first_row) {
      const auto left = [&](Pair* data, Size columns) {
        return Panels<LEFT>{data, ceil_div(columns, LEFT), run.start, first_row, run.used[0]};
      };
      const auto right = [&](Pair* data, Size columns) {
        return Panels<WIDE>{data, ceil_div(columns, WIDE), run.start, first_row, run.used[0]};
      };
      const Panels<LEFT> grad = left(grads.get(), out_width);
      const Panels<WIDE> x = right(xs.get(), width);
      const Between between = {back_RJ.get(), weights.get(), grad_RB.get(),
                               right(scaled.get(), hidden), left(backs.get(), inner)};
      if (grad_down_EOH) put_rows(run, grad_row, out_width, grad);
      if (grad_up_EJD) put_rows(run, x_row, width, x);
      paired_back_products(run, grad_row, down, hidden, out_width,
                           [&](Size e, Size r, Size m, Size first, Size size, const float* sums) {
                             pull_back_pairs(call, e, r, m, first, size, sums, between);
                           });
      meet();
#pragma omp for schedule(static)
      for (Size r = first_row; r < first_row + run.rows(); ++r) {
        const float* parts = grad_RB.get() + (r - first_row) * blocks;
        call.grad_NK[call.assignment_R[r]] = std::accumulate(parts, parts + blocks, 0.f);
      }
      if (grad_down_EOH)
        paired_weight_gradient(run, grad, out_width, between.scaled, hidden, grad_down_EOH);
      if (grad_up_EJD) paired_weight_gradient(run, between.back, inner, x, width, grad_up_EJD);
      if (call.grad_x_ND)
        paired_back_products(
            run, [&](Size r) { return back_RJ.get() + (r - first_row) * inner; }, up, width, inner,
            [&](Size, Size r, Size m, Size first, Size size, const float* sums) {
              for (Size i = 0; i < m; ++i)
                each_vector(size, [&](Size c, Size count) {
                  store_some(back_RD + (r + i) * width + first + c,
                             load_some(sums + i * WIDE + c, count), count);
                });
            });
      meet();
    });
    clear(call, groups, grad_up_EJD, grad_down_EOH);
    if (call.grad_x_ND) grad_x.finish();
  }
}

#endif

}  // namespace

extern "C" {

void moekit_forward_float32(const Call* call) { forward_pass<float>(*call); }
void moekit_forward_bfloat16(const Call* call) { forward_pass<bfloat16>(*call); }
int moekit_decode_float32(const DecodeCall* call) { return decode<float>(*call); }
int moekit_decode_bfloat16(const DecodeCall* call) { return decode<bfloat16>(*call); }
void moekit_backward_float32(const Call* call) { backward_pass<float>(*call); }
void moekit_backward_bfloat16(const Call* call) {
#if defined(__AVX512BF16__)
  if (call->in_pairs) return backward_pass_in_pairs(*call);
#endif
  backward_pass<bfloat16>(*call);
}

void moekit_add_direct_float32(const DirectCall* call) { add_direct<float>(*call); }
void moekit_add_direct_bfloat16(const DirectCall* call) { add_direct<bfloat16>(*call); }
void moekit_direct_backward_float32(const DirectCall* call) { direct_backward<float>(*call); }
void moekit_direct_backward_bfloat16(const DirectCall* call) { direct_backward<bfloat16>(*call); }

void moekit_product_float32(const GroupedCall* call) { grouped_product<float>(*call); }
void moekit_product_bfloat16(const GroupedCall* call) { grouped_product<bfloat16>(*call); }
void moekit_gradient_float32(const GroupedCall* call) { grouped_gradient<float>(*call); }
void moekit_gradient_bfloat16(const GroupedCall* call) { grouped_gradient<bfloat16>(*call); }

// Whether the backward pass of this call can run in pairs, and has the rows for which that pays.
int moekit_runs_in_pairs(const Call* call) {
#if defined(__AVX512BF16__)
  const bool plain = !call->up_bias_EJ && !call->down_bias_EO;
  const Size idle = std::count(call->count_E, call->count_E + call->experts, Size(0));
  return plain && pairs_take(call->width, call->hidden, call->out_width) &&
         call->rows >= PAIRED_ROWS_BACK * (call->experts - idle);
#else
  return 0;
#endif
}

// Whether many rows of these sizes are multiplied in pairs.
int moekit_has_pairs(Size width, Size hidden, Size out_width) {
#if defined(__AVX512BF16__)
  return pairs_take(width, hidden, out_width);
#else
  return 0;
#endif
}

// See sort_ids.
int moekit_sort_ids(Size count, const Size* ids, Size size, Size* order, Size* counts) {
  return sort_ids(count, ids, size, order, counts) ? 0 : 1;
}

// Whether the CPU has matrix units, which other libraries use for bfloat16 and these kernels do not.
int moekit_has_matrix_units() {
#if defined(__AMX_BF16__)
  return 1;
#else
  return 0;
#endif
}
}

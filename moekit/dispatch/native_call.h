// What Python hands over for a call of the kernels, and what follows from it alone.

#pragma once

#include "native_groups.h"

// What Python hands over: FIELDS of moekit/dispatch/native_library.py.
struct Call {
  Size threads, tokens, slots, rows, experts, width, hidden, out_width;
  const Size *count_E, *assignment_R;
  const void* weight_NK;
  Size half_weights;  // whether they are bfloat16, and not float32
  const void* x_ND;
  Size x_ld;
  const void* up_EJD;
  Size up_expert, up_ld;
  const void* down_EOH;
  Size down_expert, down_ld;
  const void *up_bias_EJ, *down_bias_EO;  // without gaps; null for none
  void* inner_RJ;                         // forward: null if it is not to be kept
  void* y_NO;                             // forward
  // Backward; the gradients that are not wanted are null.
  const void* grad_NO;
  Size grad_ld;
  Size in_pairs;  // stages are then bfloat16, and none is kept
  Size zero_grad_up, zero_grad_down;  // whether their memory is zero
  float *grad_RO, *back_RJ;  // null unless these stages are to be kept
  float* grad_NK;
  void *grad_x_ND, *grad_up_EJD, *grad_down_EOH;
};

// The same for a forward pass of few tokens that nothing is kept of and whose assignments are not
// sorted: what `decoded` of moekit/dispatch/native_decode.py packs. Tokens, their ids and weights
// have no gaps.
struct DecodeCall {
  Size threads, tokens, slots, experts, width, hidden, out_width;
  const Size* expert_NK;
  const void* weight_NK;
  Size half_weights;
  const void *x_ND, *up_EJD;
  Size up_expert, up_ld;
  const void* down_EOH;
  Size down_expert, down_ld;
  Size* count_E;
  void* y_NO;
};

namespace {

// Which rows are each expert's, and which row is each assignment's.
class Layout {
 public:
  explicit Layout(const Call& call)
      : rows_(call.experts, call.count_E), place_(call.tokens * call.slots) {
    if (call.rows < call.tokens * call.slots)
      std::fill(place(), place() + call.tokens * call.slots, Size(-1));
    for (Size r = 0; r < call.rows; ++r) place()[call.assignment_R[r]] = r;
  }
  Groups groups() const { return rows_.groups(); }
  Size* place() const { return place_.get(); }  // N K; -1 for none

 private:
  RowLayout rows_;
  Room<Size> place_;
};

// The combine weights in float32.
class CombineWeights {
 public:
  explicit CombineWeights(const Call& call)
      : memory_(call.half_weights ? call.tokens * call.slots : 0),
        data_(static_cast<const float*>(call.weight_NK)) {
    if (!call.half_weights) return;
    const bfloat16* half = static_cast<const bfloat16*>(call.weight_NK);
    copy(half, call.tokens * call.slots, memory_.get());
    data_ = memory_.get();
  }
  const float* get() const { return data_; }

 private:
  Room<float> memory_;
  const float* data_;
};

}  // namespace

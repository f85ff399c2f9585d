// Products of rows that are sorted by expert with weights in either layout, and the gradients of
// these weights: for experts of any kind, between whose products others compute.

#pragma once

#include "native_gradients.h"
#include "native_products.h"

// What Python hands over: FIELDS of moekit/dispatch/native_grouped.py.
struct GroupedCall {
  Size threads, experts, rows;
  const Size* count_E;
  const void* left_RI;  // rows
  Size left_ld, left_width;
  // Weights (E, O, I), whose sum runs along the row or, with `along_result`, across rows (E, I, O).
  const void* weight;
  Size weight_expert, weight_ld, along_result;
  const void* bias_EO;   // without gaps; null for none
  const void* right_RO;  // rows, for gradients (E, I, O)
  Size right_ld, right_width;
  void* out;
  Size zero_out;  // whether the memory of `out` is zero
};

namespace {

// Rows in float32: those that are given, or a copy.
template <class T>
class WholeRows {
 public:
  WholeRows(const void* given, Size rows, Size columns, Size ld)
      : given_(static_cast<const T*>(given)), rows_(rows), columns_(columns), ld_(ld),
        copy_(COPIED ? rows * columns : 0) {}

  // By all threads of a region, which must meet afterwards.
  void fill() const {
    if (!COPIED) return;
#pragma omp for schedule(static) nowait
    for (Size r = 0; r < rows_; ++r) copy(given_ + r * ld_, columns_, copy_.get() + r * columns_);
  }
  Matrix matrix() const {
    if constexpr (!COPIED) return {const_cast<float*>(given_), columns_, ld_};
    return {copy_.get(), columns_, columns_};
  }

 private:
  static constexpr bool COPIED = !std::is_same_v<T, float>;
  const T* given_;
  Size rows_, columns_, ld_;
  Room<float> copy_;
};

// Results on their way, in float32: where they belong, or to be rounded at the end.
template <class T>
class WholeResults {
 public:
  WholeResults(void* out, Size rows, Size columns)
      : out_(static_cast<T*>(out)), rows_(rows), columns_(columns),
        sums_(COPIED ? rows * columns : 0) {}

  Matrix matrix() const {
    if constexpr (!COPIED) return {out_, columns_, columns_};
    return {sums_.get(), columns_, columns_};
  }
  // By all threads of a region, which must have met before.
  void finish() const {
    if (!COPIED) return;
#pragma omp for schedule(static)
    for (Size r = 0; r < rows_; ++r)
      each_vector(columns_, [&](Size c, Size count) {
        const Size place = r * columns_ + c;
        store_some(out_ + place, load_some(sums_.get() + place, count), count);
      });
  }

 private:
  static constexpr bool COPIED = !std::is_same_v<T, float>;
  T* out_;
  Size rows_, columns_;
  Room<float> sums_;
};

// out (R, O) = rows Wᵀ, plus the bias.
template <class T>
void grouped_product(const GroupedCall& call) {
  const RowLayout layout(call.experts, call.count_E);
  const Groups groups = layout.groups();
  const Stack<T> weight = {static_cast<const T*>(call.weight), call.weight_expert, call.weight_ld};
  const T* bias = static_cast<const T*>(call.bias_EO);
  const Size columns = call.right_width, depth = call.left_width;
  if (call.along_result) {
    const WholeRows<T> rows(call.left_RI, call.rows, depth, call.left_ld);
    const WholeResults<T> results(call.out, call.rows, columns);
#pragma omp parallel num_threads(call.threads)
    {
      rows.fill();
      meet();
      back_products(groups, rows.matrix(), weight, results.matrix(), bias);
      meet();
      results.finish();
    }
    return;
  }
  const T* rows = static_cast<const T*>(call.left_RI);
  T* out = static_cast<T*>(call.out);
#pragma omp parallel num_threads(call.threads)
  products(
      groups, [&](Size r) { return rows + r * call.left_ld; }, weight, columns, 0, depth,
      [&](Size e, Size r, Size first, Size size, const float* values, const float*) {
        each_vector(size, [&](Size i, Size count) {
          Vector value = load_some(values + i, count);
          if (bias) value += load_some(bias + e * columns + first + i, count);
          store_some(out + r * columns + first + i, value, count);
        });
      });
}

// out (E, I, O) = leftᵀ right over each expert's rows; zero for one without rows, unless the memory
// is zero.
template <class T>
void grouped_gradient(const GroupedCall& call) {
  const RowLayout layout(call.experts, call.count_E);
  const Groups groups = layout.groups();
  const WholeRows<T> left(call.left_RI, call.rows, call.left_width, call.left_ld);
  const WholeRows<T> right(call.right_RO, call.rows, call.right_width, call.right_ld);
  T* out = static_cast<T*>(call.out);
#pragma omp parallel num_threads(call.threads)
  {
    left.fill();
    right.fill();
    meet();
    weight_gradient(groups, left.matrix(), right.matrix(), out);
    if (!call.zero_out) clear_unused(groups, call.left_width * call.right_width, out);
  }
}

}  // namespace

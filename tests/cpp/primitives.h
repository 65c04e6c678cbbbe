// The inline functions of simd.h and tile.h as one table per instruction set, for tests.
#pragma once
#include "kernels/view.h"

namespace mamba_ops {

template <class R>
struct Primitives {
  using Map = void (*)(R* y, const R* x, int64_t n);  // n: a multiple of the width

  int64_t width;
  Map exp2, exp, log1p_unit, softplus, softplus_grad, sigmoid, silu, silu_grad, sin, cos;
  R (*sum)(const R* x);  // of `width` values
  void (*load_row)(R* dst, const View& src, int64_t n);
  void (*store_row)(const View& dst, const R* src, int64_t n);
  void (*transpose)(R* dst, int64_t dst_ld, const R* src, int64_t src_ld, int64_t rows, int64_t cols);
  void (*load_tile)(R* dst, int64_t ld, const View& src, int64_t offset, int64_t rows, int64_t row_stride,
                    int64_t cols, int64_t col_stride);
  void (*store_tile)(const View& dst, int64_t offset, int64_t rows, int64_t row_stride, int64_t cols,
                     int64_t col_stride, const R* src, int64_t ld);
};

struct PrimitiveTable {
  Primitives<float> f32;
  Primitives<double> f64;

  template <class R>
  const Primitives<R>& of() const {
    if constexpr (sizeof(R) == sizeof(float))
      return f32;
    else
      return f64;
  }
};

}  // namespace mamba_ops

// Compiled once per instruction set, with the flags of its kernels.
#include "primitives.h"

#include "kernels/cpu/tile.h"

namespace mamba_ops::MAMBA_ISA {

template <class R, auto f>
void map(R* y, const R* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<R>) store<R>(y + i, f(load<R>(x + i)));
}

template <class R>
R sum_of(const R* x) {
  return sum<R>(load<R>(x));
}

template <class R>
void load_row_of(R* dst, const View& src, int64_t n) {
  with_type(src.dtype, [&]<class T>(T*) { load_row(dst, static_cast<const T*>(src.data), n); });
}
template <class R>
void store_row_of(const View& dst, const R* src, int64_t n) {
  with_type(dst.dtype, [&]<class T>(T*) { store_row(static_cast<T*>(dst.data), src, n); });
}
template <class R>
void transpose_of(R* dst, int64_t dst_ld, const R* src, int64_t src_ld, int64_t rows, int64_t cols) {
  transpose<R>(dst, dst_ld, src, src_ld, rows, cols);
}

template <class R>
constexpr Primitives<R> primitives_of() {
  return {
      .width = kWidth<R>,
      .exp2 = map<R, [](Vec<R> x) { return MAMBA_ISA::exp2(x); }>,
      .exp = map<R, [](Vec<R> x) { return MAMBA_ISA::exp(x); }>,
      .log1p_unit = map<R, [](Vec<R> x) { return MAMBA_ISA::log1p_unit(x); }>,
      .softplus = map<R, [](Vec<R> x) { return softplus<R>(x); }>,
      .softplus_grad = map<R,
                           [](Vec<R> x) {
                             Vec<R> grad;
                             softplus<R>(x, &grad);
                             return grad;
                           }>,
      .sigmoid = map<R, [](Vec<R> x) { return MAMBA_ISA::sigmoid(x); }>,
      .silu = map<R, [](Vec<R> x) { return silu<R>(x); }>,
      .silu_grad = map<R, [](Vec<R> x) { return silu_grad<R>(x); }>,
      .sin = map<R,
                 [](Vec<R> x) {
                   Vec<R> sin, cos;
                   sincos(x, sin, cos);
                   return sin;
                 }>,
      .cos = map<R,
                 [](Vec<R> x) {
                   Vec<R> sin, cos;
                   sincos(x, sin, cos);
                   return cos;
                 }>,
      .sum = sum_of<R>,
      .load_row = load_row_of<R>,
      .store_row = store_row_of<R>,
      .transpose = transpose_of<R>,
      .load_tile = load_tile<R>,
      .store_tile = store_tile<R>,
  };
}

extern const PrimitiveTable primitives;
constinit const PrimitiveTable primitives = {primitives_of<float>(), primitives_of<double>()};

}  // namespace mamba_ops::MAMBA_ISA

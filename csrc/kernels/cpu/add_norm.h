// Residual addition and RMS norm:  s = residual + x, rounded as it is stored;  y = s r w,  r = (mean s^2 +
// eps)^-1/2
//
//   q = gy w;  g = gs + r (q - s r^2 mean(q s)) for both summands;  gw = sum_rows gy s r
//
// A unit of work owns a run of rows, and takes them one by one: a row in scratch. It adds up its part of gw
// in order; the parts are added in a second pass: bitwise the same for any number of threads.
#pragma once
#include "kernels/add_norm.h"
#include "kernels/cpu/tile.h"

namespace mamba_ops::MAMBA_ISA {

template <class R>
int64_t add_norm_scratch_bytes(int64_t d) {
  return 4 * padded(d) * sizeof(R);
}

template <class R>
MAMBA_INLINE R add_norm_scale(Vec<R> squares, int64_t d, double eps) {
  return R(1) / R(__builtin_sqrt(sum<R>(squares) / R(d) + R(eps)));
}

template <class R>
void add_rms_norm(const AddNorm& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  constexpr int w = kWidth<R>;
  const int64_t d = p.d, ld = padded(d);
  R *x = static_cast<R*>(scratch), *s = x + ld, *weight = s + ld;
  load_tile(weight, ld, p.weight, 0, 1, 0, d, p.weight.stride[0]);
  const int64_t end = unit_end * p.rows / p.units;
  for (int64_t row = unit_begin * p.rows / p.units; row < end; ++row) {
    load_tile(x, ld, p.x, row * d, 1, 0, d, 1);
    load_tile(s, ld, p.residual, row * d, 1, 0, d, 1);
    for (int64_t i = 0; i < ld; i += w) store<R>(s + i, load<R>(s + i) + load<R>(x + i));
    store_tile(p.sum, row * d, 1, 0, d, 1, s, ld);
    load_tile(s, ld, p.sum, row * d, 1, 0, d, 1);
    Vec<R> squares = {};
    for (int64_t i = 0; i < ld; i += w) squares += load<R>(s + i) * load<R>(s + i);
    const R scale = add_norm_scale<R>(squares, d, p.eps);
    for (int64_t i = 0; i < ld; i += w) store<R>(s + i, load<R>(s + i) * (scale * load<R>(weight + i)));
    store_tile(p.y, row * d, 1, 0, d, 1, s, ld);
  }
}

template <class R>
void add_rms_norm_bwd(const AddNormBwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  constexpr int w = kWidth<R>;
  const int64_t d = p.d, ld = padded(d);
  R *dy = static_cast<R*>(scratch), *s = dy + ld, *grad = s + ld, *weight = grad + ld;
  load_tile(weight, ld, p.weight, 0, 1, 0, d, p.weight.stride[0]);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    R* partial = static_cast<R*>(p.partial) + unit * ld;
    for (int64_t i = 0; i < ld; ++i) partial[i] = grad[i] = 0;
    for (int64_t row = unit * p.rows / p.units; row < (unit + 1) * p.rows / p.units; ++row) {
      load_tile(dy, ld, p.dy, row * d, 1, 0, d, 1);
      load_tile(s, ld, p.sum, row * d, 1, 0, d, 1);
      Vec<R> squares = {}, dots = {};
      for (int64_t i = 0; i < ld; i += w) {
        const Vec<R> v = load<R>(s + i);
        squares += v * v;
        dots += load<R>(dy + i) * load<R>(weight + i) * v;
      }
      const R r = add_norm_scale<R>(squares, d, p.eps), c = r * r * r * (sum<R>(dots) / R(d));
      if (p.dsum) load_tile(grad, ld, p.dsum, row * d, 1, 0, d, 1);
      for (int64_t i = 0; i < ld; i += w) {
        const Vec<R> v = load<R>(s + i), gy = load<R>(dy + i);
        const Vec<R> before = p.dsum ? load<R>(grad + i) : Vec<R>{};
        store<R>(grad + i, before + (gy * load<R>(weight + i) * r - v * c));
        store<R>(partial + i, load<R>(partial + i) + gy * (v * r));
      }
      store_tile(p.dresidual, row * d, 1, 0, d, 1, grad, ld);
      if (p.dx) store_tile(p.dx, row * d, 1, 0, d, 1, grad, ld);
    }
  }
}

// dweight from the partial sums of the units.
template <class R>
void add_rms_norm_reduce(const AddNormBwd& p) {
  const int64_t ld = padded(p.d);
  sum_partials(p.dweight, 0, 1, 0, p.d, p.dweight.stride[0], static_cast<const R*>(p.partial), ld, p.units,
               ld);
}

}  // namespace mamba_ops::MAMBA_ISA

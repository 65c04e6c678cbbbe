// Residual addition and RMS norm:  s = residual + x, rounded as it is stored;  y = s (mean s^2 + eps)^-1/2 w.
//
// A unit of work owns a run of rows, and takes them one by one: a row in scratch.
#pragma once
#include "kernels/add_norm.h"
#include "kernels/cpu/tile.h"

namespace mamba_ops::MAMBA_ISA {

template <class R>
int64_t add_norm_scratch_bytes(const AddNorm& p) {
  return 3 * padded(p.d) * sizeof(R);
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
    const R scale = R(1) / R(__builtin_sqrt(sum<R>(squares) / R(d) + R(p.eps)));
    for (int64_t i = 0; i < ld; i += w) store<R>(s + i, load<R>(s + i) * (scale * load<R>(weight + i)));
    store_tile(p.y, row * d, 1, 0, d, 1, s, ld);
  }
}

}  // namespace mamba_ops::MAMBA_ISA

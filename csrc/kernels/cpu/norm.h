// Gated RMS norm, forward and backward.
//
//   after the gate:   v = x silu(z);  y = v r w             r = (mean v^2 + eps)^-1/2 over a group
//   before the gate:  v = x;          y = v r w silu(z)
//   gn = gy or gy silu(z);  q = gn w;  gv = r (q - v r^2 mean(q v));  gw = sum_rows gn v r
//   after:  gx = gv silu(z), gz = gv x silu'(z);   before:  gx = gv, gz = gy v r w silu'(z)
//
// A unit of work owns a run of tiles, and takes each of them group by group: tile_rows rows of one group, in
// scratch. r is computed again in the backward, not saved. A unit sums its part of gw over its rows in order;
// the parts are added in a second pass: bitwise the same for any number of threads.
#pragma once
#include "kernels/cpu/tile.h"
#include "kernels/norm.h"

namespace mamba_ops::MAMBA_ISA {

template <class R>
int64_t norm_scratch_bytes(const NormDims& dims) {
  const int64_t ld = padded(dims.group);
  return (4 * dims.tile_rows * ld + dims.d / dims.group * ld) * sizeof(R);
}

// Some rows of one group in the Views of a call.
struct NormTile {
  int64_t at[3], rows, column;

  int64_t offset(const View& v) const {
    return at[0] * v.stride[0] + at[1] * v.stride[1] + at[2] * v.stride[2] + column * v.stride[3];
  }
  template <class R>
  void load(R* dst, const View& v, int64_t group) const {
    load_tile(dst, padded(group), v, offset(v), rows, v.stride[2], group, v.stride[3]);
  }
  template <class R>
  void store(const View& v, int64_t group, const R* src) const {
    store_tile(v, offset(v), rows, v.stride[2], group, v.stride[3], src, padded(group));
  }
};

// f(tile, index of its group) over the tiles and groups of one unit, in order.
template <class F>
MAMBA_INLINE void for_norm_tiles(const NormFwd& p, int64_t unit, F f) {
  const NormDims& dims = p.dims;
  const int64_t total = dims.tiles(), per_run = total / (dims.lead[0] * dims.lead[1]);
  for (int64_t i = unit * total / p.units; i < (unit + 1) * total / p.units; ++i) {
    const int64_t run = i / per_run, first = i % per_run * dims.tile_rows, left = dims.lead[2] - first;
    NormTile tile{
        {run / dims.lead[1], run % dims.lead[1], first}, left < dims.tile_rows ? left : dims.tile_rows, 0};
    for (int64_t g = 0; g < dims.d / dims.group; ++g, tile.column += dims.group) f(tile, g);
  }
}

// weight as (d / group, padded group).
template <class R>
void load_norm_weight(R* dst, const NormFwd& p) {
  const NormDims& dims = p.dims;
  load_tile(dst, padded(dims.group), p.weight, 0, dims.d / dims.group, dims.group * p.weight.stride[0],
            dims.group, p.weight.stride[0]);
}

template <class R>
MAMBA_INLINE R norm_scale(Vec<R> squares, const NormDims& dims) {
  return R(1) / R(__builtin_sqrt(sum<R>(squares) / R(dims.group) + R(dims.eps)));
}

template <class R>
void rms_norm_gated_fwd(const NormFwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  constexpr int w = kWidth<R>;
  const NormDims& dims = p.dims;
  const int64_t ld = padded(dims.group);
  const bool after = p.z && !dims.norm_before_gate, before = p.z && dims.norm_before_gate;
  R* x = static_cast<R*>(scratch);
  R* z = x + dims.tile_rows * ld;
  R* weight = z + dims.tile_rows * ld;
  load_norm_weight(weight, p);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit)
    for_norm_tiles(p, unit, [&](const NormTile& tile, int64_t g) {
      tile.load(x, p.x, dims.group);
      if (p.z) tile.load(z, p.z, dims.group);
      for (int64_t i = 0; i < tile.rows; ++i) {
        R *v = x + i * ld, *gate = z + i * ld;
        const R* scale = weight + g * ld;
        Vec<R> squares = {};
        for (int64_t j = 0; j < ld; j += w) {
          Vec<R> value = load<R>(v + j);
          if (after) value *= silu<R>(load<R>(gate + j));
          store<R>(v + j, value);
          squares += value * value;
        }
        const R r = norm_scale<R>(squares, dims);
        for (int64_t j = 0; j < ld; j += w) {
          Vec<R> y = load<R>(v + j) * r * load<R>(scale + j);
          if (before) y *= silu<R>(load<R>(gate + j));
          store<R>(v + j, y);
        }
      }
      tile.store(p.y, dims.group, x);
    });
}

template <class R>
void rms_norm_gated_bwd(const NormBwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  constexpr int w = kWidth<R>;
  const NormDims& dims = p.fwd.dims;
  const int64_t ld = padded(dims.group), groups = dims.d / dims.group, size = dims.tile_rows * ld;
  const bool gated = bool(p.fwd.z), before = dims.norm_before_gate;
  R* x = static_cast<R*>(scratch);
  R *z = x + size, *dy = z + size, *sig = dy + size, *weight = sig + size;
  load_norm_weight(weight, p.fwd);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    R* partial = static_cast<R*>(p.partial) + unit * groups * ld;
    for (int64_t i = 0; i < groups * ld; ++i) partial[i] = 0;
    for_norm_tiles(p.fwd, unit, [&](const NormTile& tile, int64_t g) {
      tile.load(x, p.fwd.x, dims.group);
      tile.load(dy, p.dy, dims.group);
      if (gated) tile.load(z, p.fwd.z, dims.group);
      for (int64_t i = 0; i < tile.rows; ++i) {
        R *xi = x + i * ld, *zi = z + i * ld, *si = sig + i * ld;
        const R *gy = dy + i * ld, *scale = weight + g * ld;
        R* gw = partial + g * ld;
        Vec<R> squares = {}, dots = {};
        for (int64_t j = 0; j < ld; j += w) {
          Vec<R> v = load<R>(xi + j), q = load<R>(gy + j) * load<R>(scale + j);
          if (gated) {
            const Vec<R> zj = load<R>(zi + j), s = sigmoid(zj);
            store<R>(si + j, s);
            (before ? q : v) *= zj * s;
          }
          squares += v * v;
          dots += q * v;
        }
        const R r = norm_scale<R>(squares, dims), c = r * r * r * (sum<R>(dots) / R(dims.group));
        for (int64_t j = 0; j < ld; j += w) {
          const Vec<R> xj = load<R>(xi + j), wj = load<R>(scale + j), gj = load<R>(gy + j);
          Vec<R> gate = splat(R(1)), slope = {};
          if (gated) {
            const Vec<R> zj = load<R>(zi + j), s = load<R>(si + j);
            gate = zj * s;
            slope = s * (R(1) + zj * (R(1) - s));
          }
          const Vec<R> v = before ? xj : xj * gate, gn = before ? gj * gate : gj;
          const Vec<R> gv = gn * wj * r - v * c;
          store<R>(gw + j, load<R>(gw + j) + gn * (v * r));
          const Vec<R> normed = v * r * wj;
          store<R>(xi + j, before ? gv : gv * gate);
          if (gated) store<R>(zi + j, before ? gj * normed * slope : gv * xj * slope);
          if (p.fwd.y) store<R>(si + j, before ? normed * gate : normed);
        }
      }
      tile.store(p.dx, dims.group, x);
      if (gated) tile.store(p.dz, dims.group, z);
      if (p.fwd.y) tile.store(p.fwd.y, dims.group, sig);
    });
  }
}

// dweight from the partial sums of the units.
template <class R>
void rms_norm_gated_reduce(const NormBwd& p) {
  const NormDims& dims = p.fwd.dims;
  const int64_t groups = dims.d / dims.group, ld = padded(dims.group), stride = p.dweight.stride[0];
  sum_partials(p.dweight, 0, groups, dims.group * stride, dims.group, stride,
               static_cast<const R*>(p.partial), ld, p.fwd.units, groups * ld);
}

}  // namespace mamba_ops::MAMBA_ISA

// One token, or a few, of the convolution, the selective scan and the SSD, with the state in place.
//
// A unit of work owns up to kUpdateRows channels (for SSD of one head) and takes the batch rows one after the
// other: a state row that two batch rows share sees them in order. States are used where they lie if they are
// of the arithmetic type and contiguous over n, else in a copy that is rounded once, after the last token.
#pragma once
#include "kernels/cpu/causal_conv1d.h"
#include "kernels/cpu/scan_state.h"
#include "kernels/state_update.h"

namespace mamba_ops::MAMBA_ISA {

static_assert(kUpdateRows == kConvChannels);

MAMBA_INLINE int64_t state_row(StateRows rows, int64_t b) { return rows ? rows[b] : b; }

// rows x cols of a strided tensor in the arithmetic type, columns padded with zeros to whole vectors, the
// parts of complex numbers in planes.
template <class R, bool kComplex>
struct StateMatrix {
  R* data;
  int64_t ld, plane;
  bool copied;

  static constexpr int64_t kParts = kComplex ? 2 : 1;

  StateMatrix(const View& v, int64_t offset, int64_t rows, int64_t row_stride, int64_t cols,
              int64_t col_stride, R* copy) {
    copied = kComplex || v.dtype != (sizeof(R) == sizeof(double) ? DType::f64 : DType::f32) ||
             col_stride != 1 || cols % kWidth<R> != 0;
    if (!copied) {
      data = static_cast<R*>(v.data) + offset;
      ld = row_stride;
      plane = 0;
      return;
    }
    data = copy;
    ld = padded(cols);
    plane = rows * ld;
    for (int64_t part = 0; part < kParts; ++part)
      load_tile(copy + part * plane, ld, v, offset + part, rows, row_stride, cols, col_stride);
  }
  void store(const View& v, int64_t offset, int64_t rows, int64_t row_stride, int64_t cols,
             int64_t col_stride) const {
    for (int64_t part = 0; copied && part < kParts; ++part)
      store_tile(v, offset + part, rows, row_stride, cols, col_stride, data + part * plane, ld);
  }
};

// h <- a h + x B and o <- Re(C h), row by row; decay(row, i) is a for the vector of states from i. Writes
// whole vectors of o.
template <class R, bool kComplex, class Decay>
MAMBA_INLINE void advance_states(R* o, const StateMatrix<R, kComplex>& h, int64_t first, int64_t rows,
                                 int64_t n, const R* x, const StateMatrix<R, kComplex>& B,
                                 const StateMatrix<R, kComplex>& C, Decay decay) {
  using S = State<R, kComplex>;
  constexpr int w = kWidth<R>;
  for (int64_t r0 = first; r0 < first + rows; r0 += w) {
    Vec<R> sums[w];
    const int64_t count = first + rows - r0 < w ? first + rows - r0 : w;
    for (int64_t k = count; k < w; ++k) sums[k] = Vec<R>{};
    for (int64_t k = 0; k < count; ++k) {
      R* row = h.data + (r0 + k) * h.ld;
      const Vec<R> input = splat(x[r0 + k]);
      Vec<R> out = {};
      for (int64_t i = 0; i < n; i += w) {
        const S s = mul_add<R>(decay(r0 + k, i), load_state<S, R>(row + i, h.plane), input,
                               load_state<S, R>(B.data + i, B.plane));
        store_state<R>(row + i, h.plane, s);
        out = add_re_mul<R>(out, load_state<S, R>(C.data + i, C.plane), s);
      }
      sums[k] = out;
    }
    transpose<R>(sums);
    for (int k = 1; k < w; ++k) sums[0] += sums[k];
    store<R>(o + r0, sums[0]);
  }
}

// o <- (o + D x) silu(z) for the rows of one token.
template <class R>
MAMBA_INLINE void skip_and_gate(R* o, const R* D, const R* x, const R* z, int64_t rows) {
  for (int64_t v = 0; v < rows; v += kWidth<R>) {
    Vec<R> y = load<R>(o + v) + load<R>(D + v) * load<R>(x + v);
    if (z) y *= silu<R>(load<R>(z + v));
    store<R>(o + v, y);
  }
}

template <class R>
void causal_conv1d_update(const ConvUpdate& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  const ConvDims& dims = p.conv.dims;
  const int64_t ld = kConvChannels, halo = dims.w - 1;
  const View &in = p.conv.x, &out = p.conv.y, &state = p.state;
  R* x = static_cast<R*>(scratch);
  R* y = x + kConvRows * ld;
  for (int64_t u = unit_begin; u < unit_end; ++u) {
    const ConvUnit<R> unit(p.conv, u, y + kConvRows * ld);
    for (int64_t b = 0; b < dims.b; ++b) {
      const int64_t row = state_row(p.rows, b), at = row * state.stride[0] + unit.c0 * state.stride[1];
      if (row >= 0)
        load_tile(x, ld, state, at + (p.k - halo) * state.stride[2], halo, state.stride[2], unit.channels,
                  state.stride[1]);
      // Column j of the state moves to j - l; the columns that this frees are filled from the tokens.
      if (row >= 0)
        with_type(state.dtype, [&]<class T>(T*) {
          T* to = static_cast<T*>(state.data) + at;
          for (int64_t j = 0; j + dims.l < p.k; ++j)
            for (int64_t c = 0; c < unit.channels; ++c)
              to[c * state.stride[1] + j * state.stride[2]] =
                  to[c * state.stride[1] + (j + dims.l) * state.stride[2]];
        });
      for (int64_t t0 = 0; t0 < dims.l; t0 += kConvTokens) {
        const int64_t tokens = dims.l - t0 < kConvTokens ? dims.l - t0 : kConvTokens;
        const int64_t offset = b * in.stride[0] + unit.c0 * in.stride[1] + t0 * in.stride[2];
        load_tile(x + halo * ld, ld, in, offset, tokens, in.stride[2], unit.channels, in.stride[1]);
        if (row >= 0)
          conv_outputs(y, dims, unit, x, tokens);
        else
          for (int64_t i = 0; i < tokens * ld; ++i) y[i] = 0;
        store_tile(out, b * out.stride[0] + unit.c0 * out.stride[1] + t0 * out.stride[2], tokens,
                   out.stride[2], unit.channels, out.stride[1], y, ld);
        const int64_t column = t0 + p.k - dims.l;  // of token t0 in the state
        const int64_t skip = column < 0 ? -column : 0;
        if (row >= 0 && skip < tokens)
          store_tile(state, at + (column + skip) * state.stride[2], tokens - skip, state.stride[2],
                     unit.channels, state.stride[1], x + (halo + skip) * ld, ld);
        for (int64_t i = 0; i < halo * ld; ++i) x[i] = x[tokens * ld + i];
      }
    }
  }
}

template <class R>
int64_t scan_update_scratch_bytes(const ScanUpdate& p) {
  return ((p.dims.complex ? 2 : 1) * (2 * kUpdateRows + 2) * padded(p.dims.n) + 7 * (kUpdateRows + kPad)) *
         sizeof(R);
}

template <class R, bool kComplex>
void scan_update(const ScanUpdate& p, int64_t unit_begin, int64_t unit_end, R* scratch) {
  const ScanUpdateDims& dims = p.dims;
  using S = State<R, kComplex>;
  constexpr int64_t kLd = kUpdateRows + kPad, kParts = kComplex ? 2 : 1;
  R *D = scratch, *bias = D + kLd, *u = bias + kLd, *delta = u + kLd, *delta_u = delta + kLd,
    *z = delta_u + kLd, *o = z + kLd;
  R *A_copy = o + kLd, *h_copy = A_copy + kParts * kUpdateRows * padded(dims.n),
    *B_copy = h_copy + kParts * kUpdateRows * padded(dims.n), *C_copy = B_copy + kParts * padded(dims.n);
  const int64_t per_B = dims.d / dims.groups_B, per_C = dims.d / dims.groups_C;
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t c0 = unit * kUpdateRows, channels = dims.d - c0 < kUpdateRows ? dims.d - c0 : kUpdateRows;
    const auto load_channels = [&](R* dst, const View& v, int64_t offset, int64_t stride) {
      if (v)
        load_tile(dst, kLd, v, offset + c0 * stride, 1, 0, channels, stride);
      else
        for (int64_t i = 0; i < kUpdateRows; ++i) dst[i] = 0;
    };
    load_channels(D, p.D, 0, p.D.stride[0]);
    load_channels(bias, p.delta_bias, 0, p.delta_bias.stride[0]);
    const StateMatrix<R, kComplex> A(p.A, c0 * p.A.stride[0], channels, p.A.stride[0], dims.n, p.A.stride[1],
                                     A_copy);
    for (int64_t b = 0; b < dims.b; ++b) {
      const int64_t row = state_row(p.rows, b);
      const auto store_y = [&](int64_t t, const R* src) {
        store_tile(p.y, b * p.y.stride[0] + c0 * p.y.stride[1] + t * p.y.stride[2], 1, 0, channels,
                   p.y.stride[1], src, kLd);
      };
      if (row < 0) {
        for (int64_t i = 0; i < kLd; ++i) o[i] = 0;
        for (int64_t t = 0; t < dims.t; ++t) store_y(t, o);
        continue;
      }
      const int64_t at = row * p.state.stride[0] + c0 * p.state.stride[1];
      const StateMatrix<R, kComplex> h(p.state, at, channels, p.state.stride[1], dims.n, p.state.stride[2],
                                       h_copy);
      for (int64_t t = 0; t < dims.t; ++t) {
        load_channels(u, p.u, b * p.u.stride[0] + t * p.u.stride[2], p.u.stride[1]);
        load_channels(delta, p.delta, b * p.delta.stride[0] + t * p.delta.stride[2], p.delta.stride[1]);
        if (p.z) load_channels(z, p.z, b * p.z.stride[0] + t * p.z.stride[2], p.z.stride[1]);
        for (int64_t v = 0; v < channels; v += kWidth<R>) {
          const Vec<R> raw = load<R>(delta + v) + load<R>(bias + v),
                       dt = dims.softplus ? softplus<R>(raw) : raw;
          store<R>(delta + v, dt);
          store<R>(delta_u + v, dt * load<R>(u + v));
        }
        for (int64_t c = 0; c < channels;) {  // stretches of channels of one group of B and one of C
          const int64_t gB = (c0 + c) / per_B, gC = (c0 + c) / per_C;
          int64_t end = (gB + 1) * per_B < (gC + 1) * per_C ? (gB + 1) * per_B : (gC + 1) * per_C;
          end = end - c0 < channels ? end - c0 : channels;
          const auto states = [&](const View& v, int64_t g, R* copy) {
            return StateMatrix<R, kComplex>(v, b * v.stride[0] + g * v.stride[1] + t * v.stride[3], 1, 0,
                                            dims.n, v.stride[2], copy);
          };
          advance_states(o, h, c, end - c, dims.n, delta_u, states(p.B, gB, B_copy), states(p.C, gC, C_copy),
                         [&](int64_t channel, int64_t i) {
                           S a = load_state<S, R>(A.data + channel * A.ld + i, A.plane);
                           a.re *= kLog2e<R>;
                           return mamba_ops::MAMBA_ISA::decay<R>(splat(delta[channel]), a);
                         });
          c = end;
        }
        if constexpr (kComplex)
          for (int64_t i = 0; i < channels; ++i) o[i] *= 2;
        skip_and_gate<R>(o, D, u, p.z ? z : nullptr, channels);
        store_y(t, o);
      }
      h.store(p.state, at, channels, p.state.stride[1], dims.n, p.state.stride[2]);
    }
  }
}

template <class R>
void selective_state_update(const ScanUpdate& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  p.dims.complex ? scan_update<R, true>(p, unit_begin, unit_end, static_cast<R*>(scratch))
                 : scan_update<R, false>(p, unit_begin, unit_end, static_cast<R*>(scratch));
}

template <class R>
int64_t ssd_update_scratch_bytes(const SsdUpdate& p) {
  return ((kUpdateRows + 2) * padded(p.dims.n) + 5 * (kUpdateRows + kPad)) * sizeof(R);
}

template <class R>
MAMBA_INLINE R value_at(const View& v, int64_t offset) {
  R out = 0;
  if (v) with_type(v.dtype, [&]<class T>(T*) { out = to_real<R>(static_cast<const T*>(v.data)[offset]); });
  return out;
}

template <class R>
void ssd_state_update(const SsdUpdate& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  const SsdUpdateDims& dims = p.dims;
  constexpr int64_t kLd = kUpdateRows + kPad;
  R *D = static_cast<R*>(scratch), *x = D + kLd, *dt_x = x + kLd, *z = dt_x + kLd, *o = z + kLd;
  R *h_copy = o + kLd, *B_copy = h_copy + kUpdateRows * padded(dims.n), *C_copy = B_copy + padded(dims.n);
  const int64_t blocks = (dims.p + kUpdateRows - 1) / kUpdateRows;
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t head = unit / blocks, p0 = unit % blocks * kUpdateRows;
    const int64_t rows = dims.p - p0 < kUpdateRows ? dims.p - p0 : kUpdateRows;
    const int64_t gB = head / (dims.h / dims.groups_B), gC = head / (dims.h / dims.groups_C);
    const R bias = value_at<R>(p.dt_bias, head * p.dt_bias.stride[0]);
    R A = value_at<R>(p.A, head * p.A.stride[0]);
    if (dims.A_is_log) A = -exp(splat(A))[0];
    if (p.D)
      load_tile(D, kLd, p.D, head * p.D.stride[0] + p0 * p.D.stride[1], 1, 0, rows, p.D.stride[1]);
    else
      for (int64_t i = 0; i < kLd; ++i) D[i] = 0;
    for (int64_t b = 0; b < dims.b; ++b) {
      const int64_t row = state_row(p.rows, b);
      const auto offset = [&](const View& v, int64_t t) {
        return b * v.stride[0] + t * v.stride[1] + head * v.stride[2] + p0 * v.stride[3];
      };
      const auto store_y = [&](int64_t t, const R* src) {
        store_tile(p.y, offset(p.y, t), 1, 0, rows, p.y.stride[3], src, kLd);
      };
      if (row < 0) {
        for (int64_t i = 0; i < kLd; ++i) o[i] = 0;
        for (int64_t t = 0; t < dims.t; ++t) store_y(t, o);
        continue;
      }
      const int64_t at = row * p.state.stride[0] + head * p.state.stride[1] + p0 * p.state.stride[2];
      const StateMatrix<R, false> h(p.state, at, rows, p.state.stride[2], dims.n, p.state.stride[3], h_copy);
      for (int64_t t = 0; t < dims.t; ++t) {
        const R raw =
            value_at<R>(p.dt, b * p.dt.stride[0] + t * p.dt.stride[1] + head * p.dt.stride[2]) + bias;
        R dt = dims.softplus ? softplus<R>(splat(raw))[0] : raw;
        dt = dt < R(dims.dt_min) ? R(dims.dt_min) : dt > R(dims.dt_max) ? R(dims.dt_max) : dt;
        const State<R, false> decay = {exp(splat(dt * A))};
        load_tile(x, kLd, p.x, offset(p.x, t), 1, 0, rows, p.x.stride[3]);
        if (p.z) load_tile(z, kLd, p.z, offset(p.z, t), 1, 0, rows, p.z.stride[3]);
        for (int64_t i = 0; i < rows; ++i) dt_x[i] = dt * x[i];
        const auto states = [&](const View& v, int64_t g, R* copy) {
          return StateMatrix<R, false>(v, b * v.stride[0] + t * v.stride[1] + g * v.stride[2], 1, 0, dims.n,
                                       v.stride[3], copy);
        };
        advance_states(o, h, 0, rows, dims.n, dt_x, states(p.B, gB, B_copy), states(p.C, gC, C_copy),
                       [&](int64_t, int64_t) { return decay; });
        skip_and_gate<R>(o, D, x, p.z ? z : nullptr, rows);
        store_y(t, o);
      }
      h.store(p.state, at, rows, p.state.stride[2], dims.n, p.state.stride[3]);
    }
  }
}

}  // namespace mamba_ops::MAMBA_ISA

// Causal depthwise convolution, forward and backward.
//
//   x~ = [init, x];  c_t = bias + sum_k W_k x~_{t+k};  y_t = silu(c_t) or c_t;  final = last w - 1 of x~
//   gc = gy silu'(c);  gx~_s = sum_k W_k gc_{s-k} (+ gfinal);  gW_k = sum_t gc_t x~_{t+k};  gbias = sum_t
//   gc_t
//
// A unit of work owns one group of pieces and kConvChannels channels. It walks the tokens in tiles of
// kConvTokens rows, in scratch: x with its w - 1 left neighbours | dy, gc with w - 1 right neighbours |
// result. c is computed again in the backward, not saved. Every sum over tokens is taken tile by tile by one
// unit: bitwise the same for any number of threads.
#pragma once
#include "kernels/causal_conv1d.h"
#include "kernels/cpu/tile.h"

namespace mamba_ops::MAMBA_ISA {

inline constexpr int64_t kConvTokens = 64;
inline constexpr int64_t kConvRows = kConvTokens + 2 * (kConvMaxWidth - 1);

template <class R>
int64_t conv_scratch_bytes() {
  return (4 * kConvRows + 2 * (kConvMaxWidth + 1)) * kConvChannels * sizeof(R);
}

// The channels of a unit and what it keeps of the parameters: taps[k * kConvChannels + channel], bias last.
template <class R>
struct ConvUnit {
  int64_t group, c0, channels;
  R* taps;

  ConvUnit(const ConvFwd& p, int64_t unit, R* taps_) : taps(taps_) {
    group = unit / p.dims.channel_blocks();
    c0 = unit % p.dims.channel_blocks() * kConvChannels;
    channels = p.dims.d - c0 < kConvChannels ? p.dims.d - c0 : kConvChannels;
    load_tile(taps, kConvChannels, p.weight, c0 * p.weight.stride[0], p.dims.w, p.weight.stride[1], channels,
              p.weight.stride[0]);
    R* bias = taps + p.dims.w * kConvChannels;
    if (p.bias)
      load_tile(bias, kConvChannels, p.bias, c0 * p.bias.stride[0], 1, 0, channels, p.bias.stride[0]);
    else
      for (int64_t i = 0; i < kConvChannels; ++i) bias[i] = 0;
  }
};

// Rows [begin, end) of x~ in tokens of the row (so begin may reach w - 1 before the run), into dst.
template <class R>
void load_conv_input(R* dst, const ConvFwd& p, const Piece& piece, const ConvUnit<R>& unit, int64_t begin,
                     int64_t end) {
  const int64_t before = piece.run_begin > begin ? piece.run_begin - begin : 0;
  if (before > 0) {
    if (p.initial_state && piece.state_in >= 0) {
      const View& s = p.initial_state;
      const int64_t skip = p.dims.w - 1 - before;
      load_tile(dst, kConvChannels, s,
                piece.state_in * s.stride[0] + unit.c0 * s.stride[1] + skip * s.stride[2], before,
                s.stride[2], unit.channels, s.stride[1]);
    } else {
      for (int64_t i = 0; i < before * kConvChannels; ++i) dst[i] = 0;
    }
  }
  load_tile(dst + before * kConvChannels, kConvChannels, p.x,
            piece.row * p.x.stride[0] + unit.c0 * p.x.stride[1] + (begin + before) * p.x.stride[2],
            end - begin - before, p.x.stride[2], unit.channels, p.x.stride[1]);
}

// The taps of one vector of channels, and the window of inputs that slides over them.
template <class R, int kTaps>
struct Window {
  Vec<R> tap[kTaps], bias, in[kTaps];

  MAMBA_INLINE Window(const ConvUnit<R>& unit, const R* x, int64_t v)
      : bias(load<R>(unit.taps + kTaps * kConvChannels + v)) {
    for (int k = 0; k < kTaps; ++k) {
      tap[k] = load<R>(unit.taps + k * kConvChannels + v);
      in[k] = k ? load<R>(x + (k - 1) * kConvChannels + v) : Vec<R>{};
    }
  }
  MAMBA_INLINE Vec<R> next(Vec<R> x) {  // c of the token that x is the input of
    Vec<R> c = bias;
    for (int k = 0; k < kTaps - 1; ++k) c += tap[k] * (in[k] = in[k + 1]);
    return c + tap[kTaps - 1] * (in[kTaps - 1] = x);
  }
};

template <class F>
MAMBA_INLINE void with_taps(int w, F f) {
  w == 2 ? f.template operator()<2>() : w == 3 ? f.template operator()<3>() : f.template operator()<4>();
}

// y of `tokens` tokens; x begins w - 1 before the first.
template <class R>
MAMBA_INLINE void conv_outputs(R* y, const ConvDims& dims, const ConvUnit<R>& unit, const R* x,
                               int64_t tokens) {
  with_taps(dims.w, [&]<int kTaps>() {
    for (int64_t v = 0; v < unit.channels; v += kWidth<R>) {
      Window<R, kTaps> window(unit, x, v);
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec<R> c = window.next(load<R>(x + (t + kTaps - 1) * kConvChannels + v));
        store<R>(y + t * kConvChannels + v, dims.silu ? silu<R>(c) : c);
      }
    }
  });
}

template <class R>
void causal_conv1d_fwd(const ConvFwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  const int w = p.dims.w;
  R* x = static_cast<R*>(scratch);
  R* y = x + kConvRows * kConvChannels;
  for (int64_t u = unit_begin; u < unit_end; ++u) {
    const ConvUnit<R> unit(p, u, y + kConvRows * kConvChannels);
    for (int64_t i = p.pieces.group[unit.group]; i < p.pieces.group[unit.group + 1]; ++i) {
      const Piece& piece = p.pieces.piece[i];
      for (int64_t t0 = piece.begin; t0 < piece.end; t0 += kConvTokens) {
        const int64_t t1 = t0 + kConvTokens < piece.end ? t0 + kConvTokens : piece.end;
        load_conv_input(x, p, piece, unit, t0 - (w - 1), t1);
        conv_outputs(y, p.dims, unit, x, t1 - t0);
        store_tile(p.y, piece.row * p.y.stride[0] + unit.c0 * p.y.stride[1] + t0 * p.y.stride[2], t1 - t0,
                   p.y.stride[2], unit.channels, p.y.stride[1], y, kConvChannels);
      }
      if (p.final_state && piece.state_out >= 0 && piece.end == piece.run_end) {
        load_conv_input(x, p, piece, unit, piece.end - (w - 1), piece.end);
        const View& s = p.final_state;
        store_tile(s, piece.state_out * s.stride[0] + unit.c0 * s.stride[1], w - 1, s.stride[2],
                   unit.channels, s.stride[1], x, kConvChannels);
      }
    }
  }
}

template <class R>
void causal_conv1d_bwd(const ConvBwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  const ConvDims& dims = p.fwd.dims;
  const int64_t halo = dims.w - 1, ld = kConvChannels;
  R* x = static_cast<R*>(scratch);
  R* dy = x + kConvRows * ld;
  R* gc = dy + kConvRows * ld;
  R* out = gc + kConvRows * ld;
  R* sums = out + kConvRows * ld;
  for (int64_t u = unit_begin; u < unit_end; ++u) {
    const ConvUnit<R> unit(p.fwd, u, sums + (dims.w + 1) * ld);
    const int64_t width = padded(unit.channels);
    for (int64_t i = 0; i < (dims.w + 1) * ld; ++i) sums[i] = 0;

    for (int64_t i = p.fwd.pieces.group[unit.group]; i < p.fwd.pieces.group[unit.group + 1]; ++i) {
      const Piece& piece = p.fwd.pieces.piece[i];
      const View gfinal = piece.state_out >= 0 ? p.dfinal : View{};
      const View ginit = piece.state_in >= 0 ? p.dinitial : View{};
      // gx~ of the rows [s0, s1) of x~ (s = token + halo) is written where it belongs: ginit, then gx.
      const int64_t first = piece.begin == piece.run_begin ? piece.begin - halo : piece.begin;
      for (int64_t t0 = first; t0 < piece.end; t0 += kConvTokens) {
        const int64_t t1 = t0 + kConvTokens < piece.end ? t0 + kConvTokens : piece.end;
        // gc over [lo, hi): the tokens whose taps reach rows [t0, t1) of x~.
        const int64_t lo = t0 > piece.run_begin ? t0 : piece.run_begin;
        const int64_t hi = t1 + halo < piece.run_end ? t1 + halo : piece.run_end;
        const int64_t tokens = hi > lo ? hi - lo : 0;
        if (tokens > 0) {
          load_conv_input(x, p.fwd, piece, unit, lo - halo, hi);
          load_tile(dy, ld, p.dy, piece.row * p.dy.stride[0] + unit.c0 * p.dy.stride[1] + lo * p.dy.stride[2],
                    tokens, p.dy.stride[2], unit.channels, p.dy.stride[1]);
        }
        const int64_t mine = (t1 < hi ? t1 : hi) - lo;  // the tokens after them count in the next tile
        with_taps(dims.w, [&]<int kTaps>() {
          for (int64_t v = 0; v < width; v += kWidth<R>) {
            Window<R, kTaps> window(unit, x, v);
            Vec<R> sum[kTaps + 1] = {};
            for (int64_t t = 0; t < tokens; ++t) {
              const Vec<R> c = window.next(load<R>(x + (t + kTaps - 1) * ld + v));
              Vec<R> g = load<R>(dy + t * ld + v);
              if (dims.silu) g *= silu_grad<R>(c);
              store<R>(gc + t * ld + v, g);
              if (t >= mine) continue;
              for (int k = 0; k < kTaps; ++k) sum[k] += g * window.in[k];
              sum[kTaps] += g;
            }
            for (int k = 0; k <= kTaps; ++k) store<R>(sums + k * ld + v, load<R>(sums + k * ld + v) + sum[k]);
            for (int64_t s = t0; s < t1; ++s) {  // token s of x~; before the run: the initial state
              Vec<R> g = {};
              for (int k = 0; k < kTaps; ++k) {
                const int64_t t = s + kTaps - 1 - k;
                if (t >= lo && t < hi) g += window.tap[k] * load<R>(gc + (t - lo) * ld + v);
              }
              store<R>(out + (s - t0) * ld + v, g);
            }
          }
        });
        if (gfinal && t1 > piece.run_end - halo) {  // the last w - 1 rows of x~ are also the final state
          const int64_t from = t0 > piece.run_end - halo ? t0 : piece.run_end - halo;
          load_tile(dy, ld, gfinal,
                    piece.state_out * gfinal.stride[0] + unit.c0 * gfinal.stride[1] +
                        (from - (piece.run_end - halo)) * gfinal.stride[2],
                    t1 - from, gfinal.stride[2], unit.channels, gfinal.stride[1]);
          for (int64_t i2 = 0; i2 < (t1 - from) * ld; ++i2) out[(from - t0) * ld + i2] += dy[i2];
        }
        const int64_t split = t0 < piece.run_begin ? (piece.run_begin < t1 ? piece.run_begin : t1) - t0 : 0;
        if (split > 0 && ginit)
          store_tile(ginit,
                     piece.state_in * ginit.stride[0] + unit.c0 * ginit.stride[1] +
                         (t0 + halo - piece.run_begin) * ginit.stride[2],
                     split, ginit.stride[2], unit.channels, ginit.stride[1], out, ld);
        if (t1 - t0 > split)
          store_tile(p.dx,
                     piece.row * p.dx.stride[0] + unit.c0 * p.dx.stride[1] + (t0 + split) * p.dx.stride[2],
                     t1 - t0 - split, p.dx.stride[2], unit.channels, p.dx.stride[1], out + split * ld, ld);
      }
    }
    R* partial = static_cast<R*>(p.partial) + unit.group * (dims.w + 1) * padded(dims.d) + unit.c0;
    for (int64_t k = 0; k <= dims.w; ++k)
      for (int64_t v = 0; v < width; v += kWidth<R>)
        store<R>(partial + k * padded(dims.d) + v, load<R>(sums + k * ld + v));
  }
}

// dweight and dbias from the partial sums of the groups.
template <class R>
void causal_conv1d_reduce(const ConvBwd& p) {
  const int64_t d = p.fwd.dims.d, w = p.fwd.dims.w, ld = padded(d), groups = p.fwd.pieces.groups;
  const R* partial = static_cast<const R*>(p.partial);
  sum_partials(p.dweight, 0, w, p.dweight.stride[1], d, p.dweight.stride[0], partial, ld, groups,
               (w + 1) * ld);
  if (p.dbias)
    sum_partials(p.dbias, 0, 1, 0, d, p.dbias.stride[0], partial + w * ld, ld, groups, (w + 1) * ld);
}

}  // namespace mamba_ops::MAMBA_ISA

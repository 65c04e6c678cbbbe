// What the forward and the backward of the selective scan share: a unit of work, its tiles, and the
// recurrence itself.
//
// A unit owns one group of pieces and up to kScanChannels channels that share B and C. Lanes are channels.
// Tokens go by in tiles, and the channels of a tile in strips of kScanStrip: few enough rows for the caches,
// also where the rows of a tensor lie a power of two apart. While a strip is computed the next one is on its
// way. For each vector of channels and each block of kBlock states, the states stay in registers over a whole
// tile. Planes: state i, part (re, im) of a buffer over states is at plane(part, i) =
// part * padded(n) + i.
#pragma once
#include "kernels/cpu/arena.h"
#include "kernels/cpu/scan_state.h"
#include "kernels/cpu/tile.h"
#include "kernels/selective_scan.h"

namespace mamba_ops::MAMBA_ISA {

inline constexpr int64_t kScanLd =
    kScanChannels + kPad;  // an odd number of cache lines: rows fall into all cache sets
inline constexpr int64_t kScanStrip = kPad;
static_assert(kScanChannels % kScanStrip == 0);
template <bool kComplex>
inline constexpr int kBlock = kComplex ? 2 : 4;

template <class R>
struct ScanUnit {
  int64_t pieces;  // group of pieces
  int64_t block;   // of channels
  int64_t group_B, group_C;
  int64_t c0, channels;
  int64_t strip, strip_channels, strip_width;  // the strip begins at channel c0 + strip
  int64_t planes;                              // parts * padded(n)
  R *A, *state;  // (planes, kScanLd): A with its real part times log2(e); the state of the tile's first token
  R *B, *C;      // (tokens, planes), or (planes, kScanLd) where constant
  R *bias, *D;   // (kScanLd)
  R *delta, *delta_u, *y;  // of the strip: (tokens, kScanStrip)

  ScanUnit(const ScanDims& dims, int64_t tokens, Arena<R>& arena) : planes(dims.parts() * padded(dims.n)) {
    A = arena.take(planes * kScanLd);
    state = arena.take(planes * kScanLd);
    B = arena.take(planes * (dims.constant_B ? kScanLd : tokens));
    C = arena.take(planes * (dims.constant_C ? kScanLd : tokens));
    bias = arena.take(kScanLd);
    D = arena.take(kScanLd);
    delta = arena.take(tokens * kScanStrip);
    delta_u = arena.take(tokens * kScanStrip);
    y = arena.take(tokens * kScanStrip);
  }

  // Takes unit number `unit` and loads what is the same for all of its tokens.
  void begin(const ScanFwd& p, int64_t unit) {
    const ScanDims& dims = p.dims;
    const int64_t share = dims.sharing(), per_share = dims.blocks_per_share();
    block = unit % dims.channel_blocks();
    pieces = unit / dims.channel_blocks();
    const int64_t end = (block / per_share + 1) * share;
    c0 = block / per_share * share + block % per_share * kScanChannels;
    channels = end - c0 < kScanChannels ? end - c0 : kScanChannels;
    group_B = c0 / (dims.d / dims.groups_B);
    group_C = c0 / (dims.d / dims.groups_C);
    load_parameter(A, dims, p.A);
    for (int64_t i = 0; i < dims.n * kScanLd; ++i) A[i] *= kLog2e<R>;
    if (dims.constant_B) load_parameter(B, dims, p.B);
    if (dims.constant_C && p.C) load_parameter(C, dims, p.C);
    load_channels(bias, p.delta_bias);
    load_channels(D, p.D);
  }

  void clear(R* buffer) const {
    for (int64_t i = 0; i < planes * kScanLd; ++i) buffer[i] = 0;
  }
  // (d, n) -> planes
  void load_parameter(R* dst, const ScanDims& dims, const View& v) const {
    clear(dst);
    for (int64_t part = 0; part < dims.parts(); ++part)
      load_tile(dst + part * padded(dims.n) * kScanLd, kScanLd, v, c0 * v.stride[0] + part, dims.n,
                v.stride[1], channels, v.stride[0]);
  }
  void load_channels(R* dst, const View& v) const {
    for (int64_t i = 0; i < kScanLd; ++i) dst[i] = 0;
    if (v) load_tile(dst, kScanLd, v, c0 * v.stride[0], 1, 0, channels, v.stride[0]);
  }
  // One row of (rows, d, n, parts) <-> planes
  static View state_view(const void* states) {
    return {const_cast<void*>(states), sizeof(R) == sizeof(double) ? DType::f64 : DType::f32, {}};
  }
  void load_state(R* dst, const ScanDims& dims, const void* states, int64_t row) const {
    clear(dst);
    if (!states || row < 0) return;
    const int64_t parts = dims.parts();
    for (int64_t part = 0; part < parts; ++part)
      load_tile(dst + part * padded(dims.n) * kScanLd, kScanLd, state_view(states),
                ((row * dims.d + c0) * dims.n) * parts + part, dims.n, parts, channels, dims.n * parts);
  }
  void store_state(const ScanDims& dims, void* states, int64_t row, const R* src) const {
    if (!states || row < 0) return;
    const int64_t parts = dims.parts();
    for (int64_t part = 0; part < parts; ++part)
      store_tile(state_view(states), ((row * dims.d + c0) * dims.n) * parts + part, dims.n, parts, channels,
                 dims.n * parts, src + part * padded(dims.n) * kScanLd, kScanLd);
  }
  // The state that enters token t0, a multiple of kScanCheckpoint, of a row: (b, chunks, parts, n, d) <->
  // planes
  int64_t checkpoint_at(const ScanDims& dims, int64_t row, int64_t t0) const {
    return (row * (dims.l / kScanCheckpoint) + t0 / kScanCheckpoint - 1) * dims.parts() * dims.n * dims.d +
           c0;
  }
  void store_checkpoint(const ScanFwd& p, int64_t row, int64_t t0) const {
    for (int64_t part = 0; part < p.dims.parts(); ++part)
      store_tile(state_view(p.checkpoints), checkpoint_at(p.dims, row, t0) + part * p.dims.n * p.dims.d,
                 p.dims.n, p.dims.d, channels, 1, state + part * padded(p.dims.n) * kScanLd, kScanLd);
  }
  void load_checkpoint(const ScanFwd& p, int64_t row, int64_t t0) const {
    clear(state);
    for (int64_t part = 0; part < p.dims.parts(); ++part)
      load_tile(state + part * padded(p.dims.n) * kScanLd, kScanLd, state_view(p.checkpoints),
                checkpoint_at(p.dims, row, t0) + part * p.dims.n * p.dims.d, p.dims.n, p.dims.d, channels, 1);
  }

  void take_strip(int64_t first) {
    strip = first;
    strip_channels = channels - first < kScanStrip ? channels - first : kScanStrip;
    strip_width = whole_vectors<R>(strip_channels);
  }
  // Tokens [t0, t1) of the strip of a (b, d, l) tensor <-> (tokens, kScanStrip)
  void load_tokens(R* dst, const View& v, int64_t row, int64_t t0, int64_t t1) const {
    load_tile(dst, kScanStrip, v, row * v.stride[0] + (c0 + strip) * v.stride[1] + t0 * v.stride[2], t1 - t0,
              v.stride[2], strip_channels, v.stride[1]);
  }
  void store_tokens(const View& v, int64_t row, int64_t t0, int64_t t1, const R* src) const {
    store_tile(v, row * v.stride[0] + (c0 + strip) * v.stride[1] + t0 * v.stride[2], t1 - t0, v.stride[2],
               strip_channels, v.stride[1], src, kScanStrip);
  }
  // Share `part` of `parts` of the strip, which is about to be stored.
  void prefetch_strip(const View& v, int64_t row, int64_t t0, int64_t t1, int64_t part, int64_t parts) const {
    prefetch(v, strip, row, t0, t1, part, parts);
  }
  // The same of the strip to be loaded next: of the same tokens, or the first of the next tile.
  void prefetch_next_strip(const View& v, int64_t row, int64_t t0, int64_t t1, int64_t next_t0,
                           int64_t next_t1, int64_t part, int64_t parts) const {
    if (strip + kScanStrip < channels)
      prefetch(v, strip + kScanStrip, row, t0, t1, part, parts);
    else if (next_t1 > next_t0)
      prefetch(v, 0, row, next_t0, next_t1, part, parts);
  }
  void prefetch(const View& v, int64_t first, int64_t row, int64_t t0, int64_t t1, int64_t part,
                int64_t parts) const {
    prefetch_tile(v, row * v.stride[0] + (c0 + first) * v.stride[1] + t0 * v.stride[2], t1 - t0, v.stride[2],
                  channels - first < kScanStrip ? channels - first : kScanStrip, v.stride[1], part, parts);
  }
  // Tokens [t0, t1) of B or C (b, g, n, l) -> (tokens, planes); states past n become zero.
  void load_BC(R* dst, const ScanDims& dims, const View& v, int64_t row, int64_t group, int64_t t0,
               int64_t t1) const {
    for (int64_t part = 0; part < dims.parts(); ++part)
      load_tile(dst + part * padded(dims.n), planes, v,
                row * v.stride[0] + group * v.stride[1] + t0 * v.stride[3] + part, t1 - t0, v.stride[3],
                dims.n, v.stride[2]);
  }

  // Of the strip: delta <- the step sizes of tokens [t0, t1), delta_u <- delta u, y <- D u. Where given, u <-
  // u and slope <- the derivative of the step, if there is softplus.
  void load_steps(const ScanFwd& p, int64_t row, int64_t t0, int64_t t1, R* slope = nullptr, R* u = nullptr) {
    if (!u) u = delta_u;
    load_tokens(delta, p.delta, row, t0, t1);
    load_tokens(u, p.u, row, t0, t1);
    for (int64_t t = 0; t < t1 - t0; ++t)
      for (int64_t v = 0; v < strip_width; v += kWidth<R>) {
        const int64_t at = t * kScanStrip + v;
        const Vec<R> x = load<R>(u + at);
        Vec<R> dt = load<R>(delta + at) + load<R>(bias + strip + v);
        if (p.dims.softplus) {
          Vec<R> grad;
          dt = softplus<R>(dt, slope ? &grad : nullptr);
          if (slope) store<R>(slope + at, grad);
        }
        store<R>(delta + at, dt);
        store<R>(delta_u + at, dt * x);
        store<R>(y + at, load<R>(D + strip + v) * x);
      }
  }
};

// B or C of one state block: one value per token for all lanes, or one per lane for all tokens.
template <class R, bool kComplex, bool kConstant>
struct Factor {
  const R* p;
  int64_t row, plane, step;  // from token to token, from re to im, from state to state

  Factor(const R* buffer, const ScanUnit<R>& unit, int64_t state, int64_t v)
      : p(kConstant ? buffer + state * kScanLd + unit.strip + v : buffer + state),
        row(kConstant ? 0 : unit.planes),
        plane(kConstant ? unit.planes / 2 * kScanLd : unit.planes / 2),
        step(kConstant ? kScanLd : 1) {}

  MAMBA_INLINE State<R, kComplex> at(int64_t t, int i) const {
    using S = State<R, kComplex>;
    if constexpr (kConstant)
      return mamba_ops::MAMBA_ISA::load_state<S, R>(p + i * step, plane);
    else
      return splat_state<S, R>(p + t * row + i, plane);
  }
};

// The recurrence over a tile for kBlock states of the vector of channels at v in the strip. kOutput: y += k
// Re(C h). kKeep: a_t and e_t = a_t h_{t-1} of every token go to `kept`, for the backward: [t][a, e][state].
template <class R, bool kComplex, bool kConstB, bool kConstC, bool kOutput, bool kKeep>
MAMBA_INLINE void scan_block(const ScanUnit<R>& unit, int64_t tokens, int64_t state0, int64_t v,
                             State<R, kComplex>* kept = nullptr) {
  using S = State<R, kComplex>;
  constexpr int ni = kBlock<kComplex>;
  const int64_t plane = unit.planes / 2 * kScanLd, at0 = state0 * kScanLd + unit.strip + v;
  const Factor<R, kComplex, kConstB> B(unit.B, unit, state0, v);
  const Factor<R, kComplex, kConstC> C(unit.C, unit, state0, v);
  S A[ni], h[ni];
  for (int i = 0; i < ni; ++i) {
    A[i] = load_state<S, R>(unit.A + at0 + i * kScanLd, plane);
    h[i] = load_state<S, R>(unit.state + at0 + i * kScanLd, plane);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = t * kScanStrip + v;
    const Vec<R> dt = load<R>(unit.delta + at), dtu = load<R>(unit.delta_u + at);
    Vec<R> out = {};
    for (int i = 0; i < ni; ++i) {
      const S a = decay<R>(dt, A[i]), e = mul<R>(a, h[i]);
      h[i] = add_scaled<R>(e, dtu, B.at(t, i));
      if constexpr (kOutput) out = add_re_mul<R>(out, C.at(t, i), h[i]);
      if constexpr (kKeep) {
        kept[2 * ni * t + i] = a;
        kept[2 * ni * t + ni + i] = e;
      }
    }
    if constexpr (kOutput) {
      store<R>(unit.y + at, load<R>(unit.y + at) + (kComplex ? R(2) : R(1)) * out);
    }
  }
  for (int i = 0; i < ni; ++i) store_state<R>(unit.state + at0 + i * kScanLd, plane, h[i]);
}

// f.template operator()<kComplex, kConstB, kConstC>() for what the call has.
template <class F>
MAMBA_INLINE void with_kinds(const ScanDims& dims, F f) {
  const auto with_C = [&]<bool kComplex, bool kConstB>() {
    dims.constant_C ? f.template operator()<kComplex, kConstB, true>()
                    : f.template operator()<kComplex, kConstB, false>();
  };
  const auto with_B = [&]<bool kComplex>() {
    dims.constant_B ? with_C.template operator()<kComplex, true>()
                    : with_C.template operator()<kComplex, false>();
  };
  dims.complex ? with_B.template operator()<true>() : with_B.template operator()<false>();
}

}  // namespace mamba_ops::MAMBA_ISA

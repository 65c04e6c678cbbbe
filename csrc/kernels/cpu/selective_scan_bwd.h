// Selective scan, backward (conj is the identity for a real scan):
//
//   lambda_t = k conj(C_t) go_t + conj(a_{t+1}) lambda_{t+1}          dh0 = conj(a_0) lambda_0
//   dC_t = k go_t conj(h_t)   dB_t = delta_t u_t lambda_t             e_t = a_t h_{t-1}
//   s_t = sum_i Re(conj(B_t) lambda_t)                                du_t = delta_t s_t + D go_t
//   ddelta_t = (u_t s_t + sum_i Re(conj(A e_t) lambda_t)) softplus'   dA = sum_t delta_t conj(e_t) lambda_t
//   go = dy silu(z);  dz = dy o silu'(z);  dD = sum_t go_t u_t;  dbias = sum_t ddelta_t
//
// Units, lanes and tiles: scan_tile.h, with tiles of kScanCheckpoint tokens taken right to left. A tile
// starts from its checkpoint; for every block of states the recurrence runs forward once more, keeping a_t
// and e_t of the tile, and then backward with lambda in registers. Sums over channels (dB, dC) are taken
// across lanes tile by tile into one partial per block of channels; sums over tokens (dA, dD, dbias) tile by
// tile into one partial per group of pieces. A second pass adds the partials in order.
#pragma once
#include "kernels/cpu/scan_tile.h"

namespace mamba_ops::MAMBA_ISA {

// Lane sums of kCount vectors at once, packed: value i ends in lanes [i, i + 1) * kWidth / kCount, not yet
// added up there.
template <int kBlockSize, int kCount, class R>
MAMBA_INLINE Vec<R> pack_sums(Vec<R>* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    const auto [low, high] = swap_masks<kBlockSize, R>();
    for (int i = 0; i < kCount / 2; ++i)
      v[i] =
          __builtin_shuffle(v[i], v[i + kCount / 2], low) + __builtin_shuffle(v[i], v[i + kCount / 2], high);
    return pack_sums<kBlockSize / 2, kCount / 2, R>(v);
  }
}

// The sums over channels of one block of states: kSums sums of kLanes lanes each, in kVecs vectors.
template <class R>
struct Packing {
  static constexpr int kSums = 4;  // kBlock states times parts
  static constexpr int kPer = kSums < kWidth<R> ? kSums : kWidth<R>;
  static constexpr int kVecs = kSums / kPer, kLanes = kWidth<R> / kPer;
  static constexpr int kSize = kVecs * kWidth<R>;
};

// Adds up neighbouring lanes of kLanes vectors, `stride` apart: their sums, in order.
template <int kLanes, class R>
MAMBA_INLINE Vec<R> unpack_sums(const R* from, int64_t stride) {
  if constexpr (kLanes == 1) {
    return load<R>(from);
  } else {
    const Vec<R> a = unpack_sums<kLanes / 2, R>(from, stride),
                 b = unpack_sums<kLanes / 2, R>(from + kLanes / 2 * stride, stride);
    IntVec<R> even, odd;
    for (int i = 0; i < kWidth<R>; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
    }
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  }
}

template <class R, bool kComplex>
MAMBA_INLINE void add_packed(R* to, State<R, kComplex>* s) {
  Vec<R> v[Packing<R>::kSums];
  constexpr int ni = kBlock<kComplex>;
  for (int i = 0; i < ni; ++i) {
    v[i] = s[i].re;
    if constexpr (kComplex) v[ni + i] = s[i].im;
  }
  for (int k = 0; k < Packing<R>::kVecs; ++k) {
    const Vec<R> sum = pack_sums<kWidth<R> / 2, Packing<R>::kPer, R>(v + k * Packing<R>::kPer);
    store<R>(to + k * kWidth<R>, load<R>(to + k * kWidth<R>) + sum);
  }
}

template <class R>
struct ScanBackward {
  ScanUnit<R> unit;
  R *slope, *u, *z, *go, *s, *ddelta;  // of the strip: (tokens, kScanStrip)
  R *lambda, *dA, *dB, *dC;            // (planes, kScanLd); dB, dC where constant
  R *dD, *dbias;                       // (kScanLd)
  R *packed_B,
      *packed_C;  // (blocks of states, kScanCheckpoint, Packing::kSize): sums over the unit's channels
  R* kept;        // a_t, e_t of a block of states over a tile
  int64_t packed_size;
  static constexpr int64_t kPackedLd = kScanCheckpoint * Packing<R>::kSize;

  ScanBackward(const ScanDims& dims, Arena<R>& arena)
      : unit(dims, kScanCheckpoint, arena),
        packed_size(padded(dims.n * dims.parts()) / Packing<R>::kSums * kPackedLd) {
    for (R** buffer : {&slope, &u, &z, &go, &s, &ddelta}) *buffer = arena.take(kScanCheckpoint * kScanStrip);
    for (R** buffer : {&lambda, &dA}) *buffer = arena.take(unit.planes * kScanLd);
    dB = arena.take(dims.constant_B ? unit.planes * kScanLd : 0);
    dC = arena.take(dims.constant_C ? unit.planes * kScanLd : 0);
    for (R** buffer : {&dD, &dbias}) *buffer = arena.take(kScanLd);
    packed_B = arena.take(dims.constant_B ? 0 : packed_size);
    packed_C = arena.take(dims.constant_C ? 0 : packed_size);
    kept = arena.take(kScanCheckpoint * 2 * 4 * kWidth<R>);
  }

  // The reversed recurrence over a tile for kBlock states of the vector of channels at v in the strip.
  template <bool kComplex, bool kConstB, bool kConstC>
  MAMBA_INLINE void reverse_block(int64_t tokens, int64_t state0, int64_t v) {
    using S = State<R, kComplex>;
    constexpr int ni = kBlock<kComplex>;
    const R k = kComplex ? 2 : 1;
    const int64_t plane = unit.planes / 2 * kScanLd, at0 = state0 * kScanLd + unit.strip + v;
    const Factor<R, kComplex, kConstB> B(unit.B, unit, state0, v);
    const Factor<R, kComplex, kConstC> C(unit.C, unit, state0, v);
    const S* keep = reinterpret_cast<const S*>(kept);
    const int64_t pack = state0 / ni * kPackedLd;
    S A[ni], lam[ni], gA[ni], gB[ni], gC[ni];
    for (int i = 0; i < ni; ++i) {
      A[i] = load_state<S, R>(unit.A + at0 + i * kScanLd, plane);
      A[i].re *= R(1) / kLog2e<R>;
      lam[i] = load_state<S, R>(lambda + at0 + i * kScanLd, plane);
      gA[i] = gB[i] = gC[i] = S{};
    }
    for (int64_t t = tokens - 1; t >= 0; --t) {
      const int64_t at = t * kScanStrip + v;
      const Vec<R> g = k * load<R>(go + at), dt = load<R>(unit.delta + at), dtu = load<R>(unit.delta_u + at);
      Vec<R> st = {}, gdt = {};
      for (int i = 0; i < ni; ++i) {
        const S a = keep[2 * ni * t + i], e = keep[2 * ni * t + ni + i], b = B.at(t, i);
        const S h = add_scaled<R>(e, dtu, b);
        lam[i] = add_conj<R>(lam[i], g, C.at(t, i));
        if constexpr (kConstC)
          gC[i] = add_conj<R>(gC[i], g, h);
        else
          gC[i] = scale<R>(g, conj<R>(h));
        if constexpr (kConstB)
          gB[i] = add_scaled<R>(gB[i], dtu, lam[i]);
        else
          gB[i] = scale<R>(dtu, lam[i]);
        st = add_re_conj_mul<R>(st, b, lam[i]);
        const S el = conj_mul<R>(e, lam[i]);
        gA[i] = add_scaled<R>(gA[i], dt, el);
        gdt = add_re_conj_mul<R>(gdt, A[i], el);
        lam[i] = conj_mul<R>(a, lam[i]);
      }
      if constexpr (!kConstB) add_packed<R, kComplex>(packed_B + pack + t * Packing<R>::kSize, gB);
      if constexpr (!kConstC) add_packed<R, kComplex>(packed_C + pack + t * Packing<R>::kSize, gC);
      store<R>(s + at, load<R>(s + at) + st);
      store<R>(ddelta + at, load<R>(ddelta + at) + gdt);
    }
    for (int i = 0; i < ni; ++i) {
      store_state<R>(lambda + at0 + i * kScanLd, plane, lam[i]);
      add_to_state<R>(dA + at0 + i * kScanLd, plane, gA[i]);
      if constexpr (kConstB) add_to_state<R>(dB + at0 + i * kScanLd, plane, gB[i]);
      if constexpr (kConstC) add_to_state<R>(dC + at0 + i * kScanLd, plane, gC[i]);
    }
  }

  // lambda <- conj(a_t) (k conj(C_t) go_t + lambda), over a tile: what leaves it on the left. No gradients.
  template <bool kComplex, bool kConstC>
  MAMBA_INLINE void adjoint_block(int64_t tokens, int64_t state0, int64_t v) {
    using S = State<R, kComplex>;
    constexpr int ni = kBlock<kComplex>;
    const R k = kComplex ? 2 : 1;
    const int64_t plane = unit.planes / 2 * kScanLd, at0 = state0 * kScanLd + unit.strip + v;
    const Factor<R, kComplex, kConstC> C(unit.C, unit, state0, v);
    S A[ni], lam[ni];
    for (int i = 0; i < ni; ++i) {
      A[i] = load_state<S, R>(unit.A + at0 + i * kScanLd, plane);
      lam[i] = load_state<S, R>(lambda + at0 + i * kScanLd, plane);
    }
    for (int64_t t = tokens - 1; t >= 0; --t) {
      const int64_t at = t * kScanStrip + v;
      const Vec<R> g = k * load<R>(go + at), dt = load<R>(unit.delta + at);
      for (int i = 0; i < ni; ++i)
        lam[i] = conj_mul<R>(decay<R>(dt, A[i]), add_conj<R>(lam[i], g, C.at(t, i)));
    }
    for (int i = 0; i < ni; ++i) store_state<R>(lambda + at0 + i * kScanLd, plane, lam[i]);
  }

  // The same for all states of the strip; delta is summed into dbias, which such a run does not need.
  template <bool kComplex, bool kConstC>
  void adjoint_strip(const ScanDims& dims, int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < kScanStrip; ++i) dbias[unit.strip + i] += unit.delta[t * kScanStrip + i];
    for (int64_t v = 0; v < unit.strip_width; v += kWidth<R>)
      for (int64_t i = 0; i < dims.n; i += kBlock<kComplex>) adjoint_block<kComplex, kConstC>(tokens, i, v);
  }

  void clear_channel_sums(const ScanDims& dims) {
    for (int64_t i = 0; !dims.constant_B && i < packed_size; ++i) packed_B[i] = 0;
    for (int64_t i = 0; !dims.constant_C && i < packed_size; ++i) packed_C[i] = 0;
  }

  // Of the strip: the steps, go, and z <- dy silu'(z), for tokens [t0, t1) of a row.
  void load_strip(const ScanBwd& p, int64_t row, int64_t t0, int64_t t1) {
    unit.load_steps(p.fwd, row, t0, t1, slope, u);
    unit.load_tokens(go, p.dy, row, t0, t1);
    if (!p.fwd.z) return;
    unit.load_tokens(z, p.fwd.z, row, t0, t1);
    for (int64_t t = 0; t < t1 - t0; ++t)
      for (int64_t v = 0; v < unit.strip_width; v += kWidth<R>) {
        const int64_t at = t * kScanStrip + v;
        const Vec<R> dy = load<R>(go + at), gate = load<R>(z + at);
        store<R>(go + at, dy * silu<R>(gate));
        store<R>(z + at, dy * silu_grad<R>(gate));
      }
  }

  // s, ddelta and the packed sums of the strip's channels over a tile.
  template <bool kComplex, bool kConstB, bool kConstC>
  void strip_gradients(const ScanBwd& p, const Piece& piece, int64_t t0, int64_t t1) {
    using S = State<R, kComplex>;
    constexpr int ni = kBlock<kComplex>;
    const int64_t tokens = t1 - t0, blocks = (p.fwd.dims.n + ni - 1) / ni;
    const int64_t parts = unit.strip_width / kWidth<R> * blocks;
    const int64_t left = t0 - kScanCheckpoint > piece.begin ? t0 - kScanCheckpoint : piece.begin;
    for (int64_t i = 0; i < tokens * kScanStrip; ++i) s[i] = ddelta[i] = 0;
    for (int64_t v = 0; v < unit.strip_width; v += kWidth<R>)
      for (int64_t i = 0; i < p.fwd.dims.n; i += ni) {
        const int64_t part = v / kWidth<R> * blocks + i / ni;
        for (const View* view : {&p.fwd.u, &p.fwd.delta, &p.fwd.z, &p.dy})
          unit.prefetch_next_strip(*view, piece.row, t0, t1, left, t0, part, parts);
        for (const View* view : {&p.du, &p.ddelta, &p.dz})
          unit.prefetch_strip(*view, piece.row, t0, t1, part, parts);
        if (p.fwd.z)
          scan_block<R, kComplex, kConstB, kConstC, true, true>(unit, tokens, i, v,
                                                                reinterpret_cast<S*>(kept));
        else
          scan_block<R, kComplex, kConstB, kConstC, false, true>(unit, tokens, i, v,
                                                                 reinterpret_cast<S*>(kept));
        reverse_block<kComplex, kConstB, kConstC>(tokens, i, v);
      }
  }

  // What follows from go, s and ddelta, token by token.
  void store_gradients(const ScanBwd& p, int64_t row, int64_t t0, int64_t t1) {
    for (int64_t v = 0; v < unit.strip_width; v += kWidth<R>) {
      const Vec<R> D = load<R>(unit.D + unit.strip + v);
      Vec<R> sum_D = {}, sum_bias = {};
      for (int64_t t = 0; t < t1 - t0; ++t) {
        const int64_t at = t * kScanStrip + v;
        const Vec<R> g = load<R>(go + at), x = load<R>(u + at), st = load<R>(s + at);
        Vec<R> gdt = x * st + load<R>(ddelta + at);
        if (p.fwd.dims.softplus) gdt *= load<R>(slope + at);
        store<R>(ddelta + at, gdt);
        store<R>(s + at, load<R>(unit.delta + at) * st + D * g);
        sum_D += g * x;
        sum_bias += gdt;
      }
      const int64_t c = unit.strip + v;
      store<R>(dD + c, load<R>(dD + c) + sum_D);
      store<R>(dbias + c, load<R>(dbias + c) + sum_bias);
    }
    unit.store_tokens(p.du, row, t0, t1, s);
    unit.store_tokens(p.ddelta, row, t0, t1, ddelta);
    if (!p.fwd.z) return;
    for (int64_t t = 0; t < t1 - t0; ++t)
      for (int64_t v = 0; v < unit.strip_width; v += kWidth<R>) {
        const int64_t at = t * kScanStrip + v;
        store<R>(z + at, load<R>(z + at) * load<R>(unit.y + at));
      }
    unit.store_tokens(p.dz, row, t0, t1, z);
  }

  // Adds up the lanes of the packed sums and writes this block's partial of dB (which = 0) or dC (1).
  void store_channel_sums(const ScanBwd& p, const R* packed, int which, int64_t row, int64_t t0, int64_t t1) {
    using P = Packing<R>;
    const ScanDims& dims = p.fwd.dims;
    const int64_t ni = P::kSums / dims.parts(), values = (dims.n + ni - 1) / ni * P::kSums;
    R* out = static_cast<R*>(p.partial_BC) +
             (((unit.block * dims.b + row) * dims.l + t0) * 2 + which) * unit.planes;
    R mixed[2 * kScanMaxState];  // complex: the parts of each block side by side
    for (int64_t t = 0; t < t1 - t0; ++t, out += 2 * unit.planes) {
      R* to = dims.complex ? mixed : out;
      for (int64_t i = 0; i < values; i += kWidth<R>)
        store<R>(to + i, unpack_sums<P::kLanes, R>(
                             packed + i / P::kSums * kPackedLd + i % P::kSums + t * P::kSize, kPackedLd));
      for (int64_t i = 0; dims.complex && i < dims.n; ++i)
        for (int64_t part = 0; part < 2; ++part)
          out[part * padded(dims.n) + i] = mixed[i / ni * P::kSums + part * ni + i % ni];
    }
  }

  // Writes this unit's partial sums over tokens.
  void store_token_sums(const ScanBwd& p) {
    const ScanDims& dims = p.fwd.dims;
    const int64_t ld = padded(dims.d), kinds = 1 + dims.constant_B + dims.constant_C;
    R* to = static_cast<R*>(p.partial_A) + unit.pieces * kinds * dims.parts() * dims.n * ld + unit.c0;
    for (const R* from : {dA, dims.constant_B ? dB : nullptr, dims.constant_C ? dC : nullptr}) {
      if (!from) continue;
      for (int64_t part = 0; part < dims.parts(); ++part)
        for (int64_t i = 0; i < dims.n; ++i, to += ld)
          for (int64_t c = 0; c < unit.channels; ++c) to[c] = from[(part * padded(dims.n) + i) * kScanLd + c];
    }
    to = static_cast<R*>(p.partial_d) + unit.pieces * 2 * ld + unit.c0;
    for (int64_t c = 0; c < unit.channels; ++c) {
      to[c] = dD[c];
      to[ld + c] = dbias[c];
    }
  }
};

template <class R>
int64_t selective_scan_bwd_scratch(const ScanDims& dims) {
  Arena<R> arena{nullptr};
  ScanBackward<R>(dims, arena);
  return arena.used * sizeof(R);
}

// Without du (the first phase of the segment form) only lambda is carried, from zero on the right of every
// piece to dstates_in, the state gradient that leaves it on the left; and delta is summed over every piece.
template <class R>
void selective_scan_bwd(const ScanBwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  const ScanDims& dims = p.fwd.dims;
  Arena<R> arena{static_cast<R*>(scratch)};
  ScanBackward<R> work(dims, arena);
  ScanUnit<R>& unit = work.unit;
  const Pieces& pieces = p.fwd.pieces;

  for (int64_t number = unit_begin; number < unit_end; ++number) {
    unit.begin(p.fwd, number);
    for (R* sum : {work.dA, dims.constant_B ? work.dB : nullptr, dims.constant_C ? work.dC : nullptr})
      if (sum) unit.clear(sum);
    for (int64_t i = 0; i < kScanLd; ++i) work.dD[i] = work.dbias[i] = 0;

    for (int64_t k = pieces.group[unit.pieces + 1] - 1; k >= pieces.group[unit.pieces]; --k) {
      const Piece& piece = pieces.piece[k];
      unit.load_state(work.lambda, dims, p.dstates_out, piece.state_out);
      for (int64_t t1 = piece.end, t0; t1 > piece.begin; t1 = t0) {
        t0 = (t1 - 1) / kScanCheckpoint * kScanCheckpoint;
        if (t0 < piece.begin) t0 = piece.begin;
        if (!dims.constant_B) unit.load_BC(unit.B, dims, p.fwd.B, piece.row, unit.group_B, t0, t1);
        if (!dims.constant_C) unit.load_BC(unit.C, dims, p.fwd.C, piece.row, unit.group_C, t0, t1);
        if (p.du) {
          work.clear_channel_sums(dims);
          if (t0 % kScanCheckpoint == 0 && t0 > piece.run_begin)
            unit.load_checkpoint(p.fwd, piece.row, t0);
          else
            unit.load_state(unit.state, dims, p.fwd.states_in, piece.state_in);
        }
        for (int64_t strip = 0; strip < unit.channels; strip += kScanStrip) {
          unit.take_strip(strip);
          work.load_strip(p, piece.row, t0, t1);
          with_kinds(dims, [&]<bool kComplex, bool kConstB, bool kConstC>() {
            if (p.du)
              work.template strip_gradients<kComplex, kConstB, kConstC>(p, piece, t0, t1);
            else
              work.template adjoint_strip<kComplex, kConstC>(dims, t1 - t0);
          });
          if (p.du) work.store_gradients(p, piece.row, t0, t1);
        }
        if (!p.du) continue;
        if (!dims.constant_B) work.store_channel_sums(p, work.packed_B, 0, piece.row, t0, t1);
        if (!dims.constant_C) work.store_channel_sums(p, work.packed_C, 1, piece.row, t0, t1);
      }
      unit.store_state(dims, p.dstates_in, piece.state_in, work.lambda);
      if (!p.du)
        for (int64_t i = 0; i < unit.channels; ++i) {
          static_cast<R*>(p.fwd.delta_sums)[k * dims.d + unit.c0 + i] = work.dbias[i];
          work.dbias[i] = 0;
        }
    }
    if (p.du) work.store_token_sums(p);
  }
}

// Second pass of the reductions: dA, dD, ddelta_bias and constant dB, dC (unit 0), then dB and dC of
// kScanReduceTokens tokens each.
template <class R>
void selective_scan_reduce(const ScanBwd& p, int64_t unit_begin, int64_t unit_end) {
  const ScanDims& dims = p.fwd.dims;
  const int64_t ld = padded(dims.d), planes = dims.parts() * padded(dims.n), groups = p.fwd.pieces.groups;
  const int64_t spans = (dims.l + kScanReduceTokens - 1) / kScanReduceTokens;
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    if (unit == 0) {
      const int64_t kind = dims.parts() * dims.n * ld;
      const int64_t stride = (1 + dims.constant_B + dims.constant_C) * kind;
      const R* from = static_cast<const R*>(p.partial_A);
      const View absent;
      for (const View* out : {&p.dA, dims.constant_B ? &p.dB : &absent, dims.constant_C ? &p.dC : &absent}) {
        if (!*out) continue;
        for (int64_t part = 0; part < dims.parts(); ++part)
          sum_partials(*out, part, dims.n, out->stride[1], dims.d, out->stride[0], from + part * dims.n * ld,
                       ld, groups, stride);
        from += kind;
      }
      const R* sums = static_cast<const R*>(p.partial_d);
      if (p.dD) sum_partials(p.dD, 0, 1, 0, dims.d, p.dD.stride[0], sums, ld, groups, 2 * ld);
      if (p.ddelta_bias)
        sum_partials(p.ddelta_bias, 0, 1, 0, dims.d, p.ddelta_bias.stride[0], sums + ld, ld, groups, 2 * ld);
      continue;
    }
    const int64_t row = (unit - 1) / spans, t0 = (unit - 1) % spans * kScanReduceTokens;
    const int64_t tokens = dims.l - t0 < kScanReduceTokens ? dims.l - t0 : kScanReduceTokens;
    for (int which = 0; which < 2; ++which) {
      if (which == 0 ? dims.constant_B : dims.constant_C) continue;
      const View& out = which == 0 ? p.dB : p.dC;
      const int64_t out_groups = which == 0 ? dims.groups_B : dims.groups_C,
                    blocks = dims.channel_blocks() / out_groups;
      for (int64_t g = 0; g < out_groups; ++g)
        for (int64_t part = 0; part < dims.parts(); ++part)
          sum_partials(out, row * out.stride[0] + g * out.stride[1] + t0 * out.stride[3] + part, tokens,
                       out.stride[3], dims.n, out.stride[2],
                       static_cast<const R*>(p.partial_BC) +
                           (((g * blocks * dims.b + row) * dims.l + t0) * 2 + which) * planes +
                           part * padded(dims.n),
                       2 * planes, blocks, dims.b * dims.l * 2 * planes);
    }
  }
}

}  // namespace mamba_ops::MAMBA_ISA

// Selective scan, forward.
//
//   h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  o_t = k Re(C_t h_t) + D u_t;  y = o silu(z)
//
// Units, tiles and lanes: scan_tile.h. A unit walks its pieces in order; the state that enters every token at
// a multiple of kScanCheckpoint is kept for the backward. Without y (the first phase of the segment form)
// only the end states and the sums of delta are made: a piece from a zero state ends in E, and its map is h
// -> exp(A sum(delta)) h + E.
#pragma once
#include "kernels/cpu/scan_tile.h"

namespace mamba_ops::MAMBA_ISA {

inline constexpr int64_t kScanTokens = 128;
static_assert(kScanCheckpoint % kScanTokens == 0);

template <class R>
int64_t selective_scan_fwd_scratch(const ScanDims& dims) {
  Arena<R> arena{nullptr};
  ScanUnit<R>(dims, kScanTokens, arena);
  arena.take(kScanTokens * kScanStrip + kScanLd);
  return arena.used * sizeof(R);
}

template <class R>
void selective_scan_fwd(const ScanFwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  const ScanDims& dims = p.dims;
  Arena<R> arena{static_cast<R*>(scratch)};
  ScanUnit<R> unit(dims, kScanTokens, arena);
  R* z = arena.take(kScanTokens * kScanStrip);
  R* sums = arena.take(kScanLd);

  for (int64_t number = unit_begin; number < unit_end; ++number) {
    unit.begin(p, number);
    for (int64_t k = p.pieces.group[unit.pieces]; k < p.pieces.group[unit.pieces + 1]; ++k) {
      const Piece& piece = p.pieces.piece[k];
      unit.load_state(unit.state, dims, p.states_in, piece.state_in);
      for (int64_t i = 0; i < kScanLd; ++i) sums[i] = 0;
      for (int64_t t0 = piece.begin, t1; t0 < piece.end; t0 = t1) {
        t1 = (t0 / kScanTokens + 1) * kScanTokens < piece.end ? (t0 / kScanTokens + 1) * kScanTokens
                                                              : piece.end;
        if (p.checkpoints && t0 % kScanCheckpoint == 0 && t0 > piece.run_begin)
          unit.store_checkpoint(p, piece.row, t0);
        if (!dims.constant_B) unit.load_BC(unit.B, dims, p.B, piece.row, unit.group_B, t0, t1);
        if (!dims.constant_C && p.y) unit.load_BC(unit.C, dims, p.C, piece.row, unit.group_C, t0, t1);
        const int64_t next = t1 + kScanTokens < piece.end ? t1 + kScanTokens : piece.end;

        for (int64_t strip = 0; strip < unit.channels; strip += kScanStrip) {
          unit.take_strip(strip);
          unit.load_steps(p, piece.row, t0, t1);
          if (p.delta_sums)
            for (int64_t t = 0; t < t1 - t0; ++t)
              for (int64_t i = 0; i < kScanStrip; ++i) sums[strip + i] += unit.delta[t * kScanStrip + i];
          with_kinds(dims, [&]<bool kComplex, bool kConstB, bool kConstC>() {
            constexpr int ni = kBlock<kComplex>;
            const int64_t blocks = (dims.n + ni - 1) / ni, parts = unit.strip_width / kWidth<R> * blocks;
            for (int64_t v = 0; v < unit.strip_width; v += kWidth<R>)
              for (int64_t i = 0; i < dims.n; i += ni) {
                const int64_t part = v / kWidth<R> * blocks + i / ni;
                for (const View* view : {&p.u, &p.delta, &p.z})
                  unit.prefetch_next_strip(*view, piece.row, t0, t1, t1, next, part, parts);
                unit.prefetch_strip(p.y, piece.row, t0, t1, part, parts);
                if (p.y)
                  scan_block<R, kComplex, kConstB, kConstC, true, false>(unit, t1 - t0, i, v);
                else
                  scan_block<R, kComplex, kConstB, kConstC, false, false>(unit, t1 - t0, i, v);
              }
          });
          if (!p.y) continue;
          if (p.z) {
            unit.load_tokens(z, p.z, piece.row, t0, t1);
            for (int64_t t = 0; t < t1 - t0; ++t)
              for (int64_t v = 0; v < unit.strip_width; v += kWidth<R>) {
                const int64_t at = t * kScanStrip + v;
                store<R>(unit.y + at, load<R>(unit.y + at) * silu<R>(load<R>(z + at)));
              }
          }
          unit.store_tokens(p.y, piece.row, t0, t1, unit.y);
        }
      }
      unit.store_state(dims, p.states_out, piece.state_out, unit.state);
      if (p.delta_sums)
        for (int64_t i = 0; i < unit.channels; ++i)
          static_cast<R*>(p.delta_sums)[k * dims.d + unit.c0 + i] = sums[i];
    }
  }
}

// Second phase of the segment form, for channels [begin, end): turns the end states E of pieces run from zero
// into the states that enter them. states (pieces, d, n, parts): row k holds E of piece k - 1 within a run,
// or the run's initial state. For the backward the same with time reversed: conj(exp(A sum)), and piece k
// gets the gradient from its right.
template <class R>
void selective_scan_combine(const ScanFwd& p, R* states, const R* ends, bool reverse, int64_t begin,
                            int64_t end) {
  const ScanDims& dims = p.dims;
  const int64_t count = p.pieces.group[p.pieces.groups], parts = dims.parts(), row = dims.d * dims.n * parts;
  const R* sums = static_cast<const R*>(p.delta_sums);
  for (int64_t step = 1; step < count; ++step) {
    const int64_t to = reverse ? count - 1 - step : step, from = reverse ? to + 1 : to - 1;
    const Piece& later = p.pieces.piece[reverse ? from : to];
    if (later.begin == later.run_begin) continue;  // another run
    with_type(p.A.dtype, [&]<class T>(T*) {
      const T* A = static_cast<const T*>(p.A.data);
      for (int64_t c = begin; c < end; ++c)
        for (int64_t i = 0; i < dims.n; ++i) {
          const int64_t at = (c * dims.n + i) * parts;
          const T* a = A + c * p.A.stride[0] + i * p.A.stride[1];
          const R sum = sums[from * dims.d + c], size = R(::exp(double(sum * to_real<R>(a[0]))));
          const R* h = states + from * row + at;
          R* out = states + to * row + at;
          const R* e = ends + from * row + at;
          if (parts == 1) {
            out[0] = size * h[0] + e[0];
          } else {
            const R angle = sum * to_real<R>(a[1]) * (reverse ? -1 : 1);
            const R re = size * R(::cos(double(angle))), im = size * R(::sin(double(angle)));
            out[0] = re * h[0] - im * h[1] + e[0];
            out[1] = re * h[1] + im * h[0] + e[1];
          }
        }
    });
  }
}

}  // namespace mamba_ops::MAMBA_ISA

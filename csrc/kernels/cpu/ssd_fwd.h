// SSD, forward, chunk by chunk with the state in cache (formulas: kernels/ssd.h; units and tiles:
// ssd_tile.h).
//
// The state of a head is kept as H (n, padded p), so that both products with it run along p. Per chunk and
// head:
//   y_i = e^{s_i} C_i H + sum_j (CB_ij L_ij delta_j) x_j + D x_i;   H <- e^T H + sum_j B_j^T (e^{T - s_j}
//   delta_j x_j)
// Without y (the first phase of the segment form) only H and the sum of T are made. No sums across units: the
// result does not depend on how heads are dealt into them.
#pragma once
#include "kernels/cpu/ssd_tile.h"

namespace mamba_ops::MAMBA_ISA {

template <class R, class T>
struct SsdForward {
  SsdUnit<R, T> unit;
  R* H;                         // (heads, n, ldp)
  R* M;                         // (q, ldq)
  R *x, *w, *y;                 // (q, ldp): inputs, weighted inputs, outputs
  R *left, *right, *packed_Bt;  // room for factors

  SsdForward(const SsdDims& dims, Arena<R>& arena) : unit(dims, arena) {
    H = arena.take(dims.heads * dims.n * unit.ldp);
    M = arena.take(dims.q * unit.ldq);
    for (R** tile : {&x, &w, &y}) *tile = arena.take(unit.ldq * unit.ldp);
    left = arena.take(left_size<R, T>(unit.ldq, unit.ldq));
    right = arena.take(right_size<R, T>(unit.ldn > unit.ldq ? unit.ldn : unit.ldq, unit.ldp));
    packed_Bt = arena.take(right_size<R, T>(unit.ldq, unit.ldn));
  }

  void load_states(const SsdFwd& p, int64_t row) {
    const SsdDims& dims = p.dims;
    for (int64_t i = 0; i < dims.heads * dims.n * unit.ldp; ++i) H[i] = 0;
    if (!p.states_in || row < 0) return;
    for (int64_t k = 0; k < unit.heads; ++k)
      load_tile(H + k * dims.n * unit.ldp, unit.ldp, unit.state_view(p.states_in),
                unit.state_at(dims, row, k), dims.n, 1, dims.p, dims.n);
  }
  void store_states(const SsdFwd& p, int64_t row) const {
    const SsdDims& dims = p.dims;
    if (!p.states_out || row < 0) return;
    for (int64_t k = 0; k < unit.heads; ++k)
      store_tile(unit.state_view(p.states_out), unit.state_at(dims, row, k), dims.n, 1, dims.p, dims.n,
                 H + k * dims.n * unit.ldp, unit.ldp);
  }

  void output(const SsdFwd& p, int64_t row, int64_t t0, int64_t t1, int64_t head) {
    const SsdDims& dims = p.dims;
    const SsdSteps<R>& s = unit.steps;
    const int64_t len = t1 - t0, ldp = unit.ldp, ldq = unit.ldq;
    const R *state = H + head * dims.n * ldp, *D = unit.D + head * ldp;
    for (int64_t i = 0; i < len; ++i)
      for (int64_t v = 0; v < unit.row_end(i); v += kWidth<R>) {
        const Vec<R> cb = unit.causal(i, v) ? load<R>(unit.CB + i * ldq + v) : Vec<R>{};
        store<R>(M + i * ldq + v, cb * unit.decay_row(i, v) * load<R>(s.delta + v));
      }
    gemm<false>(
        unit.left_C, right_of<R, T>(right, state, ldp, dims.n), len, ldp,
        [&](int64_t, int64_t) { return Terms{0, dims.n}; }, [](int64_t, int64_t) { return Vec<R>{}; },
        [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(y + i * ldp + v, s.from_start[i] * sum); });
    gemm<false>(
        left_of<R, T>(left, M, ldq, len, len), right_of<R, T>(right, x, ldp, len), len, ldp,
        [&](int64_t, int64_t i1) { return Terms{0, i1 < len ? i1 : len}; },
        [&](int64_t i, int64_t v) {
          return Vec<R>(load<R>(y + i * ldp + v) + load<R>(D + v) * load<R>(x + i * ldp + v));
        },
        [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(y + i * ldp + v, sum); });
    if (p.z) {
      unit.load_tokens(w, p.z, row, t0, t1, unit.head0 + head, dims.p, ldp, 0);
      for (int64_t i = 0; i < len * ldp; i += kWidth<R>)
        store<R>(y + i, load<R>(y + i) * silu<R>(load<R>(w + i)));
    }
    unit.store_tokens(p.y, row, t0, t1, head, dims.p, y);
  }

  // left_Bt: B of the chunk, transposed.
  void advance(const SsdDims& dims, Left<R, T> left_Bt, int64_t len, int64_t head) {
    const SsdSteps<R>& s = unit.steps;
    const int64_t ldp = unit.ldp;
    R* state = H + head * dims.n * ldp;
    for (int64_t j = 0; j < len; ++j) {
      const R weight = s.to_end[j] * s.delta[j];
      for (int64_t v = 0; v < ldp; v += kWidth<R>)
        store<R>(w + j * ldp + v, weight * load<R>(x + j * ldp + v));
    }
    gemm<false>(
        left_Bt, right_of<R, T>(right, w, ldp, len), dims.n, ldp,
        [&](int64_t, int64_t) { return Terms{0, len}; },
        [&](int64_t i, int64_t v) { return Vec<R>(s.decay * load<R>(state + i * ldp + v)); },
        [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(state + i * ldp + v, sum); });
  }
};

template <class R, class T>
int64_t ssd_fwd_scratch(const SsdDims& dims) {
  Arena<R> arena{nullptr};
  SsdForward<R, T>(dims, arena);
  return arena.used * sizeof(R);
}

template <class R, class T>
void ssd_fwd(const SsdFwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  const SsdDims& dims = p.dims;
  Arena<R> arena{static_cast<R*>(scratch)};
  SsdForward<R, T> work(dims, arena);
  SsdUnit<R, T>& unit = work.unit;
  for (int64_t number = unit_begin; number < unit_end; ++number) {
    unit.begin(p, number);
    for (int64_t k = p.pieces.group[unit.pieces]; k < p.pieces.group[unit.pieces + 1]; ++k) {
      const Piece& piece = p.pieces.piece[k];
      work.load_states(p, piece.state_in);
      R* total = p.log_decays ? static_cast<R*>(p.log_decays) + k * dims.h + unit.head0 : nullptr;
      for (int64_t head = 0; total && head < unit.heads; ++head) total[head] = 0;
      for (int64_t t0 = piece.begin; t0 < piece.end; t0 += dims.q) {
        const int64_t t1 = t0 + dims.q < piece.end ? t0 + dims.q : piece.end;
        unit.load_chunk(p, piece.row, t0, t1, bool(p.y));
        const auto left_Bt = left_of_transposed<R, T>(work.packed_Bt, unit.B, unit.ldn, t1 - t0);
        for (int64_t head = 0; head < unit.heads; ++head) {
          unit.make_steps(p, head, t1 - t0);
          unit.load_tokens(work.x, p.x, piece.row, t0, t1, unit.head0 + head, dims.p, unit.ldp, 0);
          unit.prefetch_next(p, {&p.x, &p.z}, piece.row, head, t0, t1, t1,
                             t1 + dims.q < piece.end ? t1 + dims.q : piece.end);
          unit.prefetch_tokens(p.y, piece.row, t0, t1, unit.head0 + head, dims.p);
          if (p.y) work.output(p, piece.row, t0, t1, head);
          work.advance(dims, left_Bt, t1 - t0, head);
          if (total) total[head] += unit.steps.T;
        }
      }
      work.store_states(p, piece.state_out);
    }
  }
}

// Second phase of the segment form, for heads [begin, end): row k of states (pieces, h, p, n) becomes the
// state that enters piece k, given those of the first piece of every run and the ends of pieces run from
// zero. With `reverse` the gradient that enters from the right.
template <class R>
void ssd_combine(const SsdFwd& p, R* states, const R* ends, bool reverse, int64_t begin, int64_t end) {
  const int64_t count = p.pieces.group[p.pieces.groups], size = p.dims.p * p.dims.n, row = p.dims.h * size;
  const R* logs = static_cast<const R*>(p.log_decays);
  for (int64_t step = 1; step < count; ++step) {
    const int64_t to = reverse ? count - 1 - step : step, from = reverse ? to + 1 : to - 1;
    const Piece& later = p.pieces.piece[reverse ? from : to];
    if (later.begin == later.run_begin) continue;  // another run
    for (int64_t head = begin; head < end; ++head) {
      const R decay = R(::exp(double(logs[from * p.dims.h + head])));
      for (int64_t i = head * size; i < (head + 1) * size; ++i)
        states[to * row + i] = decay * states[from * row + i] + ends[from * row + i];
    }
  }
}

}  // namespace mamba_ops::MAMBA_ISA

// SSD, backward, chunk by chunk from right to left (formulas of the forward: kernels/ssd.h; units and tiles:
// ssd_tile.h).
//
//   go = dy silu(z);  dM_ij = go_i . X_j;  W = dM o M;  dCB = dM o L      (i >= j)
//   dX_j = sum_i M_ij go_i + e^{T - s_j} G B_j;   dx_j = delta_j dX_j + D go_j
//   dC_i = sum_j dCB_ij B_j + chi_i,  chi_i = e^{s_i} H^T go_i;   dB_j = sum_i dCB_ij C_i + beta_j,  beta_j =
//   e^{T-s_j} G^T X_j da_t = sum_{i >= t > j} W_ij + sum_{i >= t} C_i . chi_i + sum_{j < t} B_j . beta_j +
//   e^T <G, H> ddelta_j = x_j . dX_j + A da_j;   dA = sum delta da;   G <- e^T G + sum_i (e^{s_i} go_i) C_i^T
//
// G is the gradient of the state after the chunk, H the state before it, both (p, padded n). The form of da
// has no cancelling terms: the gradient of the decay keeps float32 accuracy also where the decay is strong.
// The states H are not saved by the forward: they are run again, span by span of kSsdSpan chunks. dB and dC
// are summed over the heads of the unit in cache and leave one partial per block of heads; dA, dD, dbias are
// summed chunk by chunk into one partial per group of pieces. A second pass adds the partials in order.
#pragma once
#include "kernels/cpu/ssd_tile.h"

namespace mamba_ops::MAMBA_ISA {

template <class R, class T>
struct SsdBackward {
  SsdUnit<R, T> unit;
  R *H, *G;                    // (heads, p, ldn): running state, running gradient
  R* states;                   // (kSsdSpan, heads, p, ldn): H before every chunk of the span
  R* starts;                   // (spans, heads, p, ldn): H before every span of the piece
  R *x, *X, *go, *z, *dX, *w;  // (q, ldp)
  R *XT, *swapped;             // room for X, and G or H, turned into right factors
  R *M, *dM, *dCB;             // (q, ldq)
  R *dB, *dC;                  // (q, ldn)
  R *da, *ddelta;              // (ldq)
  R *lanes_r, *lanes_k;        // (q, kWidth): C_i . chi_i and B_j . beta_j before the sum over lanes
  R* below;                    // (ldq): column sums of W over the rows seen so far
  R *dA, *dbias, *dD;          // (heads), (heads), (heads, ldp)
  R *left, *right;             // room for factors
  R *packed_go, *packed_X;     // (q, ldp) as left factors
  R *packed_B, *packed_C;      // (q, ldn) as right factors
  int64_t state_size;          // of one head

  SsdBackward(const SsdDims& dims, int64_t spans, Arena<R>& arena)
      : unit(dims, arena), state_size(padded(dims.p) * unit.ldn) {
    const int64_t all = dims.heads * state_size;
    for (R** state : {&H, &G}) *state = arena.take(all);
    states = arena.take(kSsdSpan * all);
    starts = arena.take(spans * all);
    for (R** tile : {&x, &X, &go, &z, &dX, &w}) *tile = arena.take(unit.ldq * unit.ldp);
    XT = arena.take(turned_size<R, T>(unit.ldp, unit.ldq));
    swapped = arena.take(turned_size<R, T>(unit.ldn, unit.ldp));
    for (R** pairs : {&M, &dM, &dCB}) *pairs = arena.take(unit.ldq * unit.ldq);
    for (R** tile : {&dB, &dC}) *tile = arena.take(unit.ldq * unit.ldn);
    for (R** row : {&da, &ddelta, &below}) *row = arena.take(unit.ldq);
    for (R** lanes : {&lanes_r, &lanes_k}) *lanes = arena.take(unit.ldq * kWidth<R>);
    for (R** sum : {&dA, &dbias}) *sum = arena.take(dims.heads);
    dD = arena.take(dims.heads * unit.ldp);
    const int64_t tall = unit.ldq > unit.ldp ? unit.ldq : unit.ldp, most = unit.ldn > tall ? unit.ldn : tall;
    left = arena.take(left_size<R, T>(tall, most));
    right = arena.take(right_size<R, T>(most, most));
    for (R** packed : {&packed_go, &packed_X}) *packed = arena.take(left_size<R, T>(unit.ldq, unit.ldp));
    for (R** packed : {&packed_B, &packed_C}) *packed = arena.take(right_size<R, T>(unit.ldq, unit.ldn));
  }

  void load_states(R* to, const SsdDims& dims, const void* rows, int64_t row) const {
    for (int64_t i = 0; i < dims.heads * state_size; ++i) to[i] = 0;
    if (!rows || row < 0) return;
    for (int64_t head = 0; head < unit.heads; ++head)
      load_tile(to + head * state_size, unit.ldn, unit.state_view(rows), unit.state_at(dims, row, head),
                dims.p, dims.n, dims.n, 1);
  }
  void store_states(const R* from, const SsdDims& dims, void* rows, int64_t row) const {
    if (!rows || row < 0) return;
    for (int64_t head = 0; head < unit.heads; ++head)
      store_tile(unit.state_view(rows), unit.state_at(dims, row, head), dims.p, dims.n, dims.n, 1,
                 from + head * state_size, unit.ldn);
  }
  void copy(R* to, const R* from, int64_t count) const {
    for (int64_t i = 0; i < count; i += kWidth<R>) store<R>(to + i, load<R>(from + i));
  }

  // to = decay from + sum over t of weight_t rows_t^T columns_t; rows (len, ldp), columns (len, ldn), states
  // (p, ldn).
  void advance(const SsdDims& dims, R* to, const R* from, const R* rows, const R* weight, Right<R, T> columns,
               int64_t len) {
    const int64_t ldp = unit.ldp, ldn = unit.ldn;
    for (int64_t t = 0; t < len; ++t)
      for (int64_t v = 0; v < ldp; v += kWidth<R>)
        store<R>(w + t * ldp + v, weight[t] * load<R>(rows + t * ldp + v));
    gemm<false>(
        left_of_transposed<R, T>(left, w, ldp, len), columns, dims.p, ldn,
        [&](int64_t, int64_t) { return Terms{0, len}; },
        [&](int64_t i, int64_t v) { return Vec<R>(unit.steps.decay * load<R>(from + i * ldn + v)); },
        [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(to + i * ldn + v, sum); });
  }

  // X = delta x of one head, zero up to a whole vector of tokens.
  void load_X(const SsdFwd& p, int64_t row, int64_t t0, int64_t t1, int64_t head) {
    const int64_t len = t1 - t0, ldp = unit.ldp;
    unit.load_tokens(x, p.x, row, t0, t1, unit.head0 + head, p.dims.p, ldp, whole_vectors<R>(len));
    for (int64_t t = 0; t < whole_vectors<R>(len); ++t)
      for (int64_t v = 0; v < ldp; v += kWidth<R>)
        store<R>(X + t * ldp + v, unit.steps.delta[t] * load<R>(x + t * ldp + v));
  }
  // go = dy silu(z); z stays in `z`.
  void load_go(const SsdBwd& p, int64_t row, int64_t t0, int64_t t1, int64_t head) {
    const SsdDims& dims = p.fwd.dims;
    const int64_t ldp = unit.ldp;
    unit.load_tokens(go, p.dy, row, t0, t1, unit.head0 + head, dims.p, ldp, 0);
    if (!p.fwd.z) return;
    unit.load_tokens(z, p.fwd.z, row, t0, t1, unit.head0 + head, dims.p, ldp, 0);
    for (int64_t i = 0; i < (t1 - t0) * ldp; i += kWidth<R>)
      store<R>(go + i, load<R>(go + i) * silu<R>(load<R>(z + i)));
  }

  // Runs the states of all heads from H over the chunks [t0, end): into `states`, before every chunk, or in
  // place to the end.
  void run_states(const SsdBwd& p, const Piece& piece, int64_t t0, int64_t end, bool keep) {
    const SsdDims& dims = p.fwd.dims;
    const int64_t all = dims.heads * state_size;
    R* from = H;
    if (keep) copy(from = states, H, all);
    for (; t0 + (keep ? dims.q : 0) < end; t0 += dims.q) {
      const int64_t t1 = t0 + dims.q < end ? t0 + dims.q : end;
      unit.load_chunk(p.fwd, piece.row, t0, t1, false);
      const Right<R, T> right_B = right_of<R, T>(packed_B, unit.B, unit.ldn, t1 - t0);
      R* to = keep ? from + all : from;
      for (int64_t head = 0; head < unit.heads; ++head) {
        unit.make_steps(p.fwd, head, t1 - t0);
        load_X(p.fwd, piece.row, t0, t1, head);
        unit.prefetch_next(p.fwd, {&p.fwd.x}, piece.row, head, t0, t1, t1,
                           t1 + dims.q < end ? t1 + dims.q : end);
        advance(dims, to + head * state_size, from + head * state_size, X, unit.steps.to_end, right_B,
                t1 - t0);
      }
      from = to;
    }
  }

  // M, dCB and the part of da that comes from W, rows in descending order so that `below` holds their column
  // sums.
  void pair_gradients(int64_t len) {
    const int64_t ldq = unit.ldq;
    for (int64_t v = 0; v < ldq; v += kWidth<R>) store<R>(below + v, Vec<R>{});
    for (int64_t i = len - 1; i >= 0; --i) {
      Vec<R> before = {};
      for (int64_t v = 0; v < unit.row_end(i); v += kWidth<R>) {
        const auto seen = unit.causal(i, v);
        const int64_t at = i * ldq + v;
        const Vec<R> L = unit.decay_row(i, v);
        const Vec<R> m = (seen ? load<R>(unit.CB + at) : Vec<R>{}) * L,
                     dm = seen ? load<R>(dM + at) : Vec<R>{};
        store<R>(M + at, m);
        store<R>(dCB + at, load<R>(dCB + at) + dm * L);
        const Vec<R> column = load<R>(below + v) + dm * m;
        store<R>(below + v, column);
        before += unit.causal(i - 1, v) ? column : Vec<R>{};
      }
      da[i] = sum<R>(before);
    }
  }

  // All gradients of one head in one chunk.
  void head_gradients(const SsdBwd& p, const Piece& piece, int64_t t0, int64_t t1, int64_t head,
                      const R* before, Right<R, T> right_C) {
    const SsdDims& dims = p.fwd.dims;
    const SsdSteps<R>& s = unit.steps;
    const int64_t len = t1 - t0, cols = whole_vectors<R>(len), ldp = unit.ldp, ldq = unit.ldq, ldn = unit.ldn;
    R* after = G + head * state_size;
    const R* D = unit.D + head * ldp;
    const auto zero = [](int64_t, int64_t) { return Vec<R>{}; };
    const auto over_p = [&](int64_t, int64_t) { return Terms{0, dims.p}; };
    const auto over_n = [&](int64_t, int64_t) { return Terms{0, dims.n}; };
    const auto from_row = [&](int64_t i0, int64_t) { return Terms{i0, len}; };
    const auto to_row = [&](int64_t, int64_t i1) { return Terms{0, i1 < len ? i1 : len}; };

    unit.make_steps(p.fwd, head, len);
    load_X(p.fwd, piece.row, t0, t1, head);
    load_go(p, piece.row, t0, t1, head);
    const int64_t left_t0 = t0 - dims.q > piece.begin ? t0 - dims.q : piece.begin;
    unit.prefetch_next(p.fwd, {&p.fwd.x, &p.fwd.z, &p.dy}, piece.row, head, t0, t1, left_t0, t0);
    for (const View* out : {&p.dx, &p.dz})
      unit.prefetch_tokens(*out, piece.row, t0, t1, unit.head0 + head, dims.p);
    const Left<R, T> left_go = left_of<R, T>(packed_go, go, ldp, len, dims.p);
    const Left<R, T> left_X = left_of<R, T>(packed_X, X, ldp, cols, dims.p);
    gemm<true>(left_go, right_of_transposed<R, T>(XT, left_X, cols, dims.p), len, cols, over_p, zero,
               [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(dM + i * ldq + v, sum); });
    pair_gradients(len);

    const Left<R, T> left_G = left_of<R, T>(left, after, ldn, ldp, dims.n);
    gemm<false>(unit.left_B, right_of_transposed<R, T>(swapped, left_G, ldp, dims.n), len, ldp, over_n, zero,
                [&](int64_t j, int64_t v, Vec<R> sum) { store<R>(dX + j * ldp + v, s.to_end[j] * sum); });
    gemm<false>(
        left_of_transposed<R, T>(left, M, ldq, len), right_of<R, T>(right, go, ldp, len), len, ldp, from_row,
        [&](int64_t j, int64_t v) { return load<R>(dX + j * ldp + v); },
        [&](int64_t j, int64_t v, Vec<R> sum) { store<R>(dX + j * ldp + v, sum); });

    for (int64_t i = 0; i < len * kWidth<R>; i += kWidth<R>) {
      store<R>(lanes_r + i, Vec<R>{});
      store<R>(lanes_k + i, Vec<R>{});
    }
    gemm<false>(left_go, right_of<R, T>(right, before, ldn, dims.p), len, ldn, over_p, zero,
                [&](int64_t i, int64_t v, Vec<R> sum) {
                  const Vec<R> chi = s.from_start[i] * sum;
                  store<R>(dC + i * ldn + v, load<R>(dC + i * ldn + v) + chi);
                  store<R>(lanes_r + i * kWidth<R>,
                           load<R>(lanes_r + i * kWidth<R>) + chi * load<R>(unit.C + i * ldn + v));
                });
    gemm<false>(left_X, right_of<R, T>(right, after, ldn, dims.p), len, ldn, over_p, zero,
                [&](int64_t j, int64_t v, Vec<R> sum) {
                  const Vec<R> beta = s.to_end[j] * sum;
                  store<R>(dB + j * ldn + v, load<R>(dB + j * ldn + v) + beta);
                  store<R>(lanes_k + j * kWidth<R>,
                           load<R>(lanes_k + j * kWidth<R>) + beta * load<R>(unit.B + j * ldn + v));
                });

    Vec<R> product = {};
    for (int64_t i = 0; i < dims.p * ldn; i += kWidth<R>) product += load<R>(after + i) * load<R>(before + i);
    const R through = s.decay * sum<R>(product);
    R suffix = 0, prefix = 0;
    for (int64_t t = len - 1; t >= 0; --t) {
      suffix += sum<R>(load<R>(lanes_r + t * kWidth<R>));
      da[t] += suffix + through;
    }
    for (int64_t t = 0; t < len; ++t) {
      da[t] += prefix;
      prefix += sum<R>(load<R>(lanes_k + t * kWidth<R>));
    }

    for (int64_t v = 0; v < ldp; v += kWidth<R>) {
      Vec<R> sum_D = {};
      for (int64_t t = 0; t < len; ++t) sum_D += load<R>(go + t * ldp + v) * load<R>(x + t * ldp + v);
      store<R>(dD + head * ldp + v, load<R>(dD + head * ldp + v) + sum_D);
    }
    R sum_A = 0;
    for (int64_t t = 0; t < len; ++t) {
      Vec<R> dot = {};
      for (int64_t v = 0; v < ldp; v += kWidth<R>) {
        const int64_t at = t * ldp + v;
        const Vec<R> dx = load<R>(dX + at);
        dot += load<R>(x + at) * dx;
        store<R>(dX + at, s.delta[t] * dx + load<R>(D + v) * load<R>(go + at));
      }
      ddelta[t] = sum<R>(dot) + s.A * da[t];
      sum_A += s.delta[t] * da[t];
    }
    dA[head] += sum_A;
    unit.store_tokens(p.dx, piece.row, t0, t1, head, dims.p, dX);
    store_step_gradients(p, piece.row, t0, t1, head);

    if (p.fwd.z) {  // dz = dy o silu'(z), with o run again
      const Left<R, T> left_H = left_of<R, T>(left, before, ldn, ldp, dims.n);
      gemm<false>(
          unit.left_C, right_of_transposed<R, T>(swapped, left_H, ldp, dims.n), len, ldp, over_n, zero,
          [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(w + i * ldp + v, s.from_start[i] * sum); });
      gemm<false>(
          left_of<R, T>(left, M, ldq, len, len), right_of<R, T>(right, X, ldp, len), len, ldp, to_row,
          [&](int64_t i, int64_t v) {
            return Vec<R>(load<R>(w + i * ldp + v) + load<R>(D + v) * load<R>(x + i * ldp + v));
          },
          [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(w + i * ldp + v, sum); });
      unit.load_tokens(dX, p.dy, piece.row, t0, t1, unit.head0 + head, dims.p, ldp, 0);
      for (int64_t i = 0; i < len * ldp; i += kWidth<R>)
        store<R>(dX + i, load<R>(dX + i) * load<R>(w + i) * silu_grad<R>(load<R>(z + i)));
      unit.store_tokens(p.dz, piece.row, t0, t1, head, dims.p, dX);
    }
    advance(dims, after, after, go, s.from_start, right_C, len);
  }

  // Through the clamp (inclusive at its limits) and softplus: ddt, and its sum.
  void store_step_gradients(const SsdBwd& p, int64_t row, int64_t t0, int64_t t1, int64_t head) {
    const SsdDims& dims = p.fwd.dims;
    const int64_t len = t1 - t0;
    const Vec<R> lo = splat(R(dims.dt_min)), hi = splat(R(dims.dt_max));
    for (int64_t v = 0; v < len; v += kWidth<R>) {
      Vec<R> step = load<R>(unit.steps.raw + v), g = load<R>(ddelta + v);
      if (dims.softplus) {
        Vec<R> slope;
        step = softplus<R>(step, &slope);
        g *= slope;
      }
      store<R>(ddelta + v, step < lo ? Vec<R>{} : (step > hi ? Vec<R>{} : g));
    }
    R sum_bias = 0;
    for (int64_t t = 0; t < len; ++t) sum_bias += ddelta[t];
    dbias[head] += sum_bias;
    store_tile(p.ddt, row * p.ddt.stride[0] + t0 * p.ddt.stride[1] + (unit.head0 + head) * p.ddt.stride[2], 1,
               0, len, p.ddt.stride[1], ddelta, unit.ldq);
  }

  // dB and dC of the chunk: what the pairs add, once for all heads; then this block's partial.
  void finish_chunk(const SsdBwd& p, int64_t row, int64_t t0, int64_t t1, Right<R, T> right_C) {
    const SsdDims& dims = p.fwd.dims;
    const int64_t len = t1 - t0, ldq = unit.ldq, ldn = unit.ldn;
    R* out = static_cast<R*>(p.partial_BC) + ((unit.block * dims.b + row) * dims.l + t0) * 2 * ldn;
    gemm<false>(
        left_of_transposed<R, T>(left, dCB, ldq, len), right_C, len, ldn,
        [&](int64_t j0, int64_t) { return Terms{j0, len}; },
        [&](int64_t j, int64_t v) { return load<R>(dB + j * ldn + v); },
        [&](int64_t j, int64_t v, Vec<R> sum) { store<R>(out + j * 2 * ldn + v, sum); });
    gemm<false>(
        left_of<R, T>(left, dCB, ldq, len, len), right_of<R, T>(packed_B, unit.B, ldn, len), len, ldn,
        [&](int64_t, int64_t i1) { return Terms{0, i1 < len ? i1 : len}; },
        [&](int64_t i, int64_t v) { return load<R>(dC + i * ldn + v); },
        [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(out + (2 * i + 1) * ldn + v, sum); });
  }

  void store_token_sums(const SsdBwd& p) const {
    const SsdDims& dims = p.fwd.dims;
    const int64_t ld = padded(2) + unit.ldp;
    for (int64_t head = 0; head < unit.heads; ++head) {
      R* out = static_cast<R*>(p.partial_h) + (unit.pieces * dims.h + unit.head0 + head) * ld;
      for (int64_t i = 0; i < padded(2); ++i) out[i] = 0;
      out[0] = dA[head];
      out[1] = dbias[head];
      copy(out + padded(2), dD + head * unit.ldp, unit.ldp);
    }
  }
};

inline int64_t ssd_spans(const SsdDims& dims, const Pieces& pieces) {
  int64_t longest = 0;
  for (int64_t k = 0; k < pieces.group[pieces.groups]; ++k) {
    const int64_t tokens = pieces.piece[k].end - pieces.piece[k].begin;
    longest = tokens > longest ? tokens : longest;
  }
  return (longest + dims.q * kSsdSpan - 1) / (dims.q * kSsdSpan);
}
template <class R, class T>
int64_t ssd_bwd_scratch(const SsdDims& dims, const Pieces& pieces) {
  Arena<R> arena{nullptr};
  SsdBackward<R, T>(dims, ssd_spans(dims, pieces), arena);
  return arena.used * sizeof(R);
}

// Without dx (the first phase of the segment form) only G is carried, from zero on the right of every piece
// to dstates_in, and the log decays are summed over every piece.
template <class R, class T>
void ssd_bwd(const SsdBwd& p, int64_t unit_begin, int64_t unit_end, void* scratch) {
  const SsdDims& dims = p.fwd.dims;
  const Pieces& pieces = p.fwd.pieces;
  Arena<R> arena{static_cast<R*>(scratch)};
  SsdBackward<R, T> work(dims, ssd_spans(dims, pieces), arena);
  SsdUnit<R, T>& unit = work.unit;
  const int64_t all = dims.heads * work.state_size, span = dims.q * kSsdSpan;

  for (int64_t number = unit_begin; number < unit_end; ++number) {
    unit.begin(p.fwd, number);
    for (int64_t head = 0; head < dims.heads; ++head) work.dA[head] = work.dbias[head] = 0;
    for (int64_t i = 0; i < dims.heads * unit.ldp; ++i) work.dD[i] = 0;

    for (int64_t k = pieces.group[unit.pieces + 1] - 1; k >= pieces.group[unit.pieces]; --k) {
      const Piece& piece = pieces.piece[k];
      const int64_t tokens = piece.end - piece.begin, spans = (tokens + span - 1) / span;
      work.load_states(work.G, dims, p.dstates_out, piece.state_out);
      if (p.dx) {
        work.load_states(work.H, dims, p.fwd.states_in, piece.state_in);
        for (int64_t i = 0; i < spans; ++i) {
          work.copy(work.starts + i * all, work.H, all);
          if (i + 1 < spans)
            work.run_states(p, piece, piece.begin + i * span, piece.begin + (i + 1) * span, false);
        }
      }
      R* total = p.fwd.log_decays ? static_cast<R*>(p.fwd.log_decays) + k * dims.h + unit.head0 : nullptr;
      for (int64_t head = 0; total && head < unit.heads; ++head) total[head] = 0;

      for (int64_t i = spans - 1; i >= 0; --i) {
        const int64_t begin = piece.begin + i * span,
                      end = begin + span < piece.end ? begin + span : piece.end;
        if (p.dx) {
          work.copy(work.H, work.starts + i * all, all);
          work.run_states(p, piece, begin, end, true);
        }
        for (int64_t c = (end - begin - 1) / dims.q; c >= 0; --c) {
          const int64_t t0 = begin + c * dims.q, t1 = t0 + dims.q < end ? t0 + dims.q : end;
          unit.load_chunk(p.fwd, piece.row, t0, t1, bool(p.dx));
          const Right<R, T> right_C = right_of<R, T>(work.packed_C, unit.C, unit.ldn, t1 - t0);
          if (!p.dx) {
            for (int64_t head = 0; head < unit.heads; ++head) {
              unit.make_steps(p.fwd, head, t1 - t0);
              work.load_go(p, piece.row, t0, t1, head);
              R* G = work.G + head * work.state_size;
              work.advance(dims, G, G, work.go, unit.steps.from_start, right_C, t1 - t0);
              total[head] += unit.steps.T;
            }
            continue;
          }
          for (R* tile : {work.dB, work.dC})
            for (int64_t j = 0; j < (t1 - t0) * unit.ldn; ++j) tile[j] = 0;
          for (int64_t j = 0; j < (t1 - t0) * unit.ldq; ++j) work.dCB[j] = 0;
          for (int64_t head = 0; head < unit.heads; ++head)
            work.head_gradients(p, piece, t0, t1, head, work.states + c * all + head * work.state_size,
                                right_C);
          work.finish_chunk(p, piece.row, t0, t1, right_C);
        }
      }
      work.store_states(work.G, dims, p.dstates_in, piece.state_in);
    }
    if (p.dx) work.store_token_sums(p);
  }
}

// Second pass of the reductions: dA, ddt_bias and dD (unit 0), then dB and dC of kSsdReduceTokens tokens
// each.
template <class R>
void ssd_reduce(const SsdBwd& p, int64_t unit_begin, int64_t unit_end) {
  const SsdDims& dims = p.fwd.dims;
  const int64_t ldn = padded(dims.n), ldh = padded(2) + padded(dims.p), groups = p.fwd.pieces.groups;
  const int64_t spans = (dims.l + kSsdReduceTokens - 1) / kSsdReduceTokens;
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    if (unit == 0) {
      const R* from = static_cast<const R*>(p.partial_h);
      for (int64_t head = 0; head < dims.h; ++head, from += ldh) {
        sum_partials(p.dA, head * p.dA.stride[0], 1, 0, 1, 1, from, ldh, groups, dims.h * ldh);
        if (p.ddt_bias) {
          R total = 0;
          for (int64_t g = 0; g < groups; ++g) total += from[g * dims.h * ldh + 1];
          R row[kPad] = {total};
          store_tile(p.ddt_bias, head * p.ddt_bias.stride[0], 1, 0, 1, 1, row, kPad);
        }
        if (!p.dD) continue;
        if (dims.D_per_channel) {
          sum_partials(p.dD, head * p.dD.stride[0], 1, 0, dims.p, p.dD.stride[1], from + padded(2), ldh,
                       groups, dims.h * ldh);
        } else {
          Vec<R> total = {};
          for (int64_t g = 0; g < groups; ++g)
            for (int64_t v = 0; v < padded(dims.p); v += kWidth<R>)
              total += load<R>(from + padded(2) + g * dims.h * ldh + v);
          R row[kPad] = {sum<R>(total)};
          store_tile(p.dD, head * p.dD.stride[0], 1, 0, 1, 1, row, kPad);
        }
      }
      continue;
    }
    const int64_t row = (unit - 1) / spans, t0 = (unit - 1) % spans * kSsdReduceTokens;
    const int64_t tokens = dims.l - t0 < kSsdReduceTokens ? dims.l - t0 : kSsdReduceTokens;
    for (int which = 0; which < 2; ++which) {
      const View& out = which == 0 ? p.dB : p.dC;
      const int64_t out_groups = which == 0 ? dims.groups_B : dims.groups_C,
                    blocks = dims.head_blocks() / out_groups;
      for (int64_t g = 0; g < out_groups; ++g)
        sum_partials(out, row * out.stride[0] + t0 * out.stride[1] + g * out.stride[2], tokens, out.stride[1],
                     dims.n, out.stride[3],
                     static_cast<const R*>(p.partial_BC) +
                         (((g * blocks * dims.b + row) * dims.l + t0) * 2 + which) * ldn,
                     2 * ldn, blocks, dims.b * dims.l * 2 * ldn);
    }
  }
}

}  // namespace mamba_ops::MAMBA_ISA

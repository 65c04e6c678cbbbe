// What the forward and the backward of the SSD share: a unit of work, and the tiles of one chunk.
//
// A unit owns one group of pieces and up to dims.heads heads that share B and C, so that C B^T of a chunk is
// made once for all of them. T is the type of the factors of products (gemm.h), R that of everything else.
// Matrices are row-major with rows padded to whole vectors: tokens (q, padded p) or (q, padded n), pairs of
// tokens (q, padded q). Everything beyond the last token of a short chunk is zero where a product may read
// it.
#pragma once
#include <initializer_list>

#include "kernels/cpu/arena.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/tile.h"
#include "kernels/ssd.h"

namespace mamba_ops::MAMBA_ISA {

// Values of one head for the tokens of a chunk.
template <class R>
struct SsdSteps {
  R* raw;         // before softplus and clamp
  R* delta;       // steps; 0 past the end
  R* s;           // cumsum of delta A
  R* from_start;  // e^{s_i}
  R* to_end;      // e^{T - s_j}
  R A, T, decay;  // decay = e^T
};

template <class R, class T>
struct SsdUnit {
  int64_t pieces, block;  // group of pieces; block of heads
  int64_t head0, heads, group_B, group_C;
  int64_t ldq, ldp, ldn;
  R *B, *C;                   // (q, ldn)
  R* CB;                      // (q, ldq): C_i . B_j for j <= i; blocks above the diagonal are not written
  R* BT;                      // (ldn, ldq)
  R *packed_B, *packed_C;     // room for B and C as left factors
  Left<R, T> left_B, left_C;  // rows are tokens
  R* dt;                      // (heads, ldq)
  R* D;                       // (heads, ldp)
  SsdSteps<R> steps;

  SsdUnit(const SsdDims& dims, Arena<R>& arena)
      : ldq(padded(dims.q)), ldp(padded(dims.p)), ldn(padded(dims.n)) {
    B = arena.take(ldq * ldn);
    C = arena.take(ldq * ldn);
    CB = arena.take(dims.q * ldq);
    BT = arena.take(turned_size<R, T>(ldn, ldq));
    for (R** packed : {&packed_B, &packed_C}) *packed = arena.take(left_size<R, T>(ldq, ldn));
    dt = arena.take(padded(dims.heads) * ldq);
    D = arena.take(dims.heads * ldp);
    for (R** row : {&steps.raw, &steps.delta, &steps.s, &steps.from_start, &steps.to_end})
      *row = arena.take(ldq);
  }

  void begin(const SsdFwd& p, int64_t unit) {
    const SsdDims& dims = p.dims;
    const int64_t share = dims.sharing(), per_share = dims.blocks_per_share();
    block = unit % dims.head_blocks();
    pieces = unit / dims.head_blocks();
    const int64_t end = (block / per_share + 1) * share;
    head0 = block / per_share * share + block % per_share * dims.heads;
    heads = end - head0 < dims.heads ? end - head0 : dims.heads;
    group_B = head0 / (dims.h / dims.groups_B);
    group_C = head0 / (dims.h / dims.groups_C);
    for (int64_t i = 0; i < dims.heads * ldp; ++i) D[i] = 0;
    if (p.D)
      load_tile(D, ldp, p.D, head0 * p.D.stride[0], heads, p.D.stride[0], dims.p,
                dims.D_per_channel ? p.D.stride[1] : 0);
  }

  static R scalar(const View& v, int64_t offset) {
    R x = 0;
    with_type(v.dtype, [&]<class S>(S*) { x = to_real<R>(static_cast<const S*>(v.data)[offset]); });
    return x;
  }
  static View state_view(const void* states) {
    return {const_cast<void*>(states), sizeof(R) == sizeof(double) ? DType::f64 : DType::f32, {}};
  }
  int64_t state_at(const SsdDims& dims, int64_t row, int64_t head) const {
    return ((row * dims.h + head0 + head) * dims.p) * dims.n;
  }

  // Tokens [t0, t1) of B and C, and dt of all heads; with `products` also C B^T.
  void load_chunk(const SsdFwd& p, int64_t row, int64_t t0, int64_t t1, bool products) {
    const SsdDims& dims = p.dims;
    const int64_t len = t1 - t0, cols = whole_vectors<R>(len);
    load_tokens(B, p.B, row, t0, t1, group_B, dims.n, ldn, cols);
    load_tokens(C, p.C, row, t0, t1, group_C, dims.n, ldn, cols);
    load_tile(dt, ldq, p.dt, row * p.dt.stride[0] + t0 * p.dt.stride[1] + head0 * p.dt.stride[2], heads,
              p.dt.stride[2], len, p.dt.stride[1]);
    if (!products) return;
    left_B = left_of<R, T>(packed_B, B, ldn, cols, dims.n);
    left_C = left_of<R, T>(packed_C, C, ldn, len, dims.n);
    gemm<true>(
        left_C, right_of_transposed<R, T>(BT, left_B, cols, dims.n), len, cols,
        [&](int64_t, int64_t) { return Terms{0, dims.n}; }, [](int64_t, int64_t) { return Vec<R>{}; },
        [&](int64_t i, int64_t v, Vec<R> sum) { store<R>(CB + i * ldq + v, sum); });
  }
  // Tokens [t0, t1) of (b, l, groups or heads, width) -> (tokens, ld), zero in rows up to `rows`.
  void load_tokens(R* dst, const View& v, int64_t row, int64_t t0, int64_t t1, int64_t which, int64_t width,
                   int64_t ld, int64_t rows) const {
    load_tile(dst, ld, v, row * v.stride[0] + t0 * v.stride[1] + which * v.stride[2], t1 - t0, v.stride[1],
              width, v.stride[3]);
    for (int64_t i = (t1 - t0) * ld; i < rows * ld; ++i) dst[i] = 0;
  }
  void store_tokens(const View& v, int64_t row, int64_t t0, int64_t t1, int64_t head, int64_t width,
                    const R* src) const {
    store_tile(v, row * v.stride[0] + t0 * v.stride[1] + (head0 + head) * v.stride[2], t1 - t0, v.stride[1],
               width, v.stride[3], src, ldp);
  }

  // Asks for tokens [t0, t1) of one head, or group, of a tensor.
  void prefetch_tokens(const View& v, int64_t row, int64_t t0, int64_t t1, int64_t which,
                       int64_t width) const {
    prefetch_tile(v, row * v.stride[0] + t0 * v.stride[1] + which * v.stride[2], t1 - t0, v.stride[1], width,
                  v.stride[3], 0, 1);
  }
  // Asks for what comes after `head` of the chunk [t0, t1): the next head's tokens of the views, or B, C and
  // the first head's of the chunk [next_t0, next_t1), if that has any.
  void prefetch_next(const SsdFwd& p, std::initializer_list<const View*> views, int64_t row, int64_t head,
                     int64_t t0, int64_t t1, int64_t next_t0, int64_t next_t1) const {
    const bool last = head + 1 == heads;
    if (last) {
      t0 = next_t0, t1 = next_t1;
      if (t0 >= t1) return;
      prefetch_tokens(p.B, row, t0, t1, group_B, p.dims.n);
      prefetch_tokens(p.C, row, t0, t1, group_C, p.dims.n);
    }
    for (const View* v : views) prefetch_tokens(*v, row, t0, t1, head0 + (last ? 0 : head + 1), p.dims.p);
  }

  // The steps of one head for the len tokens of the chunk.
  void make_steps(const SsdFwd& p, int64_t head, int64_t len) {
    const SsdDims& dims = p.dims;
    SsdSteps<R>& s = steps;
    const R bias = p.dt_bias ? scalar(p.dt_bias, (head0 + head) * p.dt_bias.stride[0]) : R(0);
    s.A = scalar(p.A, (head0 + head) * p.A.stride[0]);
    const Vec<R> lo = splat(R(dims.dt_min)), hi = splat(R(dims.dt_max));
    for (int64_t v = 0; v < len; v += kWidth<R>) {
      const Vec<R> raw = load<R>(dt + head * ldq + v) + bias;
      Vec<R> step = dims.softplus ? softplus<R>(raw) : raw;
      step = step < lo ? lo : step;
      step = step > hi ? hi : step;
      store<R>(s.raw + v, raw);
      store<R>(s.delta + v, step);
    }
    R sum = 0;
    for (int64_t t = 0; t < ldq; ++t) {
      if (t < len)
        sum += s.delta[t] * s.A;
      else
        s.delta[t] = 0;
      s.s[t] = sum;
    }
    s.T = sum;
    s.decay = exp(splat(sum))[0];
    for (int64_t v = 0; v < len; v += kWidth<R>) {
      store<R>(s.from_start + v, exp(load<R>(s.s + v)));
      store<R>(s.to_end + v, exp(Vec<R>(sum - load<R>(s.s + v))));
    }
  }

  // e^{s_i - s_j} for j = v .. v + kWidth, 0 where j > i (masked before exp, which could overflow there).
  MAMBA_INLINE Vec<R> decay_row(int64_t i, int64_t v) const {
    const Vec<R> gap = steps.s[i] - load<R>(steps.s + v);
    const auto seen = causal(i, v);
    return seen ? exp(Vec<R>(seen ? gap : Vec<R>{})) : Vec<R>{};
  }
  MAMBA_INLINE static IntVec<R> causal(int64_t i, int64_t v) {  // j <= i
    IntVec<R> j;
    for (int k = 0; k < kWidth<R>; ++k) j[k] = k;
    return j <= IntVec<R>{} + typename Traits<R>::Lane(i - v);
  }
  // Columns of row i that a product over a block of rows may read.
  MAMBA_INLINE static int64_t row_end(int64_t i) {
    constexpr int64_t step = kWidth<R> > kGemmRows ? kWidth<R> : kGemmRows;
    return (i / step + 1) * step;
  }
};

}  // namespace mamba_ops::MAMBA_ISA

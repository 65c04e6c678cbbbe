// SSD forward, portable: one head of one row or piece (see ssd_fwd.cu).
#pragma once
#include "kernels/cuda/ssd_fwd_products.cuh"

namespace mamba_ops::gpu {

struct Chunk {
  int64_t begin;
  int tokens;  // 0: none
};

template <class F, class Sizes>
struct Forward : FwdProducts<F, Sizes> {
  using Products = FwdProducts<F, Sizes>;
  using Products::kN, Products::kP, Products::kQ, Products::lane, Products::state, Products::tiles,
      Products::warp;
  using typename Products::E, typename Products::R, typename Products::T;

  const FwdArgs& a;
  int64_t row, head, piece;
  int first_p, channels;  // of the block
  int64_t piece_end, cell_end;
  HeadParameters<R> parameters;

  __device__ Forward(const FwdArgs& args, T& shared, int64_t b, int64_t h, int64_t k, int p)
      : Products(shared),
        a(args),
        row(b),
        head(h),
        piece(k),
        first_p(p),
        channels(int(min(args.p.dims.p - p, int64_t(kP)))),
        parameters(args.p, h) {
    cell_end = piece * a.pieces.cells * a.pieces.q;
    piece_end = min(cell_end + a.pieces.cells * a.pieces.q, a.p.dims.l);
  }

  __device__ Chunk chunk_from(int64_t t) {
    if (t >= piece_end) return {t, 0};
    if (t == cell_end) cell_end = min(cell_end + a.pieces.q, piece_end);
    return {t, int(first_start(a.seqs, row, t, cell_end) - t)};
  }

  // What tokens have in common.
  __device__ void prepare_row() const {
    const SsdDims& dims = a.p.dims;
    const View& D = a.p.D;
    if (const int p = threadIdx.x; p < kP)
      tiles.D[p] =
          D.data && p < channels
              ? load_one<R>(D, head * D.stride[0] + (dims.D_per_channel ? (first_p + p) * D.stride[1] : 0))
              : R(0);
    if (threadIdx.x != 0) return;
    tiles.first.x = place(a.x.view, row, 0, head, first_p);
    tiles.first.z = place(a.z.view, row, 0, head, first_p);
    tiles.first.y = place(a.y.view, row, 0, head, first_p);
    tiles.first.B = place(a.B.view, row, 0, head / (dims.h / dims.groups_B), 0);
    tiles.first.C = place(a.C.view, row, 0, head / (dims.h / dims.groups_C), 0);
  }
  __device__ void load_BC(const Chunk& chunk) const {
    const int n = int(a.p.dims.n);
    load_tokens<F, kQ, kN, T::kThreads>(tiles.C, T::kLdC, a.C,
                                        tiles.first.C + chunk.begin * a.C.view.stride[1], chunk.tokens, n);
    load_tokens<F, kQ, kN, T::kThreads>(tiles.B, T::kLdB, a.B,
                                        tiles.first.B + chunk.begin * a.B.view.stride[1], chunk.tokens, n);
  }
  __device__ void load_channels(E* tile, const Rows& from, int64_t first, const Chunk& chunk) const {
    load_tokens<F, kQ, kP, T::kThreads>(tile, T::kLdX, from, first + chunk.begin * from.view.stride[1],
                                        chunk.tokens, channels);
  }

  __device__ int64_t state_at(int64_t k) const {
    return ((k * a.p.dims.h + head) * a.p.dims.p + first_p) * a.p.dims.n;
  }
  // The rows [begin, end) of the states belong to sequences without tokens.
  __device__ void pass_states(int64_t begin, int64_t end) const {
    if (!a.p.states_out) return;
    for (int64_t k = begin; k < end; ++k)
      for (int i = threadIdx.x; i < channels * a.p.dims.n; i += T::kThreads)
        static_cast<R*>(a.p.states_out)[state_at(k) + i] =
            a.p.states_in ? static_cast<const R*>(a.p.states_in)[state_at(k) + i] : R(0);
  }
  __device__ void enter(const Chunk& chunk) {
    const SsdDims& dims = a.p.dims;
    const int first_row = 16 * warp;
    if (is_edge(a.seqs, row, chunk.begin, dims.l)) {
      const int64_t k = state_row(a.seqs, row, chunk.begin);
      const R* from = static_cast<const R*>(a.p.states_in);
      if (from) from += state_at(k) + first_row * dims.n;
      load_state(state, k >= 0 ? from : nullptr, dims.n, channels - first_row, dims.n);
      if (a.seqs.cu_seqlens.data)
        pass_states(chunk.begin == 0 ? 0 : state_row(a.seqs, row, chunk.begin - 1) + 1, k);
    } else if (chunk.begin == piece * a.pieces.cells * a.pieces.q) {
      load_state<kN / 8, R>(state, nullptr, 0, 0, 0);
      for (int64_t k = 0; k < piece; ++k)
        pass_piece(state, dims, a.pieces, false, row, k, head, first_p + first_row, 0, channels - first_row);
    }
  }
  __device__ void leave(const Chunk& chunk) {
    const SsdDims& dims = a.p.dims;
    const int first_row = 16 * warp;
    const int64_t end = chunk.begin + chunk.tokens;
    if (!a.p.states_out || !is_edge(a.seqs, row, end, dims.l)) return;
    const int64_t k = state_row_out(a.seqs, row, end, dims.l);
    if (k >= 0)
      store_state(static_cast<R*>(a.p.states_out) + state_at(k) + first_row * dims.n, dims.n, state,
                  channels - first_row, dims.n);
    if (a.seqs.cu_seqlens.data && end == dims.l) pass_states(k + 1, a.states);
  }

  // + X^T P^T, + D x, the gate, and out.
  __device__ void finish(E* x, const Chunk& chunk, R (&y)[kQ / 8][4]) const {
    const R D[2] = {tiles.D[16 * warp + lane / 4], tiles.D[16 * warp + lane / 4 + 8]};
    if constexpr (T::kSplit) {
      R z[kQ / 8][4] = {};
      if (a.z.view.data) for_outputs(a.z.view, tiles.first.z, chunk, z, [](R& v, const E& at) { v = at; });
      this->add_pairs(x, D, y);
      if (a.z.view.data)
#pragma unroll
        for (int i = 0; i < kQ / 2; ++i) y[i / 4][i % 4] *= silu(z[i / 4][i % 4]);
      for_outputs(a.y.view, tiles.first.y, chunk, y, [](R v, E& at) { at = v; });
    } else {
      this->add_pairs(x, D, y);
      if (a.z.view.data) gate(y);
      store(x, chunk, y);
    }
  }

  // f(value, its place) for this warp's values of Y^T that exist.
  template <class Function>
  __device__ void for_outputs(const View& view, int64_t first, const Chunk& chunk, R (&y)[kQ / 8][4],
                              Function f) const {
    const int token = lane % 4 * 2, channel = 16 * warp + lane / 4;
    E* const place = static_cast<E*>(view.data) + first + (chunk.begin + token) * view.stride[1] +
                     channel * view.stride[3];
    E* const places[2] = {place, place + 8 * view.stride[3]};
    const bool exists[2] = {channel < channels, channel + 8 < channels};
#pragma unroll
    for (int tile = 0; tile < kQ / 8; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int t = 8 * tile + k % 2;
        if (exists[k / 2] && token + t < chunk.tokens) f(y[tile][k], places[k / 2][t * view.stride[1]]);
      }
  }

  __device__ void gate(R (&y)[kQ / 8][4]) const {
#pragma unroll
    for (int k = 0; k < kQ; k += 16) {
      const auto z = F::left_turned(tiles.z + k * T::kLdX + 16 * warp, T::kLdX);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        y[k / 8 + i % 4 / 2][i / 4 * 2 + i % 2] *= silu(R(F::term(z, i / 4, i % 4)));
    }
  }
  // y takes x's place in the tile, and goes out.
  __device__ void store(E* x, const Chunk& chunk, const R (&y)[kQ / 8][4]) const {
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kQ / 8; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        F::store_turned(x + 8 * tile * T::kLdX + 16 * warp + 8 * half, T::kLdX, y[tile][2 * half],
                        y[tile][2 * half + 1]);
    __syncwarp();
    const int64_t* stride = a.y.view.stride;
    const int64_t offset = tiles.first.y + chunk.begin * stride[1] + 16 * warp * stride[3];
    const int left = channels - 16 * warp;
    if (a.y.direct && left >= 16) {
      constexpr int kVector = 16 / sizeof(E), kVectors = 16 / kVector;
      for (int i = lane; i < chunk.tokens * kVectors; i += 32)
        *reinterpret_cast<uint4*>(static_cast<E*>(a.y.view.data) + offset + i / kVectors * stride[1] +
                                  i % kVectors * kVector) =
            *reinterpret_cast<const uint4*>(x + i / kVectors * T::kLdX + 16 * warp + i % kVectors * kVector);
    } else {
      for (int i = lane; i < chunk.tokens * 16; i += 32)
        if (i % 16 < left)
          store_one(a.y.view, offset + i / 16 * stride[1] + i % 16 * stride[3],
                    R(to_real(x[i / 16 * T::kLdX + 16 * warp + i % 16])));
    }
  }

  __device__ void run() {
    using WarpSteps = LaneSteps<F, kQ>;
    Chunk chunk = chunk_from(cell_end);
    if (chunk.tokens == 0) return;
    prepare_row();
    __syncthreads();
    load_BC(chunk);
    load_channels(tiles.x[0], a.x, tiles.first.x, chunk);
    commit_copies();
    if (warp == T::kStepsWarp)
      WarpSteps(a.p, row, chunk.begin, head, parameters, chunk.tokens).store(tiles.steps[0]);
    for (int turn = 0; chunk.tokens; turn ^= 1) {
      const Steps<F, kQ>& steps = tiles.steps[turn];
      const Chunk next = chunk_from(chunk.begin + chunk.tokens);
      wait_for_copies();
      if constexpr (T::kSplit) {
        if (!a.B.direct || !a.C.direct) __syncthreads();
        this->split();
      }
      __syncthreads();
      if (!T::kSplit && a.z.view.data) load_channels(tiles.z, a.z, tiles.first.z, chunk);
      commit_copies();
      if (next.tokens) load_channels(tiles.x[turn ^ 1], a.x, tiles.first.x, next);
      commit_copies();
      R dt[WarpSteps::kPerLane];
      if (warp == T::kStepsWarp) WarpSteps::load(dt, a.p, row, next.begin, head, next.tokens);
      enter(chunk);
      this->make_pairs(steps);
      if (warp == T::kStepsWarp)
        WarpSteps(dt, a.p.dims, parameters, next.tokens).store(tiles.steps[turn ^ 1]);
      R y[kQ / 8][4] = {};
      this->pass_state(tiles.x[turn], steps, y);
      leave(chunk);
      wait_for_copies<1>();  // z
      __syncthreads();
      if (next.tokens) load_BC(next);
      commit_copies();
      finish(tiles.x[turn], chunk, y);
      chunk = next;
    }
  }

  // What a pack with bad offsets gets.
  __device__ void fill_nan() const {
    const View& y = a.p.y;
    const int64_t begin = piece * a.pieces.cells * a.pieces.q;
    for (int64_t i = threadIdx.x; i < (piece_end - begin) * channels; i += T::kThreads)
      store_one(y, place(y, row, begin + i / channels, head, first_p + i % channels), R(NAN));
    if (a.p.states_out && piece == 0)
      for (int64_t k = 0; k < a.states; ++k)
        for (int i = threadIdx.x; i < channels * a.p.dims.n; i += T::kThreads)
          static_cast<R*>(a.p.states_out)[state_at(k) + i] = R(NAN);
  }
};

}  // namespace mamba_ops::gpu

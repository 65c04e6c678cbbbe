// SSD forward, portable: one head of one row or piece (see ssd_fwd.cu).
#pragma once
#include "kernels/cuda/ssd_states.h"
#include "kernels/cuda/ssd_tile.cuh"

namespace mamba_ops::gpu {

struct FwdArgs {
  SsdFwd p;
  Sequences seqs;
  int64_t states;  // rows of states
  Rows x, z, y, B, C;
  SsdPieces pieces;
};

// Sizes by the bytes of a factor and the width that holds n. kBlocks: of a multiprocessor.
template <int kBytes, int kN>
struct FwdSizes;
template <int N>
struct FwdSizes<2, N> {
  static constexpr int kQ = 64, kP = 64, kBlocks = N <= 128 ? 3 : 2;
};
template <int N>
struct FwdSizes<4, N> {
  static constexpr int kQ = 32, kP = 64, kBlocks = N <= 128 ? 3 : 2;
};
template <int N>
struct FwdSizes<8, N> {
  static constexpr int kQ = N <= 128 ? 32 : 16, kP = 32, kBlocks = 1;
};

template <class F, int kWidth>
struct FwdTiles : FwdSizes<sizeof(typename F::Element), kWidth> {
  using E = typename F::Element;
  using R = typename F::Real;
  using Sizes = FwdSizes<sizeof(E), kWidth>;
  using Sizes::kQ, Sizes::kP;
  static constexpr int kN = kWidth, kWarps = kP / 16, kThreads = 32 * kWarps;
  static constexpr int kStepsWarp = kWarps - kQ / 16;  // it has the fewest pairs
  static constexpr int kLdX = kP + F::kPadAcross, kLdP = kQ + F::kPadAlong;
  static constexpr int kLdB = kN + F::kPadAcross, kLdC = kN + F::kPadAlong;
  alignas(16) E B[kQ * kLdB];
  alignas(16) E C[kQ * kLdC];
  alignas(16) E x[2][kQ * kLdX];
  Steps<F, kQ> steps[2];
  struct {
    int64_t x, z, y, B, C;
  } first;  // where the row's first token lies
  alignas(16) E P[kQ * kLdP];
  alignas(16) E z[kQ * kLdX];  // allocated for z alone
  static constexpr int bytes(bool z) { return int(z ? sizeof(FwdTiles) : offsetof(FwdTiles, z)); }
};

struct Chunk {
  int64_t begin;
  int tokens;  // 0: none
};

template <class F, int kWidth>
struct Forward {
  using T = FwdTiles<F, kWidth>;
  using E = typename F::Element;
  using R = typename F::Real;
  static constexpr int kQ = T::kQ, kP = T::kP, kN = T::kN;

  const FwdArgs& a;
  T& tiles;
  int64_t row, head, piece;
  int first_p, channels;  // of the block
  int64_t piece_end, cell_end;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  HeadParameters<R> parameters;
  R state[kN / 8][4];

  __device__ Forward(const FwdArgs& args, T& shared, int64_t b, int64_t h, int64_t k, int p)
      : a(args),
        tiles(shared),
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

  __device__ void find_first() const {
    const SsdDims& dims = a.p.dims;
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
    const int64_t first_row = 16 * warp;
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
    const int64_t end = chunk.begin + chunk.tokens, first_row = 16 * warp;
    if (!a.p.states_out || !is_edge(a.seqs, row, end, dims.l)) return;
    const int64_t k = state_row_out(a.seqs, row, end, dims.l);
    if (k >= 0)
      store_state(static_cast<R*>(a.p.states_out) + state_at(k) + first_row * dims.n, dims.n, state,
                  channels - first_row, dims.n);
    if (a.seqs.cu_seqlens.data && end == dims.l) pass_states(k + 1, a.states);
  }

  // The blocks of P on and below the diagonal.
  __device__ void make_pairs(const Steps<F, kQ>& steps) const {
    constexpr int kRowBlocks = kQ / 16, kColumns = kQ * kRowBlocks / T::kWarps;
    const int block = warp % kRowBlocks, first_column = warp / kRowBlocks * kColumns;
    R sums[kColumns / 8][4] = {};
    const auto below = [&](int i) { return first_column / 16 + i <= block; };
#pragma unroll 2
    for (int k = 0; k < kN; k += 16)
      multiply_columns<F, false>(sums, F::left(tiles.C + block * 16 * T::kLdC + k, T::kLdC),
                                 tiles.B + first_column * T::kLdB + k, T::kLdB, below);
    const int i = block * 16 + lane / 4;
    const typename F::Sum s[2] = {steps.s[i], steps.s[i + 8]};
#pragma unroll
    for (int tile = 0; tile < kColumns / 8; ++tile) {
      if (!below(tile / 2)) continue;
      const int j = first_column + 8 * tile + lane % 4 * 2;
      const typename F::Sum s_j[2] = {steps.s[j], steps.s[j + 1]};
      const R delta[2] = {steps.delta[j], steps.delta[j + 1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        R pair[2];
#pragma unroll
        for (int k = 0; k < 2; ++k)
          pair[k] =
              i + 8 * half >= j + k ? sums[tile][2 * half + k] * exp2_of(s[half] - s_j[k]) * delta[k] : R(0);
        F::store_pair(tiles.P + (i + 8 * half) * T::kLdP + j, pair[0], pair[1]);
      }
    }
  }

  // Y^T of this warp's channels from H, and H after the chunk. Does not read P.
  __device__ void pass_state(const E* x, const Steps<F, kQ>& steps, R (&y)[kQ / 8][4]) {
#pragma unroll
    for (int k = 0; k < kN; k += 16)
      multiply_columns<F, false>(y, F::from_sums(state[k / 8], state[k / 8 + 1]), tiles.C + k, T::kLdC);
#pragma unroll
    for (int tile = 0; tile < kQ / 8; ++tile) {
      R decay[2];
      for (int k = 0; k < 2; ++k) decay[k] = steps.from_start[8 * tile + lane % 4 * 2 + k];
#pragma unroll
      for (int k = 0; k < 4; ++k) y[tile][k] *= decay[k % 2];
    }
    scale(state, steps.decay);
#pragma unroll 1
    for (int k = 0; k < kQ; k += 16) {
      const auto left = F::left_turned(x + k * T::kLdX + 16 * warp, T::kLdX);
      multiply_columns<F, true>(state, F::weighted(left, steps.weight + k), tiles.B + k * T::kLdB, T::kLdB);
    }
  }

  // + X^T P^T, + D x, the gate; then y takes x's place in the tile, and goes out.
  __device__ void finish(E* x, const Chunk& chunk, R (&y)[kQ / 8][4]) const {
    R D[2] = {};
    const int channel = 16 * warp + lane / 4;
    if (a.p.D.data)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (channel + 8 * half < channels)
          D[half] = load_one<R>(
              a.p.D, head * a.p.D.stride[0] +
                         (a.p.dims.D_per_channel ? (first_p + channel + 8 * half) * a.p.D.stride[1] : 0));
#pragma unroll
    for (int k = 0; k < kQ; k += 16) {
      const auto left = F::left_turned(x + k * T::kLdX + 16 * warp, T::kLdX);
      multiply_columns<F, false>(y, left, tiles.P + k, T::kLdP, [&](int i) { return i >= k / 16; });
#pragma unroll
      for (int i = 0; i < 8; ++i)
        y[k / 8 + i % 4 / 2][i / 4 * 2 + i % 2] += D[i / 4] * F::term(left, i / 4, i % 4);
    }
    if (a.z.view.data)
#pragma unroll
      for (int k = 0; k < kQ; k += 16) {
        const auto z = F::left_turned(tiles.z + k * T::kLdX + 16 * warp, T::kLdX);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          y[k / 8 + i % 4 / 2][i / 4 * 2 + i % 2] *= silu(R(F::term(z, i / 4, i % 4)));
      }
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
    if (threadIdx.x == 0) find_first();
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
      __syncthreads();
      if (a.z.view.data) load_channels(tiles.z, a.z, tiles.first.z, chunk);
      commit_copies();
      if (next.tokens) load_channels(tiles.x[turn ^ 1], a.x, tiles.first.x, next);
      commit_copies();
      R dt[WarpSteps::kPerLane];
      if (warp == T::kStepsWarp) WarpSteps::load(dt, a.p, row, next.begin, head, next.tokens);
      enter(chunk);
      make_pairs(steps);
      if (warp == T::kStepsWarp)
        WarpSteps(dt, a.p.dims, parameters, next.tokens).store(tiles.steps[turn ^ 1]);
      R y[kQ / 8][4] = {};
      pass_state(tiles.x[turn], steps, y);
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

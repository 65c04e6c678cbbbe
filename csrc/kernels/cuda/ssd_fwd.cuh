// SSD forward, portable: one head of one row or piece (see ssd_fwd.cu).
#pragma once
#include "kernels/cuda/ssd_fwd_products.cuh"

namespace mamba_ops::gpu {

template <class F, class Sizes>
struct Forward : FwdProducts<F, Sizes> {
  using Products = FwdProducts<F, Sizes>;
  using Products::kN, Products::kP, Products::kQ, Products::lane, Products::state, Products::tiles,
      Products::warp;
  using typename Products::E, typename Products::R, typename Products::T;

  using Work = typename T::Work;
  using KeptWork = std::conditional_t<T::kSplit, const Work&, const Work>;

  const FwdArgs& a;
  KeptWork work;  // float32 has no registers for it: in shared memory

  // Channels from p on of head h in piece k of row b.
  __device__ Forward(const FwdArgs& args, T& shared, int b, int h, int k, int p)
      : Products(shared), a(args), work(keep(shared, work_of(args, b, h, k, p))) {
    prepare_row();
    __syncthreads();
  }

  __device__ static Work work_of(const FwdArgs& a, int b, int h, int k, int p) {
    const int64_t tokens = a.pieces.cells * a.pieces.q;
    return {.row = b,
            .head = h,
            .piece = k,
            .first_p = p,
            .channels = int(min(a.p.dims.p - p, int64_t(kP))),
            .begin = k * tokens,
            .end = min((k + 1) * tokens, a.p.dims.l),
            .parameters = HeadParameters<R>(a.p, h)};
  }
  __device__ static KeptWork keep(T& shared, const Work& work) {
    if constexpr (T::kSplit) {
      if (threadIdx.x == 0) shared.work = work;
      __syncthreads();
      return shared.work;
    } else {
      return work;
    }
  }
  // What tokens have in common.
  __device__ void prepare_row() const {
    const SsdDims& dims = a.p.dims;
    const View& D = a.p.D;
    if (const int p = threadIdx.x; p < kP)
      tiles.D[p] = D.data && p < work.channels
                       ? load_one<R>(D, work.head * D.stride[0] +
                                            (dims.D_per_channel ? (work.first_p + p) * D.stride[1] : 0))
                       : R(0);
    if (threadIdx.x != 0) return;
    tiles.first.x = place(a.x.view, work.row, 0, work.head, work.first_p);
    tiles.first.z = place(a.z.view, work.row, 0, work.head, work.first_p);
    tiles.first.y = place(a.y.view, work.row, 0, work.head, work.first_p);
    tiles.first.B = place(a.B.view, work.row, 0, work.head / (dims.h / dims.groups_B), 0);
    tiles.first.C = place(a.C.view, work.row, 0, work.head / (dims.h / dims.groups_C), 0);
  }

  // From token t on, in a cell that ends at cell_end or begins at t. By a whole warp.
  __device__ Chunk chunk_from(int64_t t, int64_t cell_end) const {
    if (t >= work.end) return {t, cell_end, 0, false, false};
    if (t == cell_end) cell_end = min(cell_end + a.pieces.q, work.end);
    const int64_t end = first_start(a.seqs, work.row, t, cell_end), l = a.p.dims.l;
    return {.begin = t,
            .cell_end = cell_end,
            .tokens = int(end - t),
            .enters = t == work.begin || is_edge(a.seqs, work.row, t, l),
            .leaves = a.p.states_out && is_edge(a.seqs, work.row, end, l)};
  }
  __device__ Chunk chunk_after(const Chunk& chunk) const {
    return chunk_from(chunk.begin + chunk.tokens, chunk.cell_end);
  }

  __device__ void load_B(const Chunk& chunk) const {
    load_tokens<F, kQ, kN, T::kThreads>(tiles.B, T::kLdB, a.B,
                                        tiles.first.B + chunk.begin * a.B.view.stride[1], chunk.tokens,
                                        int(a.p.dims.n));
  }
  __device__ void load_C(const Chunk& chunk) const {
    load_tokens<F, kQ, kN, T::kThreads>(tiles.C, T::kLdC, a.C,
                                        tiles.first.C + chunk.begin * a.C.view.stride[1], chunk.tokens,
                                        int(a.p.dims.n));
  }
  __device__ void load_channels(E* tile, const Rows& from, int64_t first, const Chunk& chunk) const {
    load_tokens<F, kQ, kP, T::kThreads>(tile, T::kLdX, from, first + chunk.begin * from.view.stride[1],
                                        chunk.tokens, work.channels);
  }

  __device__ int64_t state_at(int64_t k) const {
    return ((k * a.p.dims.h + work.head) * a.p.dims.p + work.first_p) * a.p.dims.n;
  }
  // The rows [begin, end) of the states belong to sequences without tokens.
  __device__ void pass_states(int64_t begin, int64_t end) const {
    if (!a.p.states_out) return;
    for (int64_t k = begin; k < end; ++k)
      for (int i = threadIdx.x; i < work.channels * a.p.dims.n; i += T::kThreads)
        static_cast<R*>(a.p.states_out)[state_at(k) + i] =
            a.p.states_in ? static_cast<const R*>(a.p.states_in)[state_at(k) + i] : R(0);
  }
  __device__ void enter(const Chunk& chunk) {
    if (!chunk.enters) return;
    const SsdDims& dims = a.p.dims;
    const int first_row = 16 * warp, rows = work.channels - first_row;
    if (is_edge(a.seqs, work.row, chunk.begin, dims.l)) {
      const int64_t k = state_row(a.seqs, work.row, chunk.begin);
      const R* from = static_cast<const R*>(a.p.states_in);
      if (from) from += state_at(k) + first_row * dims.n;
      load_state(state, k >= 0 ? from : nullptr, dims.n, rows, dims.n);
      if (a.seqs.cu_seqlens.data)
        pass_states(chunk.begin == 0 ? 0 : state_row(a.seqs, work.row, chunk.begin - 1) + 1, k);
    } else {
      load_state<kN / 8, R>(state, nullptr, 0, 0, 0);
      for (int64_t k = 0; k < work.piece; ++k)
        pass_piece(state, dims, a.pieces, false, work.row, k, work.head, work.first_p + first_row, 0, rows);
    }
    if constexpr (T::kSplit) {
      this->find_largest();
      __syncwarp();  // they are read before the next barrier
    }
  }
  __device__ void leave(const Chunk& chunk) {
    if (!chunk.leaves) return;
    const SsdDims& dims = a.p.dims;
    const int first_row = 16 * warp;
    const int64_t end = chunk.begin + chunk.tokens, k = state_row_out(a.seqs, work.row, end, dims.l);
    if (k >= 0)
      store_state(static_cast<R*>(a.p.states_out) + state_at(k) + first_row * dims.n, dims.n, state,
                  work.channels - first_row, dims.n);
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
    const int token = lane % 4 * 2, channel = 16 * warp + lane / 4, left = chunk.tokens - token;
    E* const place = static_cast<E*>(view.data) + first + (chunk.begin + token) * view.stride[1] +
                     channel * view.stride[3];
    E* const places[2] = {place, place + 8 * view.stride[3]};
    const int channels = work.channels;
    const bool exists[2] = {channel < channels, channel + 8 < channels};
#pragma unroll
    for (int tile = 0; tile < kQ / 8; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int t = 8 * tile + k % 2;
        if (exists[k / 2] && t < left) f(y[tile][k], places[k / 2][t * view.stride[1]]);
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
    const int left = work.channels - 16 * warp;
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

  using WarpSteps = LaneSteps<F, kQ>;

  __device__ void load_dt(const Chunk& chunk, R (&dt)[WarpSteps::kPerLane]) const {
    WarpSteps::load(dt, a.p, work.row, chunk.begin, work.head, chunk.tokens);
  }
  __device__ void make_steps(const Chunk& chunk, const R (&dt)[WarpSteps::kPerLane],
                             Steps<F, kQ>& steps) const {
    WarpSteps(dt, a.p.dims, work.parameters, chunk.tokens).store(steps);
  }

  __device__ void run() {
    const Chunk chunk = chunk_from(work.begin, work.begin);
    if (chunk.tokens == 0) return;
    if (warp == T::kStepsWarp) {
      R dt[WarpSteps::kPerLane];
      load_dt(chunk, dt);
      make_steps(chunk, dt, tiles.steps[0]);
    }
    if constexpr (T::kSplit)
      pass_split_chunks(chunk);
    else
      pass_chunks(chunk);
  }

  __device__ void pass_chunks(Chunk chunk) {
    load_C(chunk);
    load_B(chunk);
    load_channels(tiles.x[0], a.x, tiles.first.x, chunk);
    commit_copies();
    for (int turn = 0; chunk.tokens; turn ^= 1) {
      const Steps<F, kQ>& steps = tiles.steps[turn];
      const Chunk next = chunk_after(chunk);
      wait_for_copies();
      __syncthreads();
      if (a.z.view.data) load_channels(tiles.z, a.z, tiles.first.z, chunk);
      commit_copies();
      if (next.tokens) load_channels(tiles.x[turn ^ 1], a.x, tiles.first.x, next);
      commit_copies();
      R dt[WarpSteps::kPerLane];
      if (warp == T::kStepsWarp) load_dt(next, dt);
      enter(chunk);
      this->make_pairs(steps);
      if (warp == T::kStepsWarp) make_steps(next, dt, tiles.steps[turn ^ 1]);
      R y[kQ / 8][4] = {};
      this->pass_state(tiles.x[turn], steps, y);
      leave(chunk);
      wait_for_copies<1>();  // z
      __syncthreads();
      if (next.tokens) {
        load_C(next);
        load_B(next);
      }
      commit_copies();
      finish(tiles.x[turn], chunk, y);
      chunk = next;
    }
  }

  // One warp makes the next chunk, for the others to read after a barrier: they have no registers for it.
  __device__ void pass_split_chunks(const Chunk& first) {
    if (threadIdx.x == 0) tiles.chunks[0] = first;
    load_C(first);
    commit_copies();
    __syncthreads();
    for (int turn = 0; tiles.chunks[turn].tokens; turn ^= 1) {
      const Chunk &chunk = tiles.chunks[turn], &next = tiles.chunks[turn ^ 1];
      const Steps<F, kQ>& steps = tiles.steps[turn];
      wait_for_copies();
      if (!a.C.direct) __syncthreads();
      this->split_C();
      __syncthreads();
      load_B(chunk);
      commit_copies();
      load_channels(tiles.x[0], a.x, tiles.first.x, chunk);
      commit_copies();
      R dt[WarpSteps::kPerLane];
      if (warp == T::kStepsWarp) {
        const Chunk after = chunk_after(chunk);
        if (lane == 0) tiles.chunks[turn ^ 1] = after;
        load_dt(after, dt);
      }
      enter(chunk);
      R y[kQ / 8][4];
      this->multiply_state(steps, y);
      wait_for_copies<1>();  // B
      if (!a.B.direct) __syncthreads();
      this->split_B();
      __syncthreads();
      this->make_pairs(steps);
      if (warp == T::kStepsWarp) make_steps(next, dt, tiles.steps[turn ^ 1]);
      wait_for_copies();
      __syncthreads();
      if (next.tokens) load_C(next);
      commit_copies();
      finish(tiles.x[0], chunk, y);
      this->add_tokens(tiles.x[0], steps);
      leave(chunk);
    }
  }

  // What a pack with bad offsets gets.
  __device__ void fill_nan() const {
    const View& y = a.p.y;
    for (int64_t i = threadIdx.x; i < (work.end - work.begin) * work.channels; i += T::kThreads)
      store_one(
          y, place(y, work.row, work.begin + i / work.channels, work.head, work.first_p + i % work.channels),
          R(NAN));
    if (a.p.states_out && work.piece == 0)
      for (int64_t k = 0; k < a.states; ++k)
        for (int i = threadIdx.x; i < work.channels * a.p.dims.n; i += T::kThreads)
          static_cast<R*>(a.p.states_out)[state_at(k) + i] = R(NAN);
  }
};

}  // namespace mamba_ops::gpu

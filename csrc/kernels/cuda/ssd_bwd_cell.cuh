// SSD backward, portable: one cell, and the order of things in it (see ssd_bwd.cu).
#pragma once
#include "kernels/cuda/ssd_bwd_tiles.cuh"

namespace mamba_ops::gpu {

// One cell of one row, for a block of heads.
template <class F, class Sizes>
struct Backward {
  using T = BwdTiles<F, Sizes>;
  using E = typename F::Element;
  using R = typename F::Real;
  using Stage = typename T::Stage;
  using Head = typename T::Head;
  static constexpr int kQ = T::kQ, kP = T::kP, kN = T::kN, kThreads = T::kThreads;
  static constexpr int kPairColumns = kQ / T::kGroups, kColumnsP = kP / T::kGroups,
                       kColumnsN = kN / T::kGroups;

  const BwdArgs& a;
  T& tiles;
  const SsdDims& dims;
  int64_t row, cell, first_head, heads, block;
  int64_t group_B, group_C;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // This warp's tokens begin at 16 (warp / kGroups); in products with p, n or tokens as columns, its columns
  // at `group` times their number.
  const int first_token = warp / T::kGroups * 16, group = warp % T::kGroups;
  const int token = first_token + lane / 4;  // and token + 8: this lane's rows of sums

  // The chunk at hand.
  int64_t begin, end;
  int tokens;
  bool begins, ends;            // a run begins or ends with it
  int64_t state_in, state_out;  // rows, or -1

  R CB[kPairColumns / 8][4], dCB[kPairColumns / 8][4];  // (j, i)
  R dB[kColumnsN / 8][4], dC[kColumnsN / 8][4];

  struct Item {
    int64_t head;
    int first_p, channels;
  };
  __device__ int items() const { return int(heads * ((dims.p + kP - 1) / kP)); }
  __device__ Item item(int i) const {
    const int slices = int((dims.p + kP - 1) / kP), first_p = i % slices * kP;
    return {first_head + i / slices, first_p, int(min(dims.p - first_p, int64_t(kP)))};
  }
  __device__ int64_t state_at(int64_t k, const Item& at) const {
    return ((k * dims.h + at.head) * dims.p + at.first_p) * dims.n;
  }

  __device__ Backward(const BwdArgs& args, T& shared, int64_t b, int64_t c, int64_t head_block)
      : a(args), tiles(shared), dims(args.p.fwd.dims), row(b), cell(c), block(head_block) {
    first_head = block / a.per_share * a.share + block % a.per_share * dims.heads;
    heads = min(dims.heads, (block / a.per_share + 1) * a.share - first_head);
    group_B = first_head / (dims.h / dims.groups_B);
    group_C = first_head / (dims.h / dims.groups_C);
  }

  __device__ int64_t first_of(const View& v, const Item& at) const {
    return place(v, row, begin, at.head, at.first_p);
  }

  // ssd_bwd_products.cuh
  __device__ void pairs(const Stage& in, const Head& head);
  __device__ void store_row_sums(R* to, R (&sums)[2]) const;
  __device__ void through_state(R (&grad)[kColumnsN / 8][4], R* dots, const E* rows, const E* state,
                                const R (&factor)[2], const E* others) const;
  __device__ void dx_from_state(const Stage& in, const R (&to_end)[2], R (&dX)[kColumnsP / 8][4]) const;
  __device__ void finish_dx(const Stage& in, const Head& head, const Item& at,
                            R (&dX)[kColumnsP / 8][4]) const;
  __device__ void gate_gradient(const Stage& in, const Head& head, const Item& at) const;
  __device__ void finish_chunk();
  __device__ void store_BC(const R (&grad)[kColumnsN / 8][4], const Rows& out, int64_t which_group,
                           int which) const;
  __device__ void initial_gradient(const Stage& in, const Head& head, const Item& at) const;
  __device__ void pass_states(int64_t from, int64_t to, const Item& at) const;
  __device__ void initial_gradients(const Stage& in, const Head& head, const Item& at) const;

  // ssd_bwd_steps.cuh
  __device__ void make_steps(Head& to, int64_t number) const;
  __device__ void plain_sums(const Stage& in) const;
  __device__ void collect(Head& head, const Item& at) const;
  __device__ void add_sum(int64_t head, int64_t which, R value) const;
  __device__ void step_gradients(const Head& head, int64_t number) const;

  // ---- What it loads

  // H (direction 0) or G: the run's own state where it begins (ends) with the chunk, else the cell's.
  __device__ void load_states(E* tile, int direction, const Item& at) const {
    const bool edge = direction == 0 ? begins : ends;
    const Rows& rows = direction == 0 ? a.states_in : a.dstates_out;
    const int64_t k = direction == 0 ? state_in : state_out;
    if (edge) {
      const bool given = rows.view.data && k >= 0;
      load_tile<F, kP, kN, kThreads>(tile, T::kLdS, rows, given ? state_at(k, at) : 0, dims.n, 1,
                                     given ? at.channels : 0, int(dims.n));
      return;
    }
    const int64_t ldn = ssd_padded_n(dims), slot = (row * a.slots + cell - a.first_cell) * dims.h + at.head;
    const Rows cells{{.data = const_cast<void*>(a.before[direction]), .dtype = F::kType, .stride = {}}, true};
    load_tile<F, kP, kN, kThreads>(tile, T::kLdS, cells, (slot * dims.p + at.first_p) * ldn, ldn, 1,
                                   at.channels, int(ldn));
  }

  __device__ void load(Stage& to, const Item& at) const {
    const auto tokens_of = [&](E* tile, const Rows& from) {
      load_tokens<F, kQ, kP, kThreads>(tile, T::kLdP, from, first_of(from.view, at), tokens, at.channels);
    };
    tokens_of(to.x, a.x);
    tokens_of(to.go, a.dy);
    load_states(to.H, 0, at);
    load_states(to.G, 1, at);
    const View& D = a.p.fwd.D;
    if (const int p = threadIdx.x; p < kP)
      to.skip[p] = D.data && p < at.channels
                       ? load_one<R>(D, at.head * D.stride[0] +
                                            (dims.D_per_channel ? (at.first_p + p) * D.stride[1] : 0))
                       : R(0);
  }

  __device__ void gate(Stage& in, const Item& at) const {
    load_tokens<F, kQ, kP, kThreads>(tiles.M, T::kLdP, a.z, first_of(a.z.view, at), tokens, at.channels);
    commit_copies();
    wait_for_copies();
    __syncthreads();
    for (int i = 2 * threadIdx.x; i < kQ * kP; i += 2 * kThreads) {
      const int k = i / kP * T::kLdP + i % kP;
      R go[2], z[2];
      F::load_pair(go, in.go + k);
      F::load_pair(z, tiles.M + k);
      F::store_pair(in.go + k, go[0] * silu(z[0]), go[1] * silu(z[1]));
    }
    __syncthreads();
  }

  // ---- The order of things

  __device__ void begin_chunk(int64_t from, int64_t cell_end) {
    begin = from;
    end = first_start(a.seqs, row, begin, cell_end);
    tokens = int(end - begin);
    begins = is_edge(a.seqs, row, begin, dims.l);
    ends = is_edge(a.seqs, row, end, dims.l);
    state_in = begins ? state_row(a.seqs, row, begin) : -1;
    state_out = ends ? state_row_out(a.seqs, row, end, dims.l) : -1;
    load_tokens<F, kQ, kN, kThreads>(tiles.B, T::kLdN, a.B, place(a.B.view, row, begin, group_B, 0), tokens,
                                     int(dims.n));
    load_tokens<F, kQ, kN, kThreads>(tiles.C, T::kLdN, a.C, place(a.C.view, row, begin, group_C, 0), tokens,
                                     int(dims.n));
    commit_copies();
    if (T::kStages == 2) load(tiles.stage[0], item(0));
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kPairColumns / 8; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) CB[tile][k] = dCB[tile][k] = 0;
#pragma unroll
    for (int tile = 0; tile < kColumnsN / 8; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) dB[tile][k] = dC[tile][k] = 0;
    if ((group + 1) * kPairColumns > first_token)
      multiply_tiles<F, false, kN>(CB, tiles.B + first_token * T::kLdN, T::kLdN,
                                   tiles.C + group * kPairColumns * T::kLdN, T::kLdN);
  }
  __device__ void run_chunk() {
    const int count = items();
    for (int i = 0; i < count; ++i) {
      Stage &now = tiles.stage[i % T::kStages], &then = tiles.stage[(i + 1) % T::kStages];
      const Item at = item(i);
      const int64_t slot = (at.head - first_head) % T::kHeads, first = at.head - slot;
      const int some = int(min(int64_t(T::kHeads), first_head + heads - first));
      Head& head = tiles.heads[slot];
      if (at.first_p == 0 && slot == 0 && warp < some) make_steps(tiles.heads[warp], first + warp);
      if (T::kStages == 1) {
        load(now, at);
        commit_copies();
      }
      wait_for_copies();
      __syncthreads();
      if (a.z.view.data) gate(now, at);
      if (T::kStages == 2 && i + 1 < count) load(then, item(i + 1));
      commit_copies();
      const R from_start[2] = {head.from_start[token], head.from_start[token + 8]};
      const R to_end[2] = {head.to_end[token], head.to_end[token + 8]};
      const R weight[2] = {to_end[0] * head.delta[token], to_end[1] * head.delta[token + 8]};
      pairs(now, head);
      through_state(dC, tiles.r[group], now.go, now.H, from_start, tiles.C);
      through_state(dB, tiles.k[group], now.x, now.G, weight, tiles.B);
      plain_sums(now);
      R dX[kColumnsP / 8][4] = {};
      dx_from_state(now, to_end, dX);
      __syncthreads();
      finish_dx(now, head, at, dX);
      if (a.z.view.data) gate_gradient(now, head, at);
      initial_gradients(now, head, at);
      __syncthreads();
      collect(head, at);
      if (at.first_p + at.channels == dims.p && slot == some - 1) {
        __syncthreads();
        if (warp < some) step_gradients(tiles.heads[warp], first + warp);
      }
    }
    finish_chunk();
    __syncthreads();
  }

  __device__ void run() {
    const int64_t cell_end = min((cell + 1) * a.q, dims.l);
    for (int64_t from = cell * a.q; from < cell_end; from = end) {
      begin_chunk(from, cell_end);
      run_chunk();
    }
  }

  // What a pack with bad offsets gets; the sums over tokens are left to the reduction.
  __device__ void fill_nan() {
    begin = cell * a.q;
    end = min(begin + a.q, dims.l);
    for (int i = 0; i < items(); ++i) {
      const Item at = item(i);
      for (int k = threadIdx.x; k < int(end - begin) * at.channels; k += kThreads) {
        const int t = k / at.channels, p = k % at.channels;
        store_one(a.p.dx, first_of(a.p.dx, at) + t * a.p.dx.stride[1] + p * a.p.dx.stride[3], R(NAN));
        if (a.p.dz.data)
          store_one(a.p.dz, first_of(a.p.dz, at) + t * a.p.dz.stride[1] + p * a.p.dz.stride[3], R(NAN));
        if (at.first_p + p == 0)
          store_one(a.p.ddt,
                    row * a.p.ddt.stride[0] + (begin + t) * a.p.ddt.stride[1] + at.head * a.p.ddt.stride[2],
                    R(NAN));
      }
      if (cell == 0 && a.p.dstates_in)
        for (int64_t k = 0; k < a.states; ++k)
          for (int64_t m = threadIdx.x; m < at.channels * dims.n; m += kThreads)
            static_cast<R*>(a.p.dstates_in)[state_at(k, at) + m] = R(NAN);
    }
  }
};

}  // namespace mamba_ops::gpu

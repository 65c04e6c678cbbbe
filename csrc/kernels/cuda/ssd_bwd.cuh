// SSD backward, portable: the gradients of one cell (see ssd_bwd.cu).
#pragma once
#include "kernels/cuda/ssd_bwd_tiles.cuh"

namespace mamba_ops::gpu {

// Sums over tokens t, t + 1, ...: kPerLane of them lie in a lane.
template <int kPerLane, class R>
__device__ inline void suffix_sums(R (&v)[kPerLane]) {
  R sum = 0;
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i) v[i] = sum += v[i];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const R other = __shfl_down_sync(kAllLanes, sum, d);
    if (threadIdx.x % 32 + d < 32) sum += other;
  }
  R after = __shfl_down_sync(kAllLanes, sum, 1);
  if (threadIdx.x % 32 == 31) after = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) v[i] += after;
}
// Sums over tokens before t.
template <int kPerLane, class R>
__device__ inline void sums_before(R (&v)[kPerLane]) {
  R sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += v[i];
  R before = __shfl_up_sync(kAllLanes, inclusive_sum(sum), 1);
  if (threadIdx.x % 32 == 0) before = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const R own = v[i];
    v[i] = before;
    before += own;
  }
}

// One cell of one row, for a block of heads.
template <class F, int kWidth>
struct Backward {
  using T = BwdTiles<F, kWidth>;
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

  // ---- Loads

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

  // ---- Products

  // M and dCB, and the sums of W = dM o M without its diagonal, which drops out of every difference of them.
  __device__ void pairs(const Stage& in, const Head& head) {
    R dM[kPairColumns / 8][4] = {};
    const int first = group * kPairColumns;
    if (first + kPairColumns > first_token)
      multiply_tiles<F, false, kP>(dM, in.x + first_token * T::kLdP, T::kLdP, in.go + first * T::kLdP,
                                   T::kLdP);
    R of_j[2] = {};
#pragma unroll
    for (int tile = 0; tile < kPairColumns / 8; ++tile) {
      R of_i[2] = {};
      const int i = first + 8 * tile + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = token + 8 * half;
        R M[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int at = 2 * half + k;
          const R L = i + k >= j ? exp2_of(head.s[i + k] - head.s[j]) : R(0);
          const R d = dM[tile][at] * L * head.delta[j];
          M[k] = CB[tile][at] * L;
          dCB[tile][at] += d;
          const R W = i + k > j ? d * CB[tile][at] : R(0);
          of_j[half] += W;
          of_i[k] += W;
        }
        F::store_pair(tiles.M + j * T::kLdQ + i, M[0], M[1]);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) of_i[k] += __shfl_xor_sync(kAllLanes, of_i[k], d);
        if (lane < 4) tiles.W_of_i[warp / T::kGroups][i + k] = of_i[k];
      }
    }
    store_row_sums(tiles.W_of_j[group], of_j);
  }
  __device__ void store_row_sums(R* to, R (&sums)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums[half] += __shfl_xor_sync(kAllLanes, sums[half], 1);
      sums[half] += __shfl_xor_sync(kAllLanes, sums[half], 2);
      if (lane % 4 == 0) to[token + 8 * half] = sums[half];
    }
  }

  // grad (this warp's tokens and columns of n) += factor (token state), and dots[t] its product with
  // `others`, summed over the columns.
  __device__ void through_state(R (&grad)[kColumnsN / 8][4], R* dots, const E* rows, const E* state,
                                const R (&factor)[2], const E* others) const {
    constexpr int kSlice = kColumnsN < 32 ? kColumnsN : 32;
    R sums[2] = {};
#pragma unroll
    for (int first = 0; first < kColumnsN; first += kSlice) {
      R slice[kSlice / 8][4] = {};
      const int column = group * kColumnsN + first;
      multiply_tiles<F, true, kP>(slice, rows + first_token * T::kLdP, T::kLdP, state + column, T::kLdS);
#pragma unroll
      for (int tile = 0; tile < kSlice / 8; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          R other[2];
          F::load_pair(other, others + (token + 8 * half) * T::kLdN + column + 8 * tile + lane % 4 * 2);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const R value = factor[half] * slice[tile][2 * half + k];
            grad[first / 8 + tile][2 * half + k] += value;
            sums[half] += value * other[k];
          }
        }
    }
    store_row_sums(dots, sums);
  }

  // <H, G>, a sum for every warp, and go_t . x_t over some tokens t for every channel.
  __device__ void plain_sums(const Stage& in) const {
    R v = 0;
    for (int i = 2 * threadIdx.x; i < kP * kN; i += 2 * kThreads) {
      const int at = i / kN * T::kLdS + i % kN;
      R H[2], G[2];
      F::load_pair(H, in.H + at);
      F::load_pair(G, in.G + at);
      v += H[0] * G[0] + H[1] * G[1];
    }
    v = warp_sum(v);
    if (lane == 0) tiles.v[warp] = v;
    if (!a.p.dD.data) return;
    const int p = threadIdx.x % kP, part = threadIdx.x / kP;
    R sum = 0;
    for (int t = part; t < kQ; t += T::kParts)
      sum += R(to_real(in.x[t * T::kLdP + p])) * R(to_real(in.go[t * T::kLdP + p]));
    tiles.D[part][p] = sum;
  }

  __device__ int64_t first_of(const View& v, const Item& at) const {
    return place(v, row, begin, at.head, at.first_p);
  }

  // The part of dX that comes through the state after the chunk; then what comes from later tokens, dx and
  // x . dX.
  __device__ void dx_from_state(const Stage& in, const R (&to_end)[2], R (&dX)[kColumnsP / 8][4]) const {
    multiply_tiles<F, false, kN>(dX, tiles.B + first_token * T::kLdN, T::kLdN,
                                 in.G + group * kColumnsP * T::kLdS, T::kLdS);
#pragma unroll
    for (int tile = 0; tile < kColumnsP / 8; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) dX[tile][k] *= to_end[k / 2];
  }
  __device__ void finish_dx(const Stage& in, const Head& head, const Item& at,
                            R (&dX)[kColumnsP / 8][4]) const {
#pragma unroll
    for (int k = 0; k < kQ; k += 16)
      if (k >= first_token)
        multiply_columns<F, true>(dX, F::left(tiles.M + first_token * T::kLdQ + k, T::kLdQ),
                                  in.go + k * T::kLdP + group * kColumnsP, T::kLdP);
    const View& out = a.dx.view;
    const int64_t first = first_of(out, at);
    R dots[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = token + 8 * half;
      const R delta = head.delta[t];
#pragma unroll
      for (int tile = 0; tile < kColumnsP / 8; ++tile) {
        const int p = group * kColumnsP + 8 * tile + lane % 4 * 2;
        R x[2], go[2], dx[2];
        F::load_pair(x, in.x + t * T::kLdP + p);
        F::load_pair(go, in.go + t * T::kLdP + p);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const R grad = dX[tile][2 * half + k];
          dots[half] += grad * x[k];
          dx[k] = delta * grad + in.skip[p + k] * go[k];
        }
        if (t < tokens)
          store_two<F>(a.dx, first + t * out.stride[1] + p * out.stride[3], out.stride[3], dx[0], dx[1],
                       at.channels - p);
      }
    }
    store_row_sums(tiles.dot[group], dots);
  }

  // dz = dy o silu'(z), with o run again.
  __device__ void gate_gradient(const Stage& in, const Head& head, const Item& at) const {
    R o[kColumnsP / 8][4] = {};
    multiply_tiles<F, false, kN>(o, tiles.C + first_token * T::kLdN, T::kLdN,
                                 in.H + group * kColumnsP * T::kLdS, T::kLdS);
#pragma unroll
    for (int tile = 0; tile < kColumnsP / 8; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) o[tile][k] *= head.from_start[token + k / 2 * 8];
#pragma unroll
    for (int k = 0; k < kQ; k += 16)
      if (k <= first_token)
        multiply_columns<F, true>(
            o, F::weighted(F::left_turned(tiles.M + k * T::kLdQ + first_token, T::kLdQ), head.delta + k),
            in.x + k * T::kLdP + group * kColumnsP, T::kLdP);
    const View &dy = a.dy.view, &z = a.z.view, &out = a.dz.view;
    const int64_t first_dy = first_of(dy, at), first_z = first_of(z, at), first = first_of(out, at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = token + 8 * half;
      if (t >= tokens) continue;
#pragma unroll
      for (int tile = 0; tile < kColumnsP / 8; ++tile) {
        const int p = group * kColumnsP + 8 * tile + lane % 4 * 2;
        R dz[2] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (p + k < at.channels)
            dz[k] = load_one<R>(dy, first_dy + t * dy.stride[1] + (p + k) * dy.stride[3]) *
                    (o[tile][2 * half + k] + in.skip[p + k] * R(to_real(in.x[t * T::kLdP + p + k]))) *
                    silu_grad(load_one<R>(z, first_z + t * z.stride[1] + (p + k) * z.stride[3]));
        store_two<F>(a.dz, first + t * out.stride[1] + p * out.stride[3], out.stride[3], dz[0], dz[1],
                     at.channels - p);
      }
    }
  }

  // The gradient of the run's initial state: 2^T G + sum_i (2^s_i go_i) C_i^T.
  __device__ void initial_gradient(const Stage& in, const Head& head, const Item& at) const {
    constexpr int kColumns = kN / (T::kWarps / (kP / 16)), kSlice = kColumns < 32 ? kColumns : 32;
    const int first_row = warp % (kP / 16) * 16;
    R* to = static_cast<R*>(a.p.dstates_in) + state_at(state_in, at) + first_row * dims.n;
#pragma unroll
    for (int first = 0; first < kColumns; first += kSlice) {
      const int column = warp / (kP / 16) * kColumns + first;
      R sums[kSlice / 8][4] = {};
      for_state(sums, 16, kSlice, [&](R& v, int r, int c) {
        v = head.decay * R(to_real(in.G[(first_row + r) * T::kLdS + column + c]));
      });
#pragma unroll
      for (int k = 0; k < kQ; k += 16)
        multiply_columns<F, true>(
            sums, F::weighted(F::left_turned(in.go + k * T::kLdP + first_row, T::kLdP), head.from_start + k),
            tiles.C + k * T::kLdN + column, T::kLdN);
      store_state(to + column, dims.n, sums, at.channels - first_row, dims.n - column);
    }
  }
  // The rows [from, to) of the states belong to sequences without tokens.
  __device__ void pass_states(int64_t from, int64_t to, const Item& at) const {
    for (int64_t k = from; k < to; ++k)
      for (int i = threadIdx.x; i < at.channels * dims.n; i += kThreads)
        static_cast<R*>(a.p.dstates_in)[state_at(k, at) + i] =
            a.p.dstates_out ? static_cast<const R*>(a.p.dstates_out)[state_at(k, at) + i] : R(0);
  }
  __device__ void initial_gradients(const Stage& in, const Head& head, const Item& at) const {
    if (!a.p.dstates_in) return;
    if (begins && state_in >= 0) initial_gradient(in, head, at);
    if (!a.seqs.cu_seqlens.data) return;
    if (begins) pass_states(begin == 0 ? 0 : state_row(a.seqs, row, begin - 1) + 1, state_in, at);
    if (end == dims.l) pass_states(state_out + 1, a.states, at);
  }

  // Adds the sums over a slice of a head's channels to those of the head.
  __device__ void collect(Head& head, const Item& at) const {
    const bool first = at.first_p == 0;
    for (int i = threadIdx.x; i < 4 * kQ + kP + 1; i += kThreads) {
      const int which = i / kQ, t = i % kQ, p = i - 4 * kQ;
      R sum = 0;
      if (which == 0) {
#pragma unroll
        for (int g = 0; g < T::kRows; ++g) sum += tiles.W_of_i[g][t];
#pragma unroll
        for (int g = 0; g < T::kGroups; ++g) sum -= tiles.W_of_j[g][t];
      } else if (which < 4) {
        const auto& parts = which == 1 ? tiles.r : which == 2 ? tiles.k : tiles.dot;
#pragma unroll
        for (int g = 0; g < T::kGroups; ++g) sum += parts[g][t];
      } else if (p == kP) {
        for (int w = 0; w < T::kWarps; ++w) sum += tiles.v[w];
      } else if (a.p.dD.data) {
        for (int part = 0; part < T::kParts; ++part) sum += tiles.D[part][p];
        if (dims.D_per_channel && p < at.channels) add_sum(at.head, 2 + at.first_p + p, sum);
      }
      R& to = which < 4 ? head.sums[which][t] : p == kP ? head.v : head.D[p];
      to = first ? sum : to + sum;
    }
  }
  __device__ void add_sum(int64_t head, int64_t which, R value) const {
    R* to = static_cast<R*>(a.sums) + ((row * a.cells + cell) * dims.h + head) * a.sums_width() + which;
    *to = begin == cell * a.q ? value : *to + value;
  }

  // By one warp: what comes of the steps of a head.
  //   da_t = sum_{i >= t} (W_i. - W_.i) + sum_{i >= t} r_i + sum_{j < t} k_j + 2^T <H, G>
  // The first token of a chunk has no pairs across it: its first sum is 0, and not what rounding leaves.
  __device__ void step_gradients(const Head& head, int64_t number) const {
    using WarpSteps = LaneSteps<F, kQ>;
    constexpr int kPerLane = WarpSteps::kPerLane;
    R dt[kPerLane], sums[4][kPerLane];
    WarpSteps::load(dt, a.p.fwd, row, begin, number, tokens);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const int t = lane * kPerLane + k;
        sums[i][k] = t < kQ ? head.sums[i][t] : R(0);
      }
    suffix_sums(sums[0]);
    suffix_sums(sums[1]);
    sums_before(sums[2]);
    const R through = head.decay * head.v, A = load_one<R>(a.p.fwd.A, number * a.p.fwd.A.stride[0]);
    const R bias = HeadParameters<R>(a.p.fwd, number).bias;
    R sum_A = 0, sum_bias = 0, sum_D = 0;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int t = lane * kPerLane + k;
      if (t >= tokens) continue;
      const R da = (t == 0 ? R(0) : sums[0][k]) + sums[1][k] + sums[2][k] + through;
      const R ddt = step_grad(sums[3][k] + A * da, dt[k] + bias, dims);
      sum_A += head.delta[t] * da;
      sum_bias += ddt;
      const View& out = a.p.ddt;
      store_one(out, row * out.stride[0] + (begin + t) * out.stride[1] + number * out.stride[2], ddt);
    }
    const bool one_D = a.p.dD.data && !dims.D_per_channel;
    if (one_D)
      for (int p = lane; p < kP; p += 32) sum_D += head.D[p];
    sum_A = warp_sum(sum_A);
    sum_bias = warp_sum(sum_bias);
    sum_D = warp_sum(sum_D);
    if (lane != 0) return;
    add_sum(number, 0, sum_A);
    add_sum(number, 1, sum_bias);
    if (one_D) add_sum(number, 2, sum_D);
  }

  // dB and dC of the chunk: what the pairs add, once for all heads of the block.
  __device__ void finish_chunk() {
#pragma unroll
    for (int tile = 0; tile < kPairColumns / 8; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        F::store_pair(tiles.M + (token + 8 * half) * T::kLdQ + group * kPairColumns + 8 * tile + lane % 4 * 2,
                      dCB[tile][2 * half], dCB[tile][2 * half + 1]);
    __syncthreads();
    const int column = group * kColumnsN;
#pragma unroll
    for (int k = 0; k < kQ; k += 16) {
      if (k >= first_token)
        multiply_columns<F, true>(dB, F::left(tiles.M + first_token * T::kLdQ + k, T::kLdQ),
                                  tiles.C + k * T::kLdN + column, T::kLdN);
      if (k <= first_token)
        multiply_columns<F, true>(dC, F::left_turned(tiles.M + k * T::kLdQ + first_token, T::kLdQ),
                                  tiles.B + k * T::kLdN + column, T::kLdN);
    }
    store_BC(dB, a.dB, group_B, 0);
    store_BC(dC, a.dC, group_C, 1);
  }
  __device__ void store_BC(const R (&grad)[kColumnsN / 8][4], const Rows& out, int64_t which_group,
                           int which) const {
    const int64_t ldn = ssd_padded_n(dims);
    const int64_t* stride = out.view.stride;
    const int64_t first = row * stride[0] + begin * stride[1] + which_group * stride[2];
#pragma unroll
    for (int tile = 0; tile < kColumnsN / 8; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = token + 8 * half, n = group * kColumnsN + 8 * tile + lane % 4 * 2;
        if (t >= tokens) continue;
        if (!a.partial_BC) {
          store_two<F>(out, first + t * stride[1] + n * stride[3], stride[3], grad[tile][2 * half],
                       grad[tile][2 * half + 1], int(dims.n) - n);
        } else if (n < ldn) {
          R* to = static_cast<R*>(a.partial_BC) +
                  (((block * dims.b + row) * dims.l + begin + t) * 2 + which) * ldn + n;
          to[0] = grad[tile][2 * half];
          to[1] = grad[tile][2 * half + 1];
        }
      }
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
  __device__ void make_steps(Head& to, int64_t number) const {
    const LaneSteps<F, kQ> steps(a.p.fwd, row, begin, number, HeadParameters<R>(a.p.fwd, number), tokens);
#pragma unroll
    for (int k = 0; k < steps.kPerLane; ++k) {
      const int t = lane * steps.kPerLane + k;
      if (t >= kQ) continue;
      to.s[t] = typename F::Sum(steps.s[k]);
      to.delta[t] = steps.delta[k];
      to.from_start[t] = steps.from_start(k);
      to.to_end[t] = steps.to_end(k);
    }
    if (lane == 0) to.decay = steps.decay();
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

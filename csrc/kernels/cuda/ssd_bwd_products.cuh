// SSD backward, portable: the products of a chunk, and what they give (see ssd_bwd.cu).
#pragma once
#include "kernels/cuda/ssd_bwd_cell.cuh"

namespace mamba_ops::gpu {

// M and dCB, and the sums of W = dM o M without its diagonal, which drops out of every difference of them.
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::pairs(const Stage& in, const Head& head) {
  R dM[kPairColumns / 8][4] = {};
  const int first = group * kPairColumns;
  if (first + kPairColumns > first_token)
    multiply_tiles<F, false, kP>(dM, in.x + first_token * T::kLdP, T::kLdP, in.go + first * T::kLdP, T::kLdP);
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

template <class F, class Sizes>
__device__ void Backward<F, Sizes>::store_row_sums(R* to, R (&sums)[2]) const {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums[half] += __shfl_xor_sync(kAllLanes, sums[half], 1);
    sums[half] += __shfl_xor_sync(kAllLanes, sums[half], 2);
    if (lane % 4 == 0) to[token + 8 * half] = sums[half];
  }
}

// grad (this warp's tokens and columns of n) += factor (token state), and dots[t] its product with
// `others`, summed over the columns.
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::through_state(R (&grad)[kColumnsN / 8][4], R* dots, const E* rows,
                                                  const E* state, const R (&factor)[2],
                                                  const E* others) const {
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

// The part of dX that comes through the state after the chunk; then what comes from later tokens, dx and
// x . dX.
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::dx_from_state(const Stage& in, const R (&to_end)[2],
                                                  R (&dX)[kColumnsP / 8][4]) const {
  multiply_tiles<F, false, kN>(dX, tiles.B + first_token * T::kLdN, T::kLdN,
                               in.G + group * kColumnsP * T::kLdS, T::kLdS);
#pragma unroll
  for (int tile = 0; tile < kColumnsP / 8; ++tile)
#pragma unroll
    for (int k = 0; k < 4; ++k) dX[tile][k] *= to_end[k / 2];
}

template <class F, class Sizes>
__device__ void Backward<F, Sizes>::finish_dx(const Stage& in, const Head& head, const Item& at,
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

// dz = dy o silu'(z), with o run again, and the sums of dy silu(z) x, not rounded before, over 16 tokens.
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::gate_gradient(const Stage& in, const Head& head, const Item& at) const {
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
  R D[kColumnsP / 8][2] = {};
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
        if (p + k < at.channels) {
          const R grad = load_one<R>(dy, first_dy + t * dy.stride[1] + (p + k) * dy.stride[3]);
          const R gate = load_one<R>(z, first_z + t * z.stride[1] + (p + k) * z.stride[3]);
          const R x = to_real(in.x[t * T::kLdP + p + k]);
          dz[k] = grad * (o[tile][2 * half + k] + in.skip[p + k] * x) * silu_grad(gate);
          D[tile][k] += grad * silu(gate) * x;
        }
      store_two<F>(a.dz, first + t * out.stride[1] + p * out.stride[3], out.stride[3], dz[0], dz[1],
                   at.channels - p);
    }
  }
  if (!a.p.dD.data) return;
#pragma unroll
  for (int tile = 0; tile < kColumnsP / 8; ++tile)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      R sum = D[tile][k];
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
      if (lane < 4) tiles.D[first_token / 16][group * kColumnsP + 8 * tile + 2 * lane + k] = sum;
    }
}

// dB and dC of the chunk: what the pairs add, once for all heads of the block.
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::finish_chunk() {
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

template <class F, class Sizes>
__device__ void Backward<F, Sizes>::store_BC(const R (&grad)[kColumnsN / 8][4], const Rows& out,
                                             int64_t which_group, int which) const {
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

// The gradient of the run's initial state: 2^T G + sum_i (2^s_i go_i) C_i^T.
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::initial_gradient(const Stage& in, const Head& head,
                                                     const Item& at) const {
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
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::pass_states(int64_t from, int64_t to, const Item& at) const {
  for (int64_t k = from; k < to; ++k)
    for (int i = threadIdx.x; i < at.channels * dims.n; i += kThreads)
      static_cast<R*>(a.p.dstates_in)[state_at(k, at) + i] =
          a.p.dstates_out ? static_cast<const R*>(a.p.dstates_out)[state_at(k, at) + i] : R(0);
}

template <class F, class Sizes>
__device__ void Backward<F, Sizes>::initial_gradients(const Stage& in, const Head& head,
                                                      const Item& at) const {
  if (!a.p.dstates_in) return;
  if (begins && state_in >= 0) initial_gradient(in, head, at);
  if (!a.seqs.cu_seqlens.data) return;
  if (begins) pass_states(begin == 0 ? 0 : state_row(a.seqs, row, begin - 1) + 1, state_in, at);
  if (end == dims.l) pass_states(state_out + 1, a.states, at);
}

}  // namespace mamba_ops::gpu

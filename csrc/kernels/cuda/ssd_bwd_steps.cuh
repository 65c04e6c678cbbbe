// SSD backward, portable: the steps of heads, sums over tokens and what comes of them (see ssd_bwd.cu).
#pragma once
#include "kernels/cuda/ssd_bwd_cell.cuh"

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

// <H, G>, a sum for every warp, and go_t . x_t over some tokens t for every channel (with a gate:
// gate_gradient).
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::plain_sums(const Stage& in) const {
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
  if (!a.p.dD.data || a.z.view.data) return;
  const int p = threadIdx.x % kP, part = threadIdx.x / kP;
  R sum = 0;
  for (int t = part; t < kQ; t += T::kParts)
    sum += R(to_real(in.x[t * T::kLdP + p])) * R(to_real(in.go[t * T::kLdP + p]));
  tiles.D[part][p] = sum;
}

// Adds the sums over a slice of a head's channels to those of the head.
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::collect(Head& head, const Item& at) const {
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
      const int parts = a.z.view.data ? T::kRows : T::kParts;
      for (int part = 0; part < parts; ++part) sum += tiles.D[part][p];
      if (dims.D_per_channel && p < at.channels) add_sum(at.head, 2 + at.first_p + p, sum);
    }
    R& to = which < 4 ? head.sums[which][t] : p == kP ? head.v : head.D[p];
    to = first ? sum : to + sum;
  }
}

template <class F, class Sizes>
__device__ void Backward<F, Sizes>::add_sum(int64_t head, int64_t which, R value) const {
  R* to = static_cast<R*>(a.sums) + ((row * a.cells + cell) * dims.h + head) * a.sums_width() + which;
  *to = begin == cell * a.q ? value : *to + value;
}

// By one warp: what comes of the steps of a head.
//   da_t = sum_{i >= t} (W_i. - W_.i) + sum_{i >= t} r_i + sum_{j < t} k_j + 2^T <H, G>
// The first token of a chunk has no pairs across it: its first sum is 0, and not what rounding leaves.
template <class F, class Sizes>
__device__ void Backward<F, Sizes>::step_gradients(const Head& head, int64_t number) const {
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

template <class F, class Sizes>
__device__ void Backward<F, Sizes>::make_steps(Head& to, int64_t number) const {
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

}  // namespace mamba_ops::gpu

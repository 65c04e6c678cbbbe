// The steps of every token: delta, and s, the sum of delta A from the first token of its chunk of 128. And D
// in float32, for every channel; in packs, where runs begin.
//
// A block takes a chunk and kStepHeads heads: dt comes in along the heads, goes through shared memory, and
// leaves along the tokens. A warp takes a head, a lane 4 neighbouring tokens. Beyond the row delta is 0 and s
// stays. A launch of their own, or with a gate what the blocks of its gradient begin with.
#pragma once
#include "kernels/cuda/sm90/ssd_bwd.cuh"

namespace mamba_ops::gpu::sm90 {

constexpr int kStepHeads = 32;
using StepBuffer = float[kChunk][kStepHeads + 1];

inline unsigned step_blocks(const SsdBwdArgs& a) {
  return unsigned((a.h + kStepHeads - 1) / kStepHeads * a.chunks * a.b);
}

// By kWarps warps; T: of dt.
template <class T, int kWarps>
__device__ void make_steps(const SsdBwdArgs& a, unsigned block, StepBuffer& dt) {
  const SsdFwd& f = a.p.fwd;
  const int head_blocks = (a.h + kStepHeads - 1) / kStepHeads;
  const int head0 = int(block % head_blocks) * kStepHeads, heads = min(kStepHeads, a.h - head0);
  const int chunk = int(block / head_blocks % a.chunks), row = int(block / head_blocks / a.chunks);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t0 = chunk * kChunk;
  const T* from = static_cast<const T*>(f.dt.data) + row * f.dt.stride[0] + head0 * f.dt.stride[2];
#pragma unroll
  for (int i = 0; i < kChunk / kWarps; ++i) {
    const int j = i * kWarps + warp;
    dt[j][lane] = lane < heads && t0 + j < a.l
                      ? to_real(from[int64_t(t0 + j) * f.dt.stride[1] + lane * f.dt.stride[2]])
                      : 0.f;
  }
  // Of the lane's head, asked for beside dt.
  const int lane_head = head0 + min(lane, heads - 1);
  const float lane_rate = parameter(f.A, lane_head) * float(kLog2e),
              lane_bias = parameter(f.dt_bias, lane_head);
  if (chunk == 0 && row == 0) {
    if (threadIdx.x < heads) a.arrived[head0 + threadIdx.x] = 0;
    constexpr int kValues = kStepHeads * kTile / (32 * kWarps);
    float D[kValues] = {};
    const auto at = [&](int i) { return int(threadIdx.x) + i * 32 * kWarps; };
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      if (a.D && at(i) < heads * kTile)
        D[i] = load_one<float>(f.D, (head0 + at(i) / kTile) * f.D.stride[0] + at(i) % kTile * f.D.stride[1]);
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      if (a.D && at(i) < heads * kTile) a.D[head0 * kTile + at(i)] = D[i];
  }
  if (a.starts && head0 == 0 && warp < kChunk / 32) {
    const int t = t0 + 32 * warp + lane;
    const unsigned bits = __ballot_sync(kAllLanes, t > 0 && t < a.l && begins(a.seqs, row, t));
    if (lane == 0)
      reinterpret_cast<uint32_t*>(a.starts)[(int64_t(row) * a.chunks + chunk) * (kChunk / 32) + warp] = bits;
  }
  const bool invalid = is_invalid_pack(a.seqs, a.l);
  if (block == 0 && a.handed_count())
    for (int i = threadIdx.x; i < 1 + a.handed_count(); i += 32 * kWarps) a.ticket[i] = 0;
  __syncthreads();
  for (int k = warp; k < heads; k += kWarps) {
    const float rate = __shfl_sync(kAllLanes, lane_rate, k), bias = __shfl_sync(kAllLanes, lane_bias, k);
    float delta[4], s[4], sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      delta[i] = t0 + 4 * lane + i < a.l ? make_step(dt[4 * lane + i][k], bias, f.dims).delta : 0.f;
      if (invalid) delta[i] = NAN;
      sum += delta[i] * rate;
      s[i] = sum;
    }
    float before = __shfl_up_sync(kAllLanes, inclusive_sum(sum), 1);
    if (lane == 0) before = 0;
    float* to = a.steps + (a.row_head(row, head0 + k) * a.chunks + chunk) * 2 * kChunk + 4 * lane;
    *reinterpret_cast<float4*>(to) = {delta[0], delta[1], delta[2], delta[3]};
    *reinterpret_cast<float4*>(to + kChunk) = {before + s[0], before + s[1], before + s[2], before + s[3]};
  }
}

constexpr int kStepWarps = 8;

template <class T>
__global__ void __launch_bounds__(32 * kStepWarps) ssd_bwd_steps(const __grid_constant__ SsdBwdArgs a) {
  __shared__ StepBuffer buffer;
  make_steps<T, kStepWarps>(a, blockIdx.x, buffer);
}

}  // namespace mamba_ops::gpu::sm90

// What is left: the gradients of the steps from the sums over pairs, and all sums over blocks.
//
//   gs_i = kPairs + kEntering - kLeaving;  ga_t = sum_{i >= t in the chunk} gs_i + sum kLeaving + v
//   (form R)
//   ddelta_t = kInput + A ga_t;  dA = sum delta_t ga_t;  ddt through clamp and softplus, ddt_bias its sum
//
// Sums over the tokens of the run alone, kLeaving and v in the run that leaves the chunk; where a run begins
// ga is 0.
//
// The first blocks take a stretch of the chunks of kReduceHeads heads, a warp one head, a lane 4 neighbouring
// tokens; ddt goes through shared memory and out along the heads. Sums over chunks in double, then by the
// block of these heads that arrives last over the parts in order. The other blocks add the partial dB and dC
// of the blocks of heads, in order, two values a thread.
#pragma once
#include "kernels/cuda/sm90/ssd_bwd.cuh"

namespace mamba_ops::gpu::sm90 {

constexpr int kReduceHeads = 16, kReduceThreads = 32 * kReduceHeads;
constexpr int kHeadSums = 2 + kTile;  // dA, ddt_bias, dD: per head in the first place, or per channel

struct HeadTotals {
  double dA = 0, dbias = 0, skip[2] = {};  // skip: of lanes 0 .. 7, or of channels 2 lane, + 1
};

// One chunk of one head; out: ddt of the lane's 4 tokens.
__device__ inline void add_chunk(const SsdBwdArgs& a, int row, int chunk, int head, float rate, float bias,
                                 HeadTotals& total, float (&out)[4]) {
  const SsdDims& dims = a.p.fwd.dims;
  const int lane = threadIdx.x % 32, tile = 2 * chunk + lane / 16, tiles = min(2, a.tiles - 2 * chunk);
  const int64_t row_head = a.row_head(row, head), first_tile = row_head * a.tiles + 2 * chunk;
  const auto load = [&](int which, float (&v)[4]) {
    const float* from = a.sums + ((row_head * a.tiles + tile) * kSums + which) * kTile + lane % 16 * 4;
    const float4 v4 = tile < a.tiles ? *reinterpret_cast<const float4*>(from) : float4{};
    v[0] = v4.x, v[1] = v4.y, v[2] = v4.z, v[3] = v4.w;
  };
  float pairs[4], entering[4], leaving[4], input[4];
  load(kPairs, pairs);
  load(kEntering, entering);
  load(kLeaving, leaving);
  load(kInput, input);
  const float4 delta4 =
      *reinterpret_cast<const float4*>(a.steps + (row_head * a.chunks + chunk) * 2 * kChunk + 4 * lane);
  const float delta[4] = {delta4.x, delta4.y, delta4.z, delta4.w};
  if (a.D && dims.D_per_channel) {
    for (int i = 0; i < a.skip_rows() * tiles; ++i) {
      const float* from = a.skips + (first_tile * a.skip_rows() + i) * kTile;
      const float2 v = *reinterpret_cast<const float2*>(from + 2 * lane);
      total.skip[0] += v.x;
      total.skip[1] += v.y;
    }
  } else if (a.D && lane < 4 * tiles) {
    total.skip[0] += a.skips[first_tile * 4 + lane];
  }

  const uint64_t starts0 = a.starts_of(row, 2 * chunk), starts1 = a.starts_of(row, 2 * chunk + 1);
  const int last = starts1 ? kTile + last_start(starts1) : last_start(starts0);
  // Bit i: a run begins at the lane's token i; bit 4: at the next lane's first one.
  unsigned begin = unsigned((lane < 16 ? starts0 : starts1) >> lane % 16 * 4) & 15;
  begin |= (__shfl_down_sync(kAllLanes, begin, 1) & 1) << 4;

  float gs[4], own = 0, right = lane < 4 ? a.anchors[(row_head * a.chunks + chunk) * 4 + lane] : 0.f;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    gs[i] = pairs[i] + entering[i] - leaving[i];
    own = (begin >> (i + 1) & 1 ? 0.f : own) + gs[i];
    right += leaving[i];
  }
  right = warp_sum(right);
  float from_right = own;  // of the run of the lane's first token
  bool ended = begin >> 1;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_down_sync(kAllLanes, from_right, d);
    const bool other_ended = __shfl_down_sync(kAllLanes, ended, d);
    if (lane + d < 32 && !ended) {
      from_right += other;
      ended = other_ended;
    }
  }
  const float beyond = __shfl_down_sync(kAllLanes, from_right, 1);
  float ga = lane < 31 ? beyond : 0.f, dA = 0, dbias = 0;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const int64_t t = int64_t(chunk) * kChunk + 4 * lane + i;
    ga = (begin >> (i + 1) & 1 ? 0.f : ga) + gs[i];
    if (t >= a.l) continue;
    // 0: nothing to decay
    const bool first = begin >> i & 1 || (t == 0 && !a.p.fwd.states_in);
    const float at = first ? 0.f : 4 * lane + i >= last ? ga + right : ga;
    float g = input[i] + rate * at;
    if (delta[i] > float(dims.dt_min) && delta[i] < float(dims.dt_max))
      g *= dims.softplus ? -expm1f(-delta[i]) : 1.f;  // softplus' of softplus
    else
      g = step_grad(g, load_dt(a, row, head, t) + bias, dims);
    out[i] = g;
    dA += delta[i] * at;
    dbias += g;
  }
  total.dA += dA;
  total.dbias += dbias;
}

// T: of dt.
template <class T>
__device__ void reduce_heads(const SsdBwdArgs& a, int block, int part) {
  __shared__ float s_ddt[kChunk][kReduceHeads + 1];
  __shared__ bool is_last;
  const SsdBwd& p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head0 = block * kReduceHeads, heads = min(kReduceHeads, a.h - head0), head = head0 + warp;
  const float rate = parameter(p.fwd.A, min(head, a.h - 1)),
              bias = parameter(p.fwd.dt_bias, min(head, a.h - 1));
  const int64_t all = int64_t(a.b) * a.chunks, end = all * (part + 1) / a.parts;
  HeadTotals total;
  for (int64_t i = all * part / a.parts; i < end; ++i) {
    const int row = int(i / a.chunks), chunk = int(i % a.chunks);
    if (warp < heads) {
      float ddt[4];
      add_chunk(a, row, chunk, head, rate, bias, total, ddt);
#pragma unroll
      for (int k = 0; k < 4; ++k) s_ddt[4 * lane + k][warp] = ddt[k];
    }
    __syncthreads();
    const int k = threadIdx.x % kReduceHeads;
    T* to = static_cast<T*>(p.ddt.data) + row * p.ddt.stride[0] + (head0 + k) * p.ddt.stride[2];
#pragma unroll
    for (int j = threadIdx.x / kReduceHeads; j < kChunk; j += kReduceThreads / kReduceHeads)
      if (const int64_t t = int64_t(chunk) * kChunk + j; t < a.l && k < heads)
        to[t * p.ddt.stride[1]] = from_real<T>(s_ddt[j][k]);
    __syncthreads();
  }
  const bool per_channel = p.fwd.dims.D_per_channel;
  total.dA = warp_sum(total.dA);
  total.dbias = warp_sum(total.dbias);
  if (!per_channel) total.skip[0] = warp_sum(total.skip[0]);
  if (warp < heads) {
    double* partial = a.partial_h + (int64_t(part) * a.h + head) * kHeadSums;
    if (lane == 0) {
      partial[0] = total.dA;
      partial[1] = total.dbias;
      if (!per_channel) partial[2] = total.skip[0];
    }
    if (per_channel) {
      partial[2 + 2 * lane] = total.skip[0];
      partial[3 + 2 * lane] = total.skip[1];
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(a.arrived + block, 1) == a.parts - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const int sums = per_channel ? kHeadSums : 3;
  const bool invalid = is_invalid_pack(a.seqs, a.l);
  for (int i = threadIdx.x; i < heads * sums; i += kReduceThreads) {
    const int k = i / sums, which = i % sums, of = head0 + k;
    double sum = invalid ? NAN : 0;
    for (int64_t j = 0; j < a.parts; ++j) sum += __ldcg(a.partial_h + (j * a.h + of) * kHeadSums + which);
    if (which == 0)
      store_one(p.dA, of * p.dA.stride[0], sum);
    else if (which == 1 && p.ddt_bias.data)
      store_one(p.ddt_bias, of * p.ddt_bias.stride[0], sum);
    else if (which >= 2 && a.D)
      store_one(p.dD, of * p.dD.stride[0] + (per_channel ? (which - 2) * p.dD.stride[1] : 0), sum);
  }
}

template <class T>
__device__ void reduce_factors(const SsdBwdArgs& a, int64_t thread, int64_t threads) {
  const SsdDims& dims = a.p.fwd.dims;
  const int pairs = int(dims.n) / 2, groups = int(dims.groups_B + dims.groups_C);
  const int64_t rows = int64_t(a.tiles) * kTile, size = a.b * rows * pairs;  // of a group
  for (int64_t i = thread; i < size * groups; i += threads) {
    const int column = int(i % pairs) * 2, number = int(i / size);
    const int64_t t = i / pairs % rows, row = i / pairs / rows % a.b;
    if (t >= a.l) continue;
    const bool is_C = number >= dims.groups_B;
    const int group = is_C ? number - int(dims.groups_B) : number;
    const int blocks = is_C ? a.blocks_C : a.blocks_B;
    const float* from = a.partial_BC + ((int64_t(group) * blocks * a.b + row) * rows + t) * 2 * dims.n +
                        (is_C ? dims.n : 0) + column;
    float2 sum = {};
    for (int block = 0; block < blocks; ++block, from += size * 4) {
      const float2 v = *reinterpret_cast<const float2*>(from);
      sum.x += v.x;
      sum.y += v.y;
    }
    const View& to = is_C ? a.p.dC : a.p.dB;
    const int64_t at = row * to.stride[0] + t * to.stride[1] + group * to.stride[2] + column;
    *reinterpret_cast<uint32_t*>(static_cast<T*>(to.data) + at) = pack<T>(sum.x, sum.y);
  }
}

template <class T, class Dt>
__global__ void __launch_bounds__(kReduceThreads) ssd_bwd_reduce(const __grid_constant__ SsdBwdArgs a) {
  const int blocks = (a.h + kReduceHeads - 1) / kReduceHeads, all = blocks * a.parts;
  if (blockIdx.x < all)
    reduce_heads<Dt>(a, blockIdx.x % blocks, blockIdx.x / blocks);
  else
    reduce_factors<T>(a, int64_t(blockIdx.x - all) * kReduceThreads + threadIdx.x,
                      int64_t(gridDim.x - all) * kReduceThreads);
}

}  // namespace mamba_ops::gpu::sm90

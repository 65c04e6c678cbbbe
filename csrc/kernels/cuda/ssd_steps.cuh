// The steps of the SSD and its sequences, as every kernel of it sees them.
//
//   raw = dt + bias;  delta = clamp(softplus(raw) or raw);  s = cumsum(delta A) from the chunk's first token
//
// s is kept in units of log2, so that decays are powers of two. A chunk is a stretch of tokens of one cell
// (tokens [k q, (k + 1) q) of a row) with nothing of another run in it: runs end chunks, whole cells else.
#pragma once
#include "kernels/cuda/sequences.cuh"
#include "kernels/ssd.h"

namespace mamba_ops::gpu {

template <class R>
struct Step {
  R raw, delta;
};
template <class R>
__device__ inline Step<R> make_step(R dt, R bias, const SsdDims& dims) {
  const R raw = dt + bias;
  R delta = dims.softplus ? softplus(raw) : raw;
  delta = delta < R(dims.dt_min) ? R(dims.dt_min) : delta;
  delta = delta > R(dims.dt_max) ? R(dims.dt_max) : delta;
  return {raw, delta};
}
// The gradient of dt from that of delta: through the clamp (inclusive at its limits) and softplus.
template <class R>
__device__ inline R step_grad(R grad, R raw, const SsdDims& dims) {
  const R before = dims.softplus ? softplus(raw) : raw;
  if (before < R(dims.dt_min) || before > R(dims.dt_max)) return 0;
  return dims.softplus && raw <= 20 ? grad / (1 + exp(-raw)) : grad;
}

// Sums over lanes 0 .. this one, in a fixed order.
template <class R>
__device__ inline R inclusive_sum(R v, int lane = threadIdx.x % 32) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const R other = __shfl_up_sync(kAllLanes, v, d);
    if (lane >= d) v += other;
  }
  return v;
}
template <class R>
__device__ inline R warp_sum(R v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

// The first run start in (begin, end), or `end`. By a whole warp; every lane gets it.
__device__ inline int64_t first_start(const Sequences& seqs, int64_t row, int64_t begin, int64_t end) {
  if (!seqs.has_runs()) return end;
  if (!seqs.id.data) return min(max(offset_at(seqs, sequence_at(seqs, begin) + 1), begin + 1), end);
  for (int64_t t = begin + 1; t < end; t += 32) {
    const int64_t mine = t + threadIdx.x % 32;
    const unsigned starts = __ballot_sync(kAllLanes, mine < end && begins(seqs, row, mine));
    if (starts) return t + __ffs(starts) - 1;
  }
  return end;
}
// The last run start in (begin, end), or `begin`.
__device__ inline int64_t last_start(const Sequences& seqs, int64_t row, int64_t begin, int64_t end) {
  if (!seqs.has_runs()) return begin;
  if (!seqs.id.data) return max(min(offset_at(seqs, sequence_at(seqs, end - 1)), end - 1), begin);
  for (int64_t t = end; t > begin + 1; t -= 32) {
    const int64_t mine = t - 32 + threadIdx.x % 32;
    const unsigned starts = __ballot_sync(kAllLanes, mine > begin && begins(seqs, row, mine));
    if (starts) return t - 1 - __clz(starts);
  }
  return begin;
}

}  // namespace mamba_ops::gpu

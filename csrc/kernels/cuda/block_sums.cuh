// Sums over the threads of a block.
#pragma once
#include "kernels/cuda/load_store.cuh"

namespace mamba_ops::gpu {

// N sums, which every thread gets: shuffles, then the sums of the warps through shared memory, in a fixed
// order. One barrier a call; calls that follow one another use the halves 0 and 1 in turns.
template <class R, int N>
__device__ inline void block_sums(R (&v)[N], int half) {
  __shared__ R s_warps[2][32][N];
#pragma unroll
  for (int n = 0; n < N; ++n)
    for (int k = 16; k > 0; k /= 2) v[n] += __shfl_xor_sync(kAllLanes, v[n], k);
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) s_warps[half][threadIdx.x / 32][n] = v[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = 0;
  for (int i = 0; i < int(blockDim.x) / 32; ++i)
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] += s_warps[half][i][n];
}

}  // namespace mamba_ops::gpu

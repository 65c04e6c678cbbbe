// The gradient of the gate y = o silu(z), where the forward is run once more for o (ssd_bwd_gate.cu):
//
//   do = dy silu(z)        dz = dy o silu'(z)        dD = sum do x
//
// chunk by chunk from the accumulators of o; do and dz take the places of dy and z in shared memory.
#pragma once
#include "kernels/cuda/sm90/ssd_fwd.cuh"

namespace mamba_ops::gpu::sm90::forward {

// Of a forward that makes gradients: y is that of z.
struct GateMaps : Maps {
  CUtensorMap dy, grad_o;
};

// z, dy: this lane's rows of the tiles. o, x: transposed. dD: the sums of do o x over the thread's tokens.
template <class T>
__device__ inline void pass_gate(const float (&o)[32], const uint32_t (&x)[4][4], uint32_t z, uint32_t dy,
                                 float (&dD)[2]) {
  dD[0] = dD[1] = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t gate[4], grad[4];
    ldmatrix<true>(gate, z + 2048 * k);
    ldmatrix<true>(grad, dy + 2048 * k);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 z2 = unpack<T>(gate[r]), dy2 = unpack<T>(grad[r]), x2 = unpack<T>(x[k][r]);
      const float2 do2 = {dy2.x * silu(z2.x), dy2.y * silu(z2.y)};
      dD[r % 2] += do2.x * x2.x + do2.y * x2.y;
      gate[r] =
          pack<T>(dy2.x * o[8 * k + 2 * r] * silu_grad(z2.x), dy2.y * o[8 * k + 2 * r + 1] * silu_grad(z2.y));
      grad[r] = pack<T>(do2.x, do2.y);
    }
    stmatrix<true>(z + 2048 * k, gate[0], gate[1], gate[2], gate[3]);
    stmatrix<true>(dy + 2048 * k, grad[0], grad[1], grad[2], grad[3]);
  }
}

// A chunk's sums for dD, of the warp's 16 channels: each, or all in one.
__device__ inline void store_skips(const FwdArgs& args, int64_t chunk, float (&dD)[2], int warp, int lane) {
  if (!args.D_per_channel) {
    const float sum = warp_sum(dD[0] + dD[1]);
    if (lane == 0) args.skips[chunk * 4 + warp] = sum;
    return;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    dD[r] += __shfl_xor_sync(kAllLanes, dD[r], 1);
    dD[r] += __shfl_xor_sync(kAllLanes, dD[r], 2);
    if (lane % 4 == 0) args.skips[chunk * kQ + 16 * warp + 8 * r + lane / 4] = dD[r];
  }
}

}  // namespace mamba_ops::gpu::sm90::forward

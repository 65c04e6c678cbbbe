// The gate y = o silu(z), before everything else of the backward, given o; beside the steps
// (ssd_bwd_steps.cuh).
//
//   do = dy silu(z), in o's place        dz = dy o silu'(z)
//
// A warp takes a token, a lane 8 neighbouring channels at a time. Bound by memory: five tensors of x's size.
#pragma once
#include "kernels/cuda/sm90/ssd_bwd.cuh"

namespace mamba_ops::gpu::sm90 {

constexpr int kGateWarps = 8;

template <class T>
__device__ void pass_gate(const SsdBwdArgs& a, unsigned block) {
  const int64_t token = int64_t(block) * kGateWarps + threadIdx.x / 32;
  if (token >= int64_t(a.b) * a.l) return;
  const int64_t row = token / a.l, t = token % a.l;
  for (int i = threadIdx.x % 32; i < a.h * (kTile / 8); i += 32) {
    const auto at = [&](const View& v) {
      return reinterpret_cast<uint4*>(static_cast<T*>(v.data) + row * v.stride[0] + t * v.stride[1] +
                                      i / (kTile / 8) * v.stride[2] + i % (kTile / 8) * 8);
    };
    uint4 o4 = *at(a.p.dy), z4 = *at(a.z);
    const uint4 dy4 = *at(a.dy);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t &o2 = (&o4.x)[k], &z2 = (&z4.x)[k];
      const float2 o = unpack<T>(o2), z = unpack<T>(z2), dy = unpack<T>((&dy4.x)[k]);
      o2 = pack<T>(dy.x * silu(z.x), dy.y * silu(z.y));
      z2 = pack<T>(dy.x * o.x * silu_grad(z.x), dy.y * o.y * silu_grad(z.y));
    }
    *at(a.p.dy) = o4;
    *at(a.dz) = z4;
  }
}

}  // namespace mamba_ops::gpu::sm90

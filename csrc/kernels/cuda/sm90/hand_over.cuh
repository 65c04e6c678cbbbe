// Accumulators of a warpgroup that go to another block, through device memory: a fragment after the other, a
// flag beside them. Flags are 0 before the kernel starts.
//
// Blocks number themselves by a ticket when they start, so that a block waits for such alone as run already,
// and each raises its flag before it waits for one. So every wait ends, however few blocks fit on the GPU at
// once, and in whatever order they start.
#pragma once
#include "kernels/cuda/sm90/ptx.cuh"

namespace mamba_ops::gpu::sm90 {

template <int kSize>
__device__ inline void store_fragment(float* to, const float (&H)[kSize]) {
#pragma unroll
  for (int k = 0; k < kSize / 4; ++k)
    __stcg(reinterpret_cast<float4*>(to) + k * 128 + threadIdx.x % 128,
           make_float4(H[4 * k], H[4 * k + 1], H[4 * k + 2], H[4 * k + 3]));
}
// H = decay H + what was stored.
template <int kSize>
__device__ inline void add_fragment(float (&H)[kSize], float decay, const float* from) {
#pragma unroll
  for (int k = 0; k < kSize / 4; ++k) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(from) + k * 128 + threadIdx.x % 128);
    H[4 * k] = H[4 * k] * decay + v.x;
    H[4 * k + 1] = H[4 * k + 1] * decay + v.y;
    H[4 * k + 2] = H[4 * k + 2] * decay + v.z;
    H[4 * k + 3] = H[4 * k + 3] * decay + v.w;
  }
}

// By the whole warpgroup, with a named barrier of its own: what its threads stored is there.
__device__ inline void raise_flag(int* flag, int barrier) {
  __threadfence();
  sync_threads<128>(barrier);
  if (threadIdx.x % 128 == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ inline void wait_for_flag(const int* flag, int barrier) {
  if (threadIdx.x % 128 == 0) {
    int raised;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    while (!raised);
  }
  sync_threads<128>(barrier);
}

}  // namespace mamba_ops::gpu::sm90

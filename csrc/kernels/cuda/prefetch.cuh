// Memory on its way into the L2 cache while nobody waits for it.
#pragma once
#include "kernels/prefetch.h"

namespace mamba_ops::gpu {

inline constexpr int64_t kPrefetchPiece = 4096;  // bytes that a warp asks for at once

// Asks for up to kPrefetchPiece bytes, a multiple of 16; for a whole warp.
__device__ inline void prefetch_piece(const char* data, int bytes, int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(data), "r"(bytes) : "memory");
#else
  if (lane * 128 < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"(data + lane * 128) : "memory");
#endif
}

}  // namespace mamba_ops::gpu

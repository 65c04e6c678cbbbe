// Launches that overlap (programmatic dependent launch, sm_90 and up): a kernel may start while those before
// it in the stream still run. Its launch, its first instructions and its hints then cost no time.
//
// Every thread of such a kernel calls overlap(), before which the kernel does nothing to memory, and in whose
// hints nothing but prefetches. Then all kernels before it have ended, for each of them has waited in turn:
// what they wrote can be read, and what they read be overwritten, as in any stream. The kernel behind may
// start once all blocks of this one have, or have ended.
#pragma once
#include <array>
#include <atomic>

#include "kernels/cuda/device.h"
#include "kernels/view.h"

namespace mamba_ops::gpu {

// Asks for `count` values of a tensor from `offset` on, neighbours in memory, to be brought into the L2
// cache: right whoever writes them meanwhile. For whole blocks.
__device__ inline void prefetch(const View& v, int64_t offset, int64_t count) {
#if __CUDA_ARCH__ >= 900
  constexpr int kPiece = 4096;
  if (!v.data) return;
  const int size = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  const auto first = reinterpret_cast<uintptr_t>(v.data) + offset * size;
  const uintptr_t begin = first / 16 * 16, end = (first + count * size + 15) / 16 * 16;
  for (uintptr_t at = begin + threadIdx.x * kPiece; at < end; at += blockDim.x * kPiece)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at),
                 "r"(int(min(end - at, uintptr_t(kPiece))))
                 : "memory");
#endif
}

// Lets the next kernel start, gives the hints, and returns when the kernels before have ended.
template <class Hints>
__device__ inline void overlap(Hints hints) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  hints();
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void overlap() {
  overlap([] {});
}

// Whether the code that the current device runs waits: the same for all kernels, and asked once a device.
inline bool code_waits(const void* kernel) {
  static std::array<std::atomic<int>, 64> known;  // 0: not asked, 1: it does not, 2: it does
  int device = 0;
  cudaGetDevice(&device);
  std::atomic<int>& answer = known[device % known.size()];
  if (answer == 0) {
    cudaFuncAttributes code = {};
    if (cudaFuncGetAttributes(&code, kernel) == cudaSuccess) answer = code.ptxVersion >= 90 ? 2 : 1;
  }
  return answer == 2;
}

// kernel<<<grid, threads, shared_bytes, stream>>>(args...), overlapped where the kernel's code waits. Errors
// are left for launch_error.
template <class... Params, class... Args>
void launch_overlapped(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes,
                       cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute overlaps = {};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = code_waits(reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlaps;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace mamba_ops::gpu

// What the current device has.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/path.h"

namespace mamba_ops::gpu {

inline constexpr int64_t kMaxGrid = 65535;  // blocks in y and z of a grid

// 0 where there is no device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
    return 0;
  return value;
}

inline int64_t multiprocessors() { return std::max(1, device_attribute(cudaDevAttrMultiProcessorCount)); }

// Of a block, at most.
inline int shared_bytes() {
  const int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return little_shared_memory ? std::min(bytes, 99 << 10) : bytes;
}

}  // namespace mamba_ops::gpu

// What the current device has.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace mamba_ops::gpu {

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
inline int shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

}  // namespace mamba_ops::gpu

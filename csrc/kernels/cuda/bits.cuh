// One value of a parameter or a state, as it is stored in 16 or 32 bits: nothing waits for the load before
// the number is made of them.
#pragma once
#include "kernels/cuda/load_store.cuh"

namespace mamba_ops::gpu {

// 0 where there is no tensor.
__device__ inline uint32_t load_bits(const View& v, int64_t offset) {
  if (!v.data) return 0;
  return v.dtype == DType::f32 ? static_cast<const uint32_t*>(v.data)[offset]
                               : static_cast<const uint16_t*>(v.data)[offset];
}
// T: the type that the value has if not float32.
template <class T = bf16>
__device__ inline float from_bits(uint32_t bits, DType dtype) {
  if constexpr (sizeof(T) == 2)
    if (dtype != DType::f32) return to_real(T{uint16_t(bits)});
  return __uint_as_float(bits);
}

}  // namespace mamba_ops::gpu

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
__device__ inline float from_bits(uint32_t bits, DType dtype) {
  return dtype == DType::f32    ? __uint_as_float(bits)
         : dtype == DType::bf16 ? to_real(bf16{uint16_t(bits)})
                                : to_real(f16{uint16_t(bits)});
}

}  // namespace mamba_ops::gpu

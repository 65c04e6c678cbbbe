// Two 16-bit values, E = bf16 or f16, in a register: the low half is the first in memory.
#pragma once
#include "kernels/cuda/load_store.cuh"

namespace mamba_ops::gpu {

template <class E>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<E, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class E>
__device__ inline float low(uint32_t pair) {
  return std::is_same_v<E, bf16> ? __uint_as_float(pair << 16) : to_real(E{uint16_t(pair)});
}
template <class E>
__device__ inline float high(uint32_t pair) {
  return std::is_same_v<E, bf16> ? __uint_as_float(pair & 0xffff0000u) : to_real(E{uint16_t(pair >> 16)});
}
template <class E>
__device__ inline float2 unpack(uint32_t pair) {
  return {low<E>(pair), high<E>(pair)};
}

template <class E>
__device__ inline uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t product;
  if constexpr (std::is_same_v<E, bf16>)
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
template <class E>
__device__ inline uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  if constexpr (std::is_same_v<E, bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// Two values of float32, each the sum of two halves.
struct SplitPair {
  uint32_t high, low;
};
template <class E>
__device__ inline SplitPair split(float x, float y) {
  const uint32_t rounded = pack<E>(x, y);
  return {rounded, pack<E>(x - low<E>(rounded), y - high<E>(rounded))};
}

}  // namespace mamba_ops::gpu

// Between storage and arithmetic: conversions, groups of neighbouring values moved in one access where they
// align, and the functions that the kernels share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "kernels/view.h"

namespace mamba_ops::gpu {

inline constexpr unsigned kAllLanes = 0xffffffff;
inline constexpr double kLog2e = 1.4426950408889634;

// Asks for what lies around p to be brought to L2.
__device__ inline void ask_for(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The type of the arithmetic for a storage type.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_real(float v) { return v; }
__device__ inline double to_real(double v) { return v; }
__device__ inline float to_real(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline float to_real(f16 v) { return __half2float(__ushort_as_half(v.bits)); }

template <class T, class R>
__device__ inline T from_real(R v) {
  if constexpr (std::is_same_v<T, bf16>)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  else if constexpr (std::is_same_v<T, f16>)
    return {__half_as_ushort(__float2half_rn(v))};
  else
    return v;
}

// f.template operator()<T>() with the storage type.
template <class F>
auto by_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<bf16>();
    case DType::f16:
      return f.template operator()<f16>();
    default:
      return f.template operator()<float>();
  }
}

// One value of a tensor whose dtype is known at run time: for parameters and states, not for the bulk of the
// data.
template <class R>
__device__ inline R load_one(const View& v, int64_t offset) {
  switch (v.dtype) {
    case DType::f64:
      return R(static_cast<const double*>(v.data)[offset]);
    case DType::bf16:
      return to_real(static_cast<const bf16*>(v.data)[offset]);
    case DType::f16:
      return to_real(static_cast<const f16*>(v.data)[offset]);
    default:
      return static_cast<const float*>(v.data)[offset];
  }
}
template <class R>
__device__ inline void store_one(const View& v, int64_t offset, R value) {
  switch (v.dtype) {
    case DType::f64:
      static_cast<double*>(v.data)[offset] = value;
      break;
    case DType::bf16:
      static_cast<bf16*>(v.data)[offset] = from_real<bf16>(float(value));
      break;
    case DType::f16:
      static_cast<f16*>(v.data)[offset] = from_real<f16>(float(value));
      break;
    default:
      static_cast<float*>(v.data)[offset] = float(value);
  }
}

// N neighbouring values, as stored; up to 16 bytes are moved at once. 16-bit values stay in pairs, two in a
// register.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  static constexpr bool kPairs = sizeof(T) == 2;
  static_assert(!kPairs || N % 2 == 0);
  std::conditional_t<kPairs, uint32_t, T> word[kPairs ? N / 2 : N];

  __device__ Real<T> at(int i) const {
    if constexpr (std::is_same_v<T, bf16>)
      return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    else if constexpr (std::is_same_v<T, f16>)
      return __half2float(__ushort_as_half(uint16_t(i % 2 ? word[i / 2] >> 16 : word[i / 2])));
    else
      return word[i];
  }
  __device__ void set(int i, T v) {
    if constexpr (kPairs)
      word[i / 2] = i % 2 ? word[i / 2] | uint32_t(v.bits) << 16 : v.bits;
    else
      word[i] = v;
  }
};

template <class T, int N>
__device__ inline Pack<T, N> to_pack(const Real<T> (&v)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.set(i, from_real<T>(v[i]));
  return pack;
}

// p[i * stride] for i < count, then zeros. `vector`: the stride is 1 and p is aligned to the pack.
template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* p, int64_t stride, int64_t count, bool vector) {
  if (vector && count >= N) return *reinterpret_cast<const Pack<T, N>*>(p);
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.set(i, i < count ? p[i * stride] : T{});
  return pack;
}
template <int N, class T>
__device__ inline void store_pack(T* p, int64_t stride, int64_t count, bool vector, const Pack<T, N>& pack) {
  if (vector && count >= N) {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) p[i * stride] = from_real<T>(pack.at(i));
}

// The same for values in the type of the arithmetic, whatever it is.
template <class T, int N, class R>
__device__ inline void store_values(T* p, int64_t stride, int64_t count, bool vector, const R (&v)[N]) {
  Real<T> stored[N];
#pragma unroll
  for (int i = 0; i < N; ++i) stored[i] = Real<T>(v[i]);
  store_pack(p, stride, count, vector, to_pack<T>(stored));
}

// f(data) with the type of a tensor whose dtype is known at run time, for several loads at once.
template <class F>
__device__ inline void with_data(const View& v, F f) {
  switch (v.dtype) {
    case DType::f64:
      return f(static_cast<const double*>(v.data));
    case DType::bf16:
      return f(static_cast<const bf16*>(v.data));
    case DType::f16:
      return f(static_cast<const f16*>(v.data));
    default:
      return f(static_cast<const float*>(v.data));
  }
}

// Whether packs of n values that begin at multiples of n along dim `dim` are contiguous and aligned. `sizes`:
// of the other dims in the order of the strides; a dim of one value has no say.
inline bool packs_align(const View& v, int dim, std::initializer_list<int64_t> sizes, int n) {
  const int64_t value = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  bool ok = v.stride[dim] == 1 && reinterpret_cast<uintptr_t>(v.data) % std::min<int64_t>(16, n * value) == 0;
  int i = 0;
  for (const int64_t size : sizes) {
    i += i == dim;
    ok = ok && (size <= 1 || v.stride[i] % n == 0);
    ++i;
  }
  return ok;
}

__device__ inline float exp2_of(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ inline double exp2_of(double v) { return exp2(v); }

// The logistic function, within a few last bits of float; saturates without overflow. Four instructions: in
// float the compiler would guard exp and division against subnormal numbers.
__device__ inline float sigmoid(float v) {
  float power, out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(1 + power));
  return out;
}
__device__ inline double sigmoid(double v) { return 1 / (1 + exp(-v)); }
template <class R>
__device__ inline R silu(R v) {
  return v * sigmoid(v);
}
template <class R>
__device__ inline R silu_grad(R v) {
  const R s = sigmoid(v);
  return s * (1 + v * (1 - s));
}
template <class R>
__device__ inline R softplus(R v) {
  return v > 20 ? v : log1p(exp(v));
}

// nullptr, or what the launches since the last call did wrong. Does not wait for them.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mamba_ops::gpu

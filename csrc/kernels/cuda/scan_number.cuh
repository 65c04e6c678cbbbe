// The numbers that a selective scan runs on: float, double, or complex of one of them.
#pragma once
#include "kernels/cuda/load_store.cuh"

namespace mamba_ops::gpu {

template <class R>
struct Complex {
  R re, im;
};
template <class R>
__device__ inline Complex<R> operator+(Complex<R> a, Complex<R> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class R>
__device__ inline Complex<R> operator*(Complex<R> a, Complex<R> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class R>
__device__ inline Complex<R> operator*(R x, Complex<R> a) {
  return {x * a.re, x * a.im};
}

__device__ inline float conj(float a) { return a; }
__device__ inline double conj(double a) { return a; }
template <class R>
__device__ inline Complex<R> conj(Complex<R> a) {
  return {a.re, -a.im};
}
__device__ inline float real_part(float a) { return a; }
__device__ inline double real_part(double a) { return a; }
template <class R>
__device__ inline R real_part(Complex<R> a) {
  return a.re;
}

// exp(dt A). kFast: good to 2 last bits near 1, which is enough where the data are 16-bit. Those errors have
// a bias, and add up over a long memory: else what lies near 1 is taken from the series.
template <bool kFast>
__device__ inline float decay(float dt, float A) {
  const float fast = exp2_of(dt * float(kLog2e) * A);
  if (kFast) return fast;
  const float x = dt * A;
  const float tail = ((1.f / 720 * x + 1.f / 120) * x + 1.f / 24) * x + 1.f / 6;
  const float series = ((tail * x + 0.5f) * x + 1) * x + 1;
  return fabsf(x) < 0.25f ? series : fast;
}
template <bool>
__device__ inline double decay(double dt, double A) {
  return exp(dt * A);
}
template <bool kFast>
__device__ inline Complex<float> decay(float dt, Complex<float> A) {
  float sin, cos;
  sincosf(dt * A.im, &sin, &cos);
  const float size = decay<kFast>(dt, A.re);
  return {size * cos, size * sin};
}
template <bool kFast>
__device__ inline Complex<double> decay(double dt, Complex<double> A) {
  double sin, cos;
  sincos(dt * A.im, &sin, &cos);
  const double size = decay<kFast>(dt, A.re);
  return {size * cos, size * sin};
}

template <class S>
struct Number {
  using Real = S;
  static constexpr int kParts = 1;
};
template <class R>
struct Number<Complex<R>> {
  using Real = R;
  static constexpr int kParts = 2;
};
template <class S>
using RealOf = typename Number<S>::Real;

// A number whose parts neighbour.
template <class S, class T>
__device__ inline S to_number(const T* p) {
  using R = RealOf<S>;
  if constexpr (Number<S>::kParts == 2)
    return {R(to_real(p[0])), R(to_real(p[1]))};
  else
    return R(to_real(*p));
}

// f(p) with the data of a view as a pointer of its type, of those that go with arithmetic in R.
template <class R, class F>
__device__ inline void with_storage(const View& v, F f) {
  if (v.dtype == DType::f32) return f(static_cast<float*>(v.data));
  if constexpr (std::is_same_v<R, double>)
    f(static_cast<double*>(v.data));
  else if (v.dtype == DType::bf16)
    f(static_cast<bf16*>(v.data));
  else
    f(static_cast<f16*>(v.data));
}

// What a thread holds of a channel's state.
template <class S>
struct alignas(16) Slice {
  static constexpr int kStates = 16 / sizeof(S), kReals = 16 / sizeof(RealOf<S>);
  S s[kStates];
};

}  // namespace mamba_ops::gpu

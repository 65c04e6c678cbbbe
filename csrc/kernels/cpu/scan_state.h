// The state of kWidth channels as a number, real or complex, and the arithmetic that the scan does with it.
#pragma once
#include "kernels/cpu/simd.h"

namespace mamba_ops::MAMBA_ISA {

template <class R, bool kComplex>
struct State;
template <class R>
struct State<R, false> {
  Vec<R> re;
};
template <class R>
struct State<R, true> {
  Vec<R> re, im;
};

// `plane` is the distance from the real to the imaginary part.
template <class S, class R>
MAMBA_INLINE S load_state(const R* p, int64_t plane) {
  if constexpr (sizeof(S) == sizeof(Vec<R>))
    return {load<R>(p)};
  else
    return {load<R>(p), load<R>(p + plane)};
}
template <class S, class R>
MAMBA_INLINE S splat_state(const R* p, int64_t plane) {
  if constexpr (sizeof(S) == sizeof(Vec<R>))
    return {splat(*p)};
  else
    return {splat(*p), splat(p[plane])};
}
template <class R>
MAMBA_INLINE void store_state(R* p, int64_t, State<R, false> s) {
  store<R>(p, s.re);
}
template <class R>
MAMBA_INLINE void store_state(R* p, int64_t plane, State<R, true> s) {
  store<R>(p, s.re);
  store<R>(p + plane, s.im);
}

template <class R, bool kComplex>
MAMBA_INLINE void add_to_state(R* p, int64_t plane, State<R, kComplex> s) {
  store<R>(p, load<R>(p) + s.re);
  if constexpr (kComplex) store<R>(p + plane, load<R>(p + plane) + s.im);
}

// exp(dt A), A given as (log2(e) Re A, Im A).
template <class R>
MAMBA_INLINE State<R, false> decay(Vec<R> dt, State<R, false> A) {
  return {exp2(Vec<R>(dt * A.re))};
}
template <class R>
MAMBA_INLINE State<R, true> decay(Vec<R> dt, State<R, true> A) {
  Vec<R> sin, cos;
  sincos(Vec<R>(dt * A.im), sin, cos);
  const Vec<R> size = exp2(Vec<R>(dt * A.re));
  return {size * cos, size * sin};
}

template <class R>
MAMBA_INLINE State<R, false> scale(Vec<R> x, State<R, false> a) {
  return {x * a.re};
}
template <class R>
MAMBA_INLINE State<R, true> scale(Vec<R> x, State<R, true> a) {
  return {x * a.re, x * a.im};
}
// c + x a
template <class R>
MAMBA_INLINE State<R, false> add_scaled(State<R, false> c, Vec<R> x, State<R, false> a) {
  return {c.re + x * a.re};
}
template <class R>
MAMBA_INLINE State<R, true> add_scaled(State<R, true> c, Vec<R> x, State<R, true> a) {
  return {c.re + x * a.re, c.im + x * a.im};
}
// a b + x c
template <class R>
MAMBA_INLINE State<R, false> mul_add(State<R, false> a, State<R, false> b, Vec<R> x, State<R, false> c) {
  return {a.re * b.re + x * c.re};
}
template <class R>
MAMBA_INLINE State<R, true> mul_add(State<R, true> a, State<R, true> b, Vec<R> x, State<R, true> c) {
  return {a.re * b.re - a.im * b.im + x * c.re, a.re * b.im + a.im * b.re + x * c.im};
}
template <class R>
MAMBA_INLINE State<R, false> mul(State<R, false> a, State<R, false> b) {
  return {a.re * b.re};
}
template <class R>
MAMBA_INLINE State<R, true> mul(State<R, true> a, State<R, true> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// c + x conj(a)
template <class R>
MAMBA_INLINE State<R, false> add_conj(State<R, false> c, Vec<R> x, State<R, false> a) {
  return {c.re + x * a.re};
}
template <class R>
MAMBA_INLINE State<R, true> add_conj(State<R, true> c, Vec<R> x, State<R, true> a) {
  return {c.re + x * a.re, c.im - x * a.im};
}
template <class R>
MAMBA_INLINE State<R, false> conj_mul(State<R, false> a, State<R, false> b) {
  return {a.re * b.re};
}
template <class R>
MAMBA_INLINE State<R, true> conj_mul(State<R, true> a, State<R, true> b) {
  return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}
template <class R>
MAMBA_INLINE State<R, false> conj(State<R, false> a) {
  return a;
}
template <class R>
MAMBA_INLINE State<R, true> conj(State<R, true> a) {
  return {a.re, -a.im};
}
// x + Re(a b)
template <class R>
MAMBA_INLINE Vec<R> add_re_mul(Vec<R> x, State<R, false> a, State<R, false> b) {
  return x + a.re * b.re;
}
template <class R>
MAMBA_INLINE Vec<R> add_re_mul(Vec<R> x, State<R, true> a, State<R, true> b) {
  return x + (a.re * b.re - a.im * b.im);
}
// x + Re(conj(a) b)
template <class R>
MAMBA_INLINE Vec<R> add_re_conj_mul(Vec<R> x, State<R, false> a, State<R, false> b) {
  return x + a.re * b.re;
}
template <class R>
MAMBA_INLINE Vec<R> add_re_conj_mul(Vec<R> x, State<R, true> a, State<R, true> b) {
  return x + (a.re * b.re + a.im * b.im);
}

}  // namespace mamba_ops::MAMBA_ISA

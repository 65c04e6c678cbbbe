// Vectors of the widest registers of the instruction set that this file is compiled for, and the few
// functions that the kernels need of them. Everything is inline and lives in the namespace of that
// instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/view.h"

#ifndef MAMBA_ISA
#error "compile the CPU kernels with -DMAMBA_ISA=base, avx2 or avx512"
#endif
#define MAMBA_INLINE inline __attribute__((always_inline))

namespace mamba_ops::MAMBA_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif

template <class R>
struct Traits;
template <>
struct Traits<float> {
  typedef float Vec __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  using Lane = int32_t;
  typedef int32_t Int __attribute__((vector_size(kVecBytes)));
};
template <>
struct Traits<double> {
  typedef double Vec __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
  using Lane = int64_t;
  typedef int64_t Int __attribute__((vector_size(kVecBytes)));
};
template <class R>
using Vec = typename Traits<R>::Vec;
template <class R>
using IntVec = typename Traits<R>::Int;
typedef uint32_t WordVec
    __attribute__((vector_size(kVecBytes)));  // the bits of Vec<float>: sums may wrap around
template <class R>
inline constexpr int kWidth = kVecBytes / int(sizeof(R));

template <class R>
MAMBA_INLINE constexpr int64_t whole_vectors(int64_t n) {  // n rounded up
  return (n + kWidth<R> - 1) / kWidth<R> * kWidth<R>;
}

template <class R>
MAMBA_INLINE Vec<R> load(const R* p) {
  return *reinterpret_cast<const Vec<R>*>(p);
}
template <class R>
MAMBA_INLINE void store(R* p, Vec<R> v) {
  *reinterpret_cast<Vec<R>*>(p) = v;
}
template <class R>
MAMBA_INLINE Vec<R> splat(R x) {
  return x - Vec<R>{};  // x - 0, not 0 + x: keeps -0.0
}

template <class R>
MAMBA_INLINE R sum(Vec<R> v) {
  R lanes[kWidth<R>];
  store<R>(lanes, v);
  for (int half = kWidth<R> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Of two values; the second where either is NaN (as the x86 instructions do).
MAMBA_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
MAMBA_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// ---- exp, log1p and what follows from them. NaN stays NaN ------------------------------------------------
MAMBA_INLINE Vec<float> exp2(Vec<float> x) {
  // 2^x = 2^n 2^r, n = round(x), |r| <= 1/2; a minimax polynomial of 2^r with 2^0 = 1 exactly. Below 2^-126
  // the result stays there; above 2^127.5 it is infinite.
  x = max(splat(-126.f), x);
#if defined(__AVX512F__)
  const Vec<float> n = (Vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec<float> r = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);  // 0 of infinity
#else
  // The magic number leaves n + 127, the exponent's bits, at the low end of `shifted`.
  const Vec<float> magic = splat(12582912.f + 127.f);
  x = min(splat(128.f), x);
  const Vec<float> shifted = x + magic;
  const Vec<float> r = x - (shifted - magic);
#endif
  Vec<float> p = splat(1.535336188e-4f);
  p = p * r + 1.339887440e-3f;
  p = p * r + 9.618437358e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (Vec<float>)((IntVec<float>)shifted << 23);  // a product: NaN stays NaN
#endif
}
template <class R, class F>
MAMBA_INLINE Vec<R> each_lane(Vec<R> x, F f) {
  for (int i = 0; i < kWidth<R>; ++i) x[i] = f(x[i]);
  return x;
}
MAMBA_INLINE Vec<double> exp2(Vec<double> x) {
  return each_lane<double>(x, [](double v) { return ::exp2(v); });
}
template <class R>
inline constexpr R kLog2e = R(1.4426950408889634074);

MAMBA_INLINE Vec<float> exp(Vec<float> x) { return exp2(Vec<float>(x * kLog2e<float>)); }
MAMBA_INLINE Vec<double> exp(Vec<double> x) {
  return each_lane<double>(x, [](double v) { return ::exp(v); });
}

MAMBA_INLINE Vec<float> reciprocal(Vec<float> x) {  // of normal numbers
#if defined(__AVX512F__)
  const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return r * (2.f - x * r);
#else
  return 1.f / x;
#endif
}
MAMBA_INLINE Vec<double> reciprocal(Vec<double> x) { return 1. / x; }
MAMBA_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {  // of normal numbers
#if defined(__AVX512F__)
  const Vec<float> r = reciprocal(b), q = a * r;
  return q + r * (a - q * b);
#else
  return a / b;
#endif
}

// log(1 + x) for 0 <= x <= 1: 2 atanh(x / (2 + x)).
MAMBA_INLINE Vec<float> log1p_unit(Vec<float> x) {
  const Vec<float> s = quotient(x, Vec<float>(2.f + x)), q = s * s;
  Vec<float> p = splat(1.f / 15);
  p = p * q + 1.f / 13;
  p = p * q + 1.f / 11;
  p = p * q + 1.f / 9;
  p = p * q + 1.f / 7;
  p = p * q + 1.f / 5;
  p = p * q + 1.f / 3;
  return 2.f * s + 2.f * s * (p * q);
}
MAMBA_INLINE Vec<double> log1p_unit(Vec<double> x) {
  return each_lane<double>(x, [](double v) { return ::log1p(v); });
}

// sin and cos, by three-part reduction to |r| <= pi/4; large arguments lane by lane.
MAMBA_INLINE void sincos(Vec<float> x, Vec<float>& sin, Vec<float>& cos) {
  const Vec<float> size = max(x, Vec<float>(-x)), magic = splat(12582912.f);
  bool large = false;
  for (int i = 0; i < kWidth<float>; ++i) large |= !(size[i] < 8192.f);
  if (large) {
    sin = each_lane<float>(x, [](float v) { return ::sinf(v); });
    cos = each_lane<float>(x, [](float v) { return ::cosf(v); });
    return;
  }
  const Vec<float> shifted = x * 0.636619772f + magic, q = shifted - magic;
  const IntVec<float> quadrant = (IntVec<float>)shifted;
  const Vec<float> r = ((x - q * 1.5703125f) - q * 4.83751296997e-4f) - q * 7.54978995489e-8f, s = r * r;
  const Vec<float> sr = r + r * s * (-1.6666654611e-1f + s * (8.3321608736e-3f + s * -1.9515295891e-4f));
  const Vec<float> cr =
      1.f - 0.5f * s +
      s * s * (4.166664568298827e-2f + s * (-1.388731625493765e-3f + s * 2.443315711809948e-5f));
  const Vec<float> sq = (quadrant & 1) != 0 ? cr : sr, cq = (quadrant & 1) != 0 ? sr : cr;
  sin = (quadrant & 2) != 0 ? -sq : sq;
  cos = ((quadrant + 1) & 2) != 0 ? -cq : cq;
}
MAMBA_INLINE void sincos(Vec<double> x, Vec<double>& sin, Vec<double>& cos) {
  sin = each_lane<double>(x, [](double v) { return ::sin(v); });
  cos = each_lane<double>(x, [](double v) { return ::cos(v); });
}

MAMBA_INLINE Vec<float> sigmoid(Vec<float> v) {
  return reciprocal(Vec<float>(1.f + exp(min(splat(87.f), Vec<float>(-v)))));
}
MAMBA_INLINE Vec<double> sigmoid(Vec<double> v) { return 1. / (1. + exp(Vec<double>(-v))); }
// Also its derivative, if a place for it is given.
template <class R>
MAMBA_INLINE Vec<R> softplus(Vec<R> v, Vec<R>* grad = nullptr) {
  const Vec<R> zero = {}, pos = v > zero ? v : zero, neg = v > zero ? -v : v, e = exp(neg);
  if (grad) {
    const Vec<R> r = reciprocal(Vec<R>(R(1) + e));
    *grad = v > R(20) ? splat(R(1)) : v > zero ? r : e * r;
  }
  const Vec<R> soft = pos + log1p_unit(e);
  return v > R(20) ? v : soft;
}
template <class R>
MAMBA_INLINE Vec<R> silu(Vec<R> z) {
  return z * sigmoid(z);
}
template <class R>
MAMBA_INLINE Vec<R> silu_grad(Vec<R> z) {
  const Vec<R> s = sigmoid(z);
  return s * (R(1) + z * (R(1) - s));
}

// ---- storage types
// -----------------------------------------------------------------------------------------
MAMBA_INLINE float to_float(float x) { return x; }
MAMBA_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
MAMBA_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Moves the exponent by a multiplication, which handles denormals; infinities and NaN apart.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  uint32_t bits = rest << 13;
  float value;
  if (rest >= 0x7c00) {
    bits |= 0x7f800000;
    std::memcpy(&value, &bits, 4);
  } else {
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}
MAMBA_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(x != x ? 0x7fc0 : rounded)};
}
MAMBA_INLINE f16 to_f16(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  if (bits < 0x38800000) {  // denormal in f16: let the addition of 0.5 round at the right bit
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    return {uint16_t(sign | uint16_t(bits - 0x3f000000))};
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return {uint16_t(sign | uint16_t((bits - 0x38000000) >> 13))};
#endif
}

template <class R, class T>
MAMBA_INLINE R to_real(T x) {
  if constexpr (sizeof(T) == sizeof(double))
    return R(x);
  else
    return R(to_float(x));
}
template <class T, class R>
MAMBA_INLINE T from_real(R x) {
  if constexpr (sizeof(T) >= sizeof(float))
    return T(x);
  else if constexpr (__is_same(T, bf16))
    return to_bf16(float(x));
  else
    return to_f16(float(x));
}

// A vector of R from, and to, as many values of the storage type T.
typedef uint16_t HalfWords __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));

template <class R, class T>
MAMBA_INLINE Vec<R> load_as(const T* p) {
  if constexpr (__is_same(R, T)) {
    return load<R>(p);
  } else if constexpr (__is_same(R, float) && __is_same(T, bf16)) {
    const HalfWords bits = *reinterpret_cast<const HalfWords*>(p);
    return (Vec<float>)(__builtin_convertvector(bits, IntVec<float>) << 16);
#if defined(__AVX512F__)
  } else if constexpr (__is_same(R, float) && __is_same(T, f16)) {
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  } else if constexpr (__is_same(R, float) && __is_same(T, f16)) {
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  } else {
    Vec<R> v;
    for (int i = 0; i < kWidth<R>; ++i) v[i] = to_real<R>(p[i]);
    return v;
  }
}
template <class R, class T>
MAMBA_INLINE void store_as(T* p, Vec<R> v) {
  if constexpr (__is_same(R, T)) {
    store<R>(p, v);
  } else if constexpr (__is_same(R, float) && __is_same(T, bf16)) {
    const WordVec bits = (WordVec)v;
    const WordVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *reinterpret_cast<HalfWords*>(p) =
        __builtin_convertvector(v != v ? WordVec{} + 0x7fc0 : rounded, HalfWords);
#if defined(__AVX512F__)
  } else if constexpr (__is_same(R, float) && __is_same(T, f16)) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  } else if constexpr (__is_same(R, float) && __is_same(T, f16)) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int i = 0; i < kWidth<R>; ++i) p[i] = from_real<T>(v[i]);
  }
}

template <class R, class T>
MAMBA_INLINE void load_row(R* dst, const T* src, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth<R> <= n; i += kWidth<R>) store<R>(dst + i, load_as<R>(src + i));
  for (; i < n; ++i) dst[i] = to_real<R>(src[i]);
}
template <class R, class T>
MAMBA_INLINE void store_row(T* dst, const R* src, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth<R> <= n; i += kWidth<R>) store_as<R>(dst + i, load<R>(src + i));
  for (; i < n; ++i) dst[i] = from_real<T>(src[i]);
}

template <class F>
MAMBA_INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::f64:
      return f((double*)nullptr);
    case DType::bf16:
      return f((bf16*)nullptr);
    case DType::f16:
      return f((f16*)nullptr);
  }
}

}  // namespace mamba_ops::MAMBA_ISA

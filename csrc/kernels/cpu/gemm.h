// Small dense products from registers: out(i, v) = sum over k of left(i, k) right(k, v), for matrices that
// sit in the caches. T is the type of the factors: that of the arithmetic, or bf16 in pairs where the
// processor multiplies those faster.
#pragma once
#include "kernels/cpu/tile.h"

namespace mamba_ops::MAMBA_ISA {

// ---- operands, and how to make them of a matrix (rows, ld) of the arithmetic type
// -------------------------- left(i, k) is read one value at a time, so either side may be the contiguous
// one.
template <class R, class T>
struct Left {
  const R* p;
  int64_t row, col;

  MAMBA_INLINE R at(int64_t i, int64_t k) const { return p[i * row + k * col]; }
};
template <class R, class T>
struct Right {
  static constexpr int kStep = 1;  // terms of one multiplication
  const R* p;
  int64_t ld;

  MAMBA_INLINE Vec<R> at(int64_t k, int64_t v) const { return load<R>(p + k * ld + v); }
  MAMBA_INLINE static Vec<R> add(Vec<R> sum, R left, Vec<R> right) { return sum + left * right; }
};

// What operands take of the scratch, in values of R: rows of k terms; k rows of ld columns; the latter turned
// from rows.
template <class R, class T>
constexpr int64_t left_size(int64_t rows, int64_t k) {
  return __is_same(R, T) ? 0 : rows * padded(k) / 2 + kPad;
}
template <class R, class T>
constexpr int64_t right_size(int64_t k, int64_t ld) {
  return __is_same(R, T) ? 0 : padded(k) * ld / 2;
}
template <class R, class T>
constexpr int64_t turned_size(int64_t k, int64_t ld) {
  return (__is_same(R, T) ? padded(k) : padded(padded(k) / 2)) * ld;
}

#if defined(__AVX512BF16__)
// bf16 in pairs of neighbours along k.
template <>
struct Left<float, bf16> {
  const bf16* p;
  int64_t row, col;

  MAMBA_INLINE __m512bh at(int64_t i, int64_t k) const {
    int32_t pair;
    std::memcpy(&pair, p + i * row + k * col, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
};
// Two rows of the matrix interleaved.
template <>
struct Right<float, bf16> {
  static constexpr int kStep = 2;
  const bf16* p;
  int64_t ld;

  MAMBA_INLINE __m512bh at(int64_t k, int64_t v) const {
    return (__m512bh)_mm512_loadu_si512(p + k * ld + 2 * v);
  }
  MAMBA_INLINE static Vec<float> add(Vec<float> sum, __m512bh left, __m512bh right) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, left, right);
  }
};
#endif

// left(i, k) = src[i * ld + k], for i < rows and k < terms.
template <class R, class T>
MAMBA_INLINE Left<R, T> left_of(R* buffer, const R* src, int64_t ld, int64_t rows, int64_t terms) {
  if constexpr (__is_same(R, T)) {
    return {src, ld, 1};
  } else {
#if defined(__AVX512BF16__)
    bf16* to = reinterpret_cast<bf16*>(buffer);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < terms; k += kWidth<R>)
        _mm256_storeu_si256((__m256i*)(to + i * padded(terms) + k),
                            (__m256i)_mm512_cvtneps_pbh((__m512)load<R>(src + i * ld + k)));
      if (terms % 2) to[i * padded(terms) + terms] = {0};
    }
    return {to, padded(terms), 1};
#endif
  }
}
// right(k, v) = src[k * ld + v], for k < terms and v < ld.
template <class R, class T>
MAMBA_INLINE Right<R, T> right_of(R* buffer, const R* src, int64_t ld, int64_t terms) {
  if constexpr (__is_same(R, T)) {
    return {src, ld};
  } else {
#if defined(__AVX512BF16__)
    bf16* to = reinterpret_cast<bf16*>(buffer);
    typedef int16_t Lanes __attribute__((vector_size(64)));
    Lanes interleave;
    for (int i = 0; i < 32; ++i) interleave[i] = int16_t(i / 2 + i % 2 * 16);
    for (int64_t k = 0; k < terms; k += 2)
      for (int64_t v = 0; v < ld; v += kWidth<R>) {
        const Vec<R> first = load<R>(src + k * ld + v),
                     second = k + 1 < terms ? load<R>(src + (k + 1) * ld + v) : Vec<R>{};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        _mm512_storeu_si512(to + k * ld + 2 * v, _mm512_permutexvar_epi16((__m512i)interleave, both));
      }
    return {to, ld};
#endif
  }
}
// left(i, k) = src[k * ld + i], for k < terms and i < ld.
template <class R, class T>
MAMBA_INLINE Left<R, T> left_of_transposed(R* buffer, const R* src, int64_t ld, int64_t terms) {
  if constexpr (__is_same(R, T))
    return {src, 1, ld};
  else  // pairs of rows interleaved are pairs along k
    return {right_of<R, T>(buffer, src, ld, terms).p, 2, ld};
}
// right(k, v) = left(v, k), for k < terms and v < rows, a multiple of the vector width.
template <class R, class T>
MAMBA_INLINE Right<R, T> right_of_transposed(R* turned, Left<R, T> left, int64_t rows, int64_t terms) {
  const int64_t ld = padded(rows);
  if constexpr (__is_same(R, T)) {
    transpose(turned, ld, left.p, left.row, rows, padded(terms));
    return {turned, ld};
  } else {  // pairs move as one
    transpose(turned, ld, reinterpret_cast<const R*>(left.p), left.row / 2, rows, padded(padded(terms) / 2));
    return {reinterpret_cast<const T*>(turned), ld};
  }
}

// ---- the product
// -------------------------------------------------------------------------------------------
#if defined(__AVX512F__)
inline constexpr int kGemmRows = 8;  // 8 x 2 accumulators of 32 registers
#else
inline constexpr int kGemmRows = 4;  // 4 x 2 of 16
#endif

// Rows i0 .. i0 + kRows, columns v .. v + kVecs * kWidth, k in [k0, k1).
template <int kRows, int kVecs, class R, class T, class Init, class Out>
MAMBA_INLINE void gemm_block(Left<R, T> left, Right<R, T> right, int64_t i0, int64_t v, int64_t k0,
                             int64_t k1, Init init, Out out) {
  using Factor = decltype(right.at(0, 0));
  Vec<R> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) acc[i][j] = init(i0 + i, v + j * kWidth<R>);
  for (int64_t k = k0; k < k1; k += right.kStep) {
    Factor row[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) row[j] = right.at(k, v + j * kWidth<R>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) acc[i][j] = right.add(acc[i][j], left.at(i0 + i, k), row[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) out(i0 + i, v + j * kWidth<R>, acc[i][j]);
}

template <int kRows, int kVecs, class R, class T, class TermsOf, class Init, class Out>
MAMBA_INLINE void gemm_rows(Left<R, T> left, Right<R, T> right, int64_t i, int64_t rows, int64_t v,
                            TermsOf terms, Init init, Out out) {
  for (; i + kRows <= rows; i += kRows) {
    const auto [k0, k1] = terms(i, i + kRows);
    gemm_block<kRows, kVecs>(left, right, i, v, k0, k1, init, out);
  }
  if constexpr (kRows > 1) gemm_rows<kRows / 2, kVecs>(left, right, i, rows, v, terms, init, out);
}

struct Terms {  // k in [begin, end)
  int64_t begin, end;
};

// For i < rows and vectors v < cols (a multiple of the vector width): out(i, v, sum), the sum taken in order
// over k in terms(i0, i1) for the block [i0, i1) of rows that i falls into, on top of init(i, v). An odd
// number of terms may be rounded up by a zero. kLower leaves out blocks that lie wholly above the diagonal.
template <bool kLower, class R, class T, class TermsOf, class Init, class Out>
MAMBA_INLINE void gemm(Left<R, T> left, Right<R, T> right, int64_t rows, int64_t cols, TermsOf terms,
                       Init init, Out out) {
  const auto first = [](int64_t v) { return kLower ? v / kGemmRows * kGemmRows : 0; };
  int64_t v = 0;
  for (; v + 2 * kWidth<R> <= cols; v += 2 * kWidth<R>)
    gemm_rows<kGemmRows, 2>(left, right, first(v), rows, v, terms, init, out);
  if (v < cols) gemm_rows<kGemmRows, 1>(left, right, first(v), rows, v, terms, init, out);
}

}  // namespace mamba_ops::MAMBA_ISA

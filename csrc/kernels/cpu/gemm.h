// Small dense products from registers: out(i, v) = sum over k of a(i, k) b[k][v], for matrices that sit in the caches.
#pragma once
#include "kernels/cpu/simd.h"

namespace mamba_ops::MAMBA_ISA {

// An operand that is read one value at a time, so either side of it may be the contiguous one.
template <class R>
struct Left {
  const R* p;
  int64_t row, col;
};

#if defined(__AVX512F__)
inline constexpr int kGemmRows = 8;  // 8 x 2 accumulators of 32 registers
#else
inline constexpr int kGemmRows = 4;  // 4 x 2 of 16
#endif

// Rows i0 .. i0 + kRows, columns v .. v + kVecs * kWidth, k in [k0, k1).
template <int kRows, int kVecs, class R, class Init, class Out>
MAMBA_INLINE void gemm_block(Left<R> a, const R* b, int64_t ldb, int64_t i0, int64_t v, int64_t k0, int64_t k1, Init init,
                             Out out) {
  Vec<R> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) acc[i][j] = init(i0 + i, v + j * kWidth<R>);
  const R* from = a.p + i0 * a.row;
  for (int64_t k = k0; k < k1; ++k) {
    Vec<R> row[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) row[j] = load<R>(b + k * ldb + v + j * kWidth<R>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) acc[i][j] += from[i * a.row + k * a.col] * row[j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) out(i0 + i, v + j * kWidth<R>, acc[i][j]);
}

template <int kRows, int kVecs, class R, class TermsOf, class Init, class Out>
MAMBA_INLINE void gemm_rows(Left<R> a, const R* b, int64_t ldb, int64_t i, int64_t rows, int64_t v, TermsOf terms, Init init,
                            Out out) {
  for (; i + kRows <= rows; i += kRows) {
    const auto [k0, k1] = terms(i, i + kRows);
    gemm_block<kRows, kVecs>(a, b, ldb, i, v, k0, k1, init, out);
  }
  if constexpr (kRows > 1) gemm_rows<kRows / 2, kVecs>(a, b, ldb, i, rows, v, terms, init, out);
}

struct Terms {  // k in [begin, end)
  int64_t begin, end;
};

// For i < rows and vectors v < cols (a multiple of the vector width): out(i, v, sum), the sum taken in order over
// k in terms(i0, i1) for the block [i0, i1) of rows that i falls into, on top of init(i, v). kLower leaves out blocks
// that lie wholly above the diagonal.
template <bool kLower, class R, class TermsOf, class Init, class Out>
MAMBA_INLINE void gemm(Left<R> a, const R* b, int64_t ldb, int64_t rows, int64_t cols, TermsOf terms, Init init, Out out) {
  const auto first = [](int64_t v) { return kLower ? v / kGemmRows * kGemmRows : 0; };
  int64_t v = 0;
  for (; v + 2 * kWidth<R> <= cols; v += 2 * kWidth<R>)
    gemm_rows<kGemmRows, 2>(a, b, ldb, first(v), rows, v, terms, init, out);
  if (v < cols) gemm_rows<kGemmRows, 1>(a, b, ldb, first(v), rows, v, terms, init, out);
}

}  // namespace mamba_ops::MAMBA_ISA

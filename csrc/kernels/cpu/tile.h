// Tiles: a rectangle of a strided tensor as a contiguous matrix of the arithmetic type, columns padded with
// zeros to whole vectors. Rows are tokens and columns channels everywhere, whatever the layout of the tensor.
#pragma once
#include "kernels/cpu/simd.h"

namespace mamba_ops::MAMBA_ISA {

// The shuffles of two vectors that swap their off-diagonal blocks of kBlock lanes.
template <class R>
struct Masks {
  IntVec<R> low, high;
};
template <int kBlock, class R>
MAMBA_INLINE Masks<R> swap_masks() {
  constexpr int w = kWidth<R>;
  Masks<R> masks;
  for (int j = 0; j < w; ++j) {
    masks.low[j] = j & kBlock ? j - kBlock + w : j;
    masks.high[j] = j & kBlock ? j + w : j + kBlock;
  }
  return masks;
}

// In-place transpose of kWidth x kWidth values in registers: swaps the off-diagonal blocks of every size.
template <int kBlock, class R>
MAMBA_INLINE void transpose_step(Vec<R>* r) {
  constexpr int w = kWidth<R>;
  const auto [low, high] = swap_masks<kBlock, R>();
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i)
    if (!(i & kBlock)) {
      const Vec<R> a = r[i], b = r[i + kBlock];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + kBlock] = __builtin_shuffle(a, b, high);
    }
  if constexpr (kBlock > 1) transpose_step<kBlock / 2, R>(r);
}
template <class R>
MAMBA_INLINE void transpose(Vec<R>* r) {
  transpose_step<kWidth<R> / 2, R>(r);
}

// Out-of-place transpose of a (rows, cols) matrix; both sides padded to whole vectors.
template <class R>
MAMBA_INLINE void transpose(R* dst, int64_t dst_ld, const R* src, int64_t src_ld, int64_t rows,
                            int64_t cols) {
  constexpr int w = kWidth<R>;
  for (int64_t i = 0; i < rows; i += w)
    for (int64_t j = 0; j < cols; j += w) {
      Vec<R> r[w];
      for (int k = 0; k < w; ++k) r[k] = load<R>(src + (i + k) * src_ld + j);
      transpose<R>(r);
      for (int k = 0; k < w; ++k) store<R>(dst + (j + k) * dst_ld + i, r[k]);
    }
}

inline constexpr int64_t kMaxTileRows = 256;

// dst[i * ld + j] = src(i, j) for i < rows <= kMaxTileRows, j < cols; columns up to padded(cols)
// become zero. `offset` is the element of src where the tile begins.
template <class R>
void load_tile(R* dst, int64_t ld, const View& src, int64_t offset, int64_t rows, int64_t row_stride,
               int64_t cols, int64_t col_stride) {
  constexpr int w = kWidth<R>;
  const int64_t width = padded(cols);
  with_type(src.dtype, [&]<class T>(T*) {
    const T* from = static_cast<const T*>(src.data) + offset;
    if (row_stride == 1 && col_stride != 1 && rows >= w / 2) {  // tokens are contiguous: transpose
      alignas(64) R strip[w * kMaxTileRows];
      const int64_t strip_ld = padded(rows);
      for (int64_t j = 0; j < width; j += w) {
        for (int64_t k = 0; k < w; ++k) {
          R* row = strip + k * strip_ld;
          const int64_t n = j + k < cols ? rows : 0;
          load_row(row, from + (j + k) * col_stride, n);
          for (int64_t i = n; i < strip_ld; ++i) row[i] = 0;
        }
        for (int64_t i = 0; i < rows; i += w) {
          Vec<R> r[w];
          for (int k = 0; k < w; ++k) r[k] = load<R>(strip + k * strip_ld + i);
          transpose<R>(r);
          const int64_t n = rows - i < w ? rows - i : w;
          for (int64_t k = 0; k < n; ++k) store<R>(dst + (i + k) * ld + j, r[k]);
        }
      }
      return;
    }
    if (col_stride == 1) {
      const int64_t whole = cols / w * w;
      for (int64_t i = 0; i < rows; ++i, from += row_stride) {
        R* to = dst + i * ld;
        for (int64_t j = 0; j < whole; j += w) store<R>(to + j, load_as<R>(from + j));
        if (whole == width) continue;
        Vec<R> rest = {};
        for (int64_t j = whole; j < cols; ++j) rest[j - whole] = to_real<R>(from[j]);
        store<R>(to + whole, rest);
        for (int64_t j = whole + w; j < width; j += w) store<R>(to + j, Vec<R>{});
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i, from += row_stride) {
      R* to = dst + i * ld;
      for (int64_t j = 0; j < cols; ++j) to[j] = to_real<R>(from[j * col_stride]);
      for (int64_t j = cols; j < width; ++j) to[j] = 0;
    }
  });
}

// Asks for share `part` of `parts` of the cache lines of a tile that a later load_tile or store_tile will
// want: rows of a strided tensor are too short for the hardware to see them coming.
inline void prefetch_tile(const View& v, int64_t offset, int64_t rows, int64_t row_stride, int64_t cols,
                          int64_t col_stride, int64_t part, int64_t parts) {
  if (!v) return;
  const int64_t size = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  if (row_stride == 1) {
    const int64_t swap = rows;
    rows = cols, cols = swap;
    row_stride = col_stride;
  }
  asm volatile("");  // a function of nothing but prefetches has no effect in the compiler's eyes, and goes
  const char* base = static_cast<const char*>(v.data) + offset * size;
  for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i)
    for (int64_t byte = 0; byte < cols * size; byte += 64)
      __builtin_prefetch(base + i * row_stride * size + byte, 0, 2);  // into L2: rows may crowd L1
}

// dst(i, j) = src[i * ld + j]; the counterpart of load_tile. src has padded(cols) readable columns.
template <class R>
void store_tile(const View& dst, int64_t offset, int64_t rows, int64_t row_stride, int64_t cols,
                int64_t col_stride, const R* src, int64_t ld) {
  constexpr int w = kWidth<R>;
  with_type(dst.dtype, [&]<class T>(T*) {
    T* to = static_cast<T*>(dst.data) + offset;
    if (row_stride == 1 && col_stride != 1 && rows >= w / 2) {
      alignas(64) R strip[w * kMaxTileRows];
      const int64_t strip_ld = padded(rows);
      for (int64_t j = 0; j < cols; j += w) {
        for (int64_t i = 0; i < rows; i += w) {
          const int64_t n = rows - i < w ? rows - i : w;
          Vec<R> r[w];
          for (int64_t k = 0; k < w; ++k) r[k] = k < n ? load<R>(src + (i + k) * ld + j) : Vec<R>{};
          transpose<R>(r);
          for (int k = 0; k < w; ++k) store<R>(strip + k * strip_ld + i, r[k]);
        }
        const int64_t n = cols - j < w ? cols - j : w;
        for (int64_t k = 0; k < n; ++k) store_row(to + (j + k) * col_stride, strip + k * strip_ld, rows);
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i, to += row_stride) {
      const R* from = src + i * ld;
      if (col_stride == 1)
        store_row(to, from, cols);
      else
        for (int64_t j = 0; j < cols; ++j) to[j * col_stride] = from_real<T>(from[j]);
    }
  });
}

// dst(i, j) = sum over g < groups, in order, of partial[g * group_stride + i * ld + j]: the second pass of a
// reduction. ld >= padded(cols).
template <class R>
void sum_partials(const View& dst, int64_t offset, int64_t rows, int64_t row_stride, int64_t cols,
                  int64_t col_stride, const R* partial, int64_t ld, int64_t groups, int64_t group_stride) {
  constexpr int64_t kRows = 16, kCols = 64;
  alignas(64) R sum[kRows * kCols];
  for (int64_t i0 = 0; i0 < rows; i0 += kRows)
    for (int64_t j0 = 0; j0 < cols; j0 += kCols) {
      const int64_t ni = rows - i0 < kRows ? rows - i0 : kRows, nj = cols - j0 < kCols ? cols - j0 : kCols;
      for (int64_t i = 0; i < ni; ++i)
        for (int64_t j = 0; j < nj; j += kWidth<R>) {
          const R* from = partial + (i0 + i) * ld + j0 + j;
          Vec<R> total = {};
          for (int64_t g = 0; g < groups; ++g) total += load<R>(from + g * group_stride);
          store<R>(sum + i * kCols + j, total);
        }
      store_tile(dst, offset + i0 * row_stride + j0 * col_stride, ni, row_stride, nj, col_stride, sum, kCols);
    }
}

}  // namespace mamba_ops::MAMBA_ISA

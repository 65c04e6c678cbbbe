// Second pass of a reduction: columns of partial sums, added in a fixed order.
#pragma once
#include <cstdint>

namespace mamba_ops::gpu {

inline constexpr int kReduceColumns = 32, kReduceRows = 16;
inline constexpr int kReduceThreads = kReduceColumns * kReduceRows;

__host__ __device__ inline int64_t reduce_blocks(int64_t columns) {
  return (columns + kReduceColumns - 1) / kReduceColumns;
}

// The sum of from[0], from[stride] ... `count` values, for each column of a block: thread (column, row) adds
// the rows row, row + 16, ..., and row 0, which is returned the total, adds the 16 sums. All threads of the
// block call it. In double: a long sequence has thousands of partial sums, and these are few additions.
template <class R>
__device__ inline double sum_column(const R* from, int64_t count, int64_t stride, bool inside) {
  __shared__ double s_sums[kReduceRows][kReduceColumns];
  const int column = threadIdx.x % kReduceColumns, row = threadIdx.x / kReduceColumns;
  double total = 0;
  if (inside)
#pragma unroll 4
    for (int64_t i = row; i < count; i += kReduceRows) total += from[i * stride];
  s_sums[row][column] = total;
  __syncthreads();
  for (int i = 1; row == 0 && i < kReduceRows; ++i) total += s_sums[i][column];
  return total;
}

}  // namespace mamba_ops::gpu

// Which row of a state a batch row updates.
#pragma once
#include <cmath>

#include "kernels/cuda/sequences.cuh"

namespace mamba_ops::gpu {

// The first of the batch rows [begin, end) whose state is `row`, or end. For whole warps.
template <class Count>
__device__ inline Count find_row(const IndexView& index, int64_t row, Count begin, Count end) {
  for (Count base = begin; base < end; base += 32) {
    const Count i = base + threadIdx.x % 32;
    const unsigned hits = __ballot_sync(kAllLanes, i < end && index_at(index, i * index.stride[0]) == row);
    if (hits) return base + __ffs(hits) - 1;
  }
  return end;
}

// update(i, row of the state) or, where batch row i has none, fill(i, value of its y), for the batch rows of
// a block, which are in z of the grid. Rows that share a state take their turns in order: whoever has the
// first of them takes them all.
template <class Count, class Update, class Fill>
__device__ inline void for_rows(const DeviceRows& rows, Count b, Update update, Fill fill) {
  const IndexView& index = rows.index;
  for (Count i = blockIdx.z; i < b; i += gridDim.z) {
    int64_t row = i;
    if (index.data) {
      row = index_at(index, i * index.stride[0]);
      if (row < 0 || row >= rows.states) {
        fill(i, row < 0 ? 0.f : NAN);
        continue;
      }
      if (find_row(index, row, Count(0), i) < i) continue;
    }
    for (Count turn = i; turn < b; turn = index.data ? find_row(index, row, Count(turn + 1), b) : b)
      update(turn, row);
  }
}

}  // namespace mamba_ops::gpu

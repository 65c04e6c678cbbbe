// Which row of a state a batch row updates.
#pragma once
#include <cmath>

#include "kernels/cuda/sequences.cuh"

namespace mamba_ops::gpu {

// The first of the batch rows [begin, end) whose state is `row`, or end. For whole warps.
__device__ inline int64_t find_row(const IndexView& index, int64_t row, int64_t begin, int64_t end) {
  for (int64_t base = begin; base < end; base += 32) {
    const int64_t i = base + threadIdx.x % 32;
    const unsigned hits = __ballot_sync(0xffffffffu, i < end && index_at(index, i * index.stride[0]) == row);
    if (hits) return base + __ffs(hits) - 1;
  }
  return end;
}

// update(i, row of the state) or, where batch row i has none, fill(i, value of its y), for the batch rows of
// a block, which are in z of the grid. Rows that share a state take their turns in order: whoever has the
// first of them takes them all.
template <class Update, class Fill>
__device__ inline void for_rows(const DeviceRows& rows, int64_t b, Update update, Fill fill) {
  const IndexView& index = rows.index;
  for (int64_t i = blockIdx.z; i < b; i += gridDim.z) {
    const int64_t row = index.data ? index_at(index, i * index.stride[0]) : i;
    if (row < 0 || row >= rows.states) {
      fill(i, row < 0 ? 0.f : NAN);
      continue;
    }
    if (index.data && find_row(index, row, 0, i) < i) continue;
    for (int64_t turn = i; turn < b; turn = index.data ? find_row(index, row, turn + 1, b) : b)
      update(turn, row);
  }
}

}  // namespace mamba_ops::gpu

// Where runs begin, seen from a few neighbouring tokens.
#pragma once
#include "kernels/cuda/load_store.cuh"
#include "kernels/cuda/sequences.h"

namespace mamba_ops::gpu {

__device__ inline int64_t index_at(const IndexView& v, int64_t offset) {
  return v.wide ? static_cast<const int64_t*>(v.data)[offset] : static_cast<const int32_t*>(v.data)[offset];
}

__device__ inline int64_t offset_at(const Sequences& seqs, int64_t k) {
  return index_at(seqs.cu_seqlens, k * seqs.cu_seqlens.stride[0]);
}

__device__ inline bool is_invalid(const Sequences& seqs) { return seqs.invalid && *seqs.invalid; }
// The same of packs without ids, by all threads of a block: whether not 0 = cu_0 <= ... <= cu_s = l.
__device__ inline bool is_invalid_pack(const Sequences& seqs, int64_t l) {
  if (!seqs.cu_seqlens.data) return false;
  bool bad = false;
  for (int64_t k = threadIdx.x; k <= seqs.count; k += blockDim.x) {
    const int64_t here = offset_at(seqs, k);
    bad |= k == 0 ? here != 0 : here < offset_at(seqs, k - 1);
    bad |= k == seqs.count && here != l;
  }
  return __syncthreads_or(bad);
}

// The sequence of token t of a pack: the largest k in [0, s) with cu_k <= t, or 0; empty sequences own no
// token. Within [0, s) for offsets of any value.
__device__ inline int64_t sequence_at(const Sequences& seqs, int64_t t) {
  if (seqs.id.data) return index_at(seqs.id, t * seqs.id.stride[1]);
  int64_t low = 0, high = seqs.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offset_at(seqs, middle) <= t)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Whether a run begins at token t of a row, 0 < t < l.
__device__ inline bool begins(const Sequences& seqs, int64_t row, int64_t t) {
  if (!seqs.has_runs()) return false;
  if (!seqs.id.data) return offset_at(seqs, sequence_at(seqs, t)) == t;
  const int64_t at = row * seqs.id.stride[0] + t * seqs.id.stride[1];
  return index_at(seqs.id, at) != index_at(seqs.id, at - seqs.id.stride[1]);
}

// The first token of [from, end) of a row at which a run begins, or end. For kernels that have seqs.starts.
__device__ inline int64_t next_run(const Sequences& seqs, int64_t row, int64_t from, int64_t end) {
  if (!seqs.starts || from >= end) return end;
  from = from < 0 ? 0 : from;
  unsigned seen = ~0u << from % 32;
  for (int64_t word = from / 32; word * 32 < end; ++word) {
    const unsigned bits = seqs.starts[row * seqs.words + word] & seen;
    if (bits) return min(word * 32 + __ffs(bits) - 1, end);
    seen = ~0u;
  }
  return end;
}

// Bit i, from 1 to kTokens - 1: a run begins at token first + i, or the row ends there (token l).
template <int kTokens>
__device__ inline unsigned run_starts(const Sequences& seqs, int64_t row, int64_t first, int64_t l) {
  static_assert(kTokens <= 32);
  unsigned bits = 0;
  if (first < 0 && first + kTokens > 0) bits |= 1u << -first;
  if (first < l && first + kTokens > l) bits |= 1u << (l - first);
  if (!seqs.id.data) return bits;
#pragma unroll
  for (int i = 1; i < kTokens; ++i)
    if (first + i > 0 && first + i < l && begins(seqs, row, first + i)) bits |= 1u << i;
  return bits;
}

// The row of the states that enter the run which begins at `begin`, or -1.
__device__ inline int64_t state_row(const Sequences& seqs, int64_t row, int64_t begin) {
  if (seqs.cu_seqlens.data) return sequence_at(seqs, begin);
  return begin == 0 ? row : -1;
}

// Whether a run begins at token t, or the row has ended before it.
__device__ inline bool is_edge(const Sequences& seqs, int64_t row, int64_t t, int64_t l) {
  return t == 0 || t == l || begins(seqs, row, t);
}
// The row of the states that leave the run which ends before `end`, or -1.
__device__ inline int64_t state_row_out(const Sequences& seqs, int64_t row, int64_t end, int64_t l) {
  if (seqs.cu_seqlens.data) return sequence_at(seqs, end - 1);
  return end == l ? row : -1;
}

}  // namespace mamba_ops::gpu

// B and C of float32 as split rows (split.cuh), and what tokens add to states: for the forward and for the
// states between cells.
#pragma once
#include "kernels/cuda/split.cuh"
#include "kernels/cuda/ssd_tile.cuh"

namespace mamba_ops::gpu {

// A (kRows, kColumns) tile becomes split rows. Every warp takes the rows that it has copied itself (load_tile
// of a direct tensor): they need its own wait_for_copies() alone.
template <int kRows, int kColumns, int kWarps>
__device__ inline void split_tile(float* tile, int ld, float* from) {
  constexpr int kOwn = kRows / kWarps, kMost = kColumns <= 128 ? 8 : 4, kAtOnce = kOwn < kMost ? kOwn : kMost;
  static_assert(kRows % kWarps == 0 && kOwn % kAtOnce == 0);
  const int begin = threadIdx.x / 32 * kOwn;
  __syncwarp();
#pragma unroll 1
  for (int i = begin; i < begin + kOwn; i += kAtOnce)
    split_rows<kColumns, kAtOnce>(tile + i * ld, ld, from + i);
}

inline constexpr int kSplitTerms = 32;  // of a sum before it is added to others

__device__ inline float largest_of(const float (&v)[4]) {
  return fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
}

// state (16 channels by 8 kTiles columns from `first` on) <- state decay + sum_j (weight_j x_j) B_j^T over
// kTokens tokens. x: its first channel; B: split rows, to be multiplied by `from`.
template <class F, int kTokens, int kTiles>
__device__ inline void add_split_tokens(float (&state)[kTiles][4], float decay, const float* x, int ldx,
                                        const float* weight, const float* B, int ldb, const float* from,
                                        int first) {
  static_assert(kTokens <= kSplitTerms && kTiles % 4 == 0);
  constexpr int kSteps = kTokens / 16;
  typename F::Left terms[kSteps];
  float most[2] = {};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    terms[k] = F::weighted(F::left_turned(x + 16 * k * ldx, ldx), weight + 16 * k);
    terms[k] = F::weighted(terms[k], from + 16 * k);
#pragma unroll
    for (int half = 0; half < 2; ++half) most[half] = fmaxf(most[half], largest_of(terms[k].v[half]));
  }
  const SplitScale scales[2] = {SplitScale(row_largest(most[0])), SplitScale(row_largest(most[1]))};
  SplitLeft left[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) left[k] = split_left(terms[k].v, scales);
#pragma unroll
  for (int tile = 0; tile < kTiles; tile += 4) {
    float piece[4][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      multiply_split<F::kExact, true>(piece, left[k], B + 16 * k * ldb, ldb, first + 8 * tile);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& sum = state[tile + i / 4][i % 4];
      sum = piece[i / 4][i % 4] * scales[i % 4 / 2].from + sum * decay;
    }
  }
}

}  // namespace mamba_ops::gpu

// SSD forward, portable: the products of a chunk (see ssd_fwd.cu). A warp's state is 16 channels (rows) by n.
#pragma once
#include "kernels/cuda/ssd_fwd_tiles.cuh"
#include "kernels/cuda/ssd_split.cuh"

namespace mamba_ops::gpu {

template <class F, class Sizes>
struct FwdBlock {
  using T = FwdTiles<F, Sizes>;
  using E = typename F::Element;
  using R = typename F::Real;
  using ChunkSteps = Steps<F, T::kQ>;
  static constexpr int kQ = T::kQ, kP = T::kP, kN = T::kN;
  // P: 16 rows by these columns for every warp.
  static constexpr int kRowBlocks = kQ / 16, kPairColumns = kQ * kRowBlocks / T::kWarps;

  T& tiles;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int pair_row = warp % kRowBlocks * 16, pair_column = warp / kRowBlocks * kPairColumns;
  R state[kN / 8][4];

  __device__ explicit FwdBlock(T& shared) : tiles(shared) {}

  // Whether columns 16 i .. 16 i + 15 of this warp's pairs are on or below the diagonal.
  __device__ bool has_pairs(int i) const { return pair_column / 16 + i <= pair_row / 16; }

  // The products C_i . B_j, weighted: by 2^(s_i - s_j) factor(j) for i >= j, else 0. Then use(tile).
  template <class Factor, class Use>
  __device__ void weigh_pairs(R (&sums)[kPairColumns / 8][4], const ChunkSteps& steps, Factor factor,
                              Use use) const {
    const int i = pair_row + lane / 4;
    const typename F::Sum s[2] = {steps.s[i], steps.s[i + 8]};
#pragma unroll
    for (int tile = 0; tile < kPairColumns / 8; ++tile) {
      if (!has_pairs(tile / 2)) continue;
      const int j = pair_column + 8 * tile + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const typename F::Sum s_j = steps.s[j + k];
        const R weight = factor(j + k);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          R& sum = sums[tile][2 * half + k];
          sum = i + 8 * half >= j + k ? sum * exp2_of(s[half] - s_j) * weight : R(0);
        }
      }
      use(tile);
    }
  }
};

// Products of F's factors.
template <class F, class Sizes>
struct PlainProducts : FwdBlock<F, Sizes> {
  using Block = FwdBlock<F, Sizes>;
  using Block::Block;
  using Block::kN, Block::kPairColumns, Block::kQ, Block::lane, Block::pair_column, Block::pair_row,
      Block::state, Block::tiles, Block::warp;
  using typename Block::ChunkSteps, typename Block::E, typename Block::R, typename Block::T;

  // The blocks of P on and below the diagonal.
  __device__ void make_pairs(const ChunkSteps& steps) const {
    R sums[kPairColumns / 8][4] = {};
    const auto use = [&](int i) { return this->has_pairs(i); };
#pragma unroll 2
    for (int k = 0; k < kN; k += 16) {
      const auto left = F::left(tiles.C + pair_row * T::kLdC + k, T::kLdC);
      const E* B = tiles.B + pair_column * T::kLdB + k;
      if constexpr (kPairColumns == 8)
        multiply_columns<F, false>(sums, left, B, T::kLdB);
      else
        multiply_columns<F, false>(sums, left, B, T::kLdB, use);
    }
    const auto store = [&](int tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        F::store_pair(
            tiles.P + (pair_row + lane / 4 + 8 * half) * T::kLdP + pair_column + 8 * tile + lane % 4 * 2,
            sums[tile][2 * half], sums[tile][2 * half + 1]);
    };
    this->weigh_pairs(sums, steps, [&](int j) { return steps.delta[j]; }, store);
  }

  // Y^T of this warp's channels from H, and H after the chunk. Does not read P.
  __device__ void pass_state(const E* x, const ChunkSteps& steps, R (&y)[kQ / 8][4]) {
#pragma unroll
    for (int k = 0; k < kN; k += 16)
      multiply_columns<F, false>(y, F::from_sums(state[k / 8], state[k / 8 + 1]), tiles.C + k, T::kLdC);
#pragma unroll
    for (int tile = 0; tile < kQ / 8; ++tile)
#pragma unroll
      for (int k = 0; k < 4; ++k) y[tile][k] *= steps.from_start[8 * tile + lane % 4 * 2 + k % 2];
    scale(state, steps.decay);
#pragma unroll 1
    for (int k = 0; k < kQ; k += 16) {
      const auto left = F::left_turned(x + k * T::kLdX + 16 * warp, T::kLdX);
      multiply_columns<F, true>(state, F::weighted(left, steps.weight + k), tiles.B + k * T::kLdB, T::kLdB);
    }
  }

  // y += X^T P^T + D x.
  __device__ void add_pairs(const E* x, const R (&D)[2], R (&y)[kQ / 8][4]) const {
#pragma unroll
    for (int k = 0; k < kQ; k += 16) {
      const auto left = F::left_turned(x + k * T::kLdX + 16 * warp, T::kLdX);
      multiply_columns<F, false>(y, left, tiles.P + k, T::kLdP, [&](int i) { return i >= k / 16; });
#pragma unroll
      for (int i = 0; i < 8; ++i)
        y[k / 8 + i % 4 / 2][i / 4 * 2 + i % 2] += D[i / 4] * F::term(left, i / 4, i % 4);
    }
  }
};

// float32: B, C and P lie as split rows; H and X^T are split where they are used.
template <class F, class Sizes>
struct SplitProducts : FwdBlock<F, Sizes> {
  using Block = FwdBlock<F, Sizes>;
  using Block::Block;
  using Block::kN, Block::kPairColumns, Block::kQ, Block::lane, Block::pair_column, Block::pair_row,
      Block::state, Block::tiles, Block::warp;
  using typename Block::ChunkSteps, typename Block::T;

  // The largest values of this warp's rows of the state, for the next product with it.
  __device__ void find_largest() const {
    float most[2] = {};
#pragma unroll
    for (int tile = 0; tile < kN / 8; ++tile)
#pragma unroll
      for (int k = 0; k < 4; k += 2)
        most[k / 2] = fmaxf(most[k / 2], fmaxf(fabsf(state[tile][k]), fabsf(state[tile][k + 1])));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = row_largest(most[half]);
      if (lane % 4 == 0) tiles.largest[16 * warp + lane / 4 + 8 * half] = most[half];
    }
  }

  // Once this warp's copies are there.
  __device__ void split_C() const { split_tile<kQ, kN, T::kWarps>(tiles.C, T::kLdC, tiles.from_C); }
  __device__ void split_B() const { split_tile<kQ, kN, T::kWarps>(tiles.B, T::kLdB, tiles.from_B); }

  __device__ void make_pairs(const ChunkSteps& steps) const {
    static_assert(kPairColumns == 16);
    if (!this->has_pairs(0)) return;
    float sums[2][4] = {};
#pragma unroll
    for (int k = 0; k < kN; k += kSplitTerms) {
      float part[2][4] = {};
#pragma unroll
      for (int m = k; m < k + kSplitTerms; m += 16) {
        const SplitLeft left = split_left(tiles.C + pair_row * T::kLdC, T::kLdC, m);
        multiply_split<F::kExact, false>(part, left, tiles.B + pair_column * T::kLdB, T::kLdB, m);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] += part[i / 4][i % 4];
    }
    this->weigh_pairs(sums, steps, [&](int j) { return steps.delta[j] * tiles.from_B[j]; }, [](int) {});
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float v[4] = {sums[0][2 * half], sums[0][2 * half + 1], sums[1][2 * half], sums[1][2 * half + 1]};
      const SplitScale scale(row_largest(largest_of(v)));
      const int i = pair_row + lane / 4 + 8 * half;
#pragma unroll
      for (int k = 0; k < 4; k += 2)
        store_split_pair(tiles.P + i * T::kLdP, pair_column + 4 * k + lane % 4 * 2, v[k] * scale.to,
                         v[k + 1] * scale.to);
      if (lane % 4 == 0) tiles.from_P[pair_column / 16][i] = scale.from * tiles.from_C[i];
    }
  }

  // y = (H C^T) 2^s_i.
  __device__ void multiply_state(const ChunkSteps& steps, float (&y)[kQ / 8][4]) const {
    const float* const largest = tiles.largest + 16 * warp + lane / 4;
    const SplitScale scales[2] = {SplitScale(largest[0]), SplitScale(largest[8])};
#pragma unroll
    for (int k = 0; k < kN; k += kSplitTerms) {
      float part[kQ / 8][4] = {};
#pragma unroll
      for (int m = k; m < k + kSplitTerms; m += 16) {
        const float (&a)[4] = state[m / 8], (&b)[4] = state[m / 8 + 1];
        const SplitLeft left = split_left({{a[0], a[1], b[0], b[1]}, {a[2], a[3], b[2], b[3]}}, scales);
        multiply_split<F::kExact, false>(part, left, tiles.C, T::kLdC, m);
      }
#pragma unroll
      for (int i = 0; i < kQ / 2; ++i)
        y[i / 4][i % 4] = k == 0 ? part[i / 4][i % 4] : y[i / 4][i % 4] + part[i / 4][i % 4];
    }
#pragma unroll
    for (int i = 0; i < kQ / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      y[i / 4][i % 4] *= scales[i % 4 / 2].from * (steps.from_start[token] * tiles.from_C[token]);
    }
  }

  // H after the chunk.
  __device__ void add_tokens(const float* x, const ChunkSteps& steps) {
    add_split_tokens<F, kQ>(state, steps.decay, x + 16 * warp, T::kLdX, steps.weight, tiles.B, T::kLdB,
                            tiles.from_B, 0);
    find_largest();
  }

  // y += X^T P^T + D x.
  __device__ void add_pairs(const float* x, const float (&D)[2], float (&y)[kQ / 8][4]) const {
#pragma unroll
    for (int k = 0; k < kQ; k += 16) {
      const auto terms = F::left_turned(x + k * T::kLdX + 16 * warp, T::kLdX);
      const SplitScale scales[2] = {SplitScale(row_largest(largest_of(terms.v[0]))),
                                    SplitScale(row_largest(largest_of(terms.v[1])))};
      const SplitLeft left = split_left(terms.v, scales);
#pragma unroll
      for (int tile = k / 8; tile < kQ / 8; tile += 2) {
        float part[2][4] = {};
        multiply_split<F::kExact, false>(part, left, tiles.P + 8 * tile * T::kLdP, T::kLdP, k);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float from = tiles.from_P[k / 16][8 * (tile + i / 4) + lane % 4 * 2 + i % 2];
          y[tile + i / 4][i % 4] += part[i / 4][i % 4] * (scales[i % 4 / 2].from * from);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) y[k / 8 + i % 4 / 2][i / 4 * 2 + i % 2] += D[i / 4] * terms.v[i / 4][i % 4];
    }
  }
};

template <class F, class Sizes>
using FwdProducts =
    std::conditional_t<FwdTiles<F, Sizes>::kSplit, SplitProducts<F, Sizes>, PlainProducts<F, Sizes>>;

}  // namespace mamba_ops::gpu

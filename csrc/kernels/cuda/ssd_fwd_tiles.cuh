// SSD forward, portable: what a launch is given, sizes and shared memory of a block (see ssd_fwd.cu).
#pragma once
#include "kernels/cuda/split.cuh"
#include "kernels/cuda/ssd_states.h"
#include "kernels/cuda/ssd_tile.cuh"

namespace mamba_ops::gpu {

struct FwdArgs {
  SsdFwd p;
  Sequences seqs;
  int64_t states;  // rows of states
  Rows x, z, y, B, C;
  SsdPieces pieces;
};

// Sizes by the bytes of a factor and the width that holds n; a block takes 99 KB of shared memory at most.
// kBlocks: of a multiprocessor.
template <int kBytes, int kN>
struct FwdSizes;
template <int N>
struct FwdSizes<2, N> {
  static constexpr int kQ = N <= 128 ? 64 : 32, kP = 64, kBlocks = N <= 128 ? 3 : 2;
};
template <int N>
struct FwdSizes<4, N> {
  static constexpr int kQ = 32, kP = 64, kBlocks = N <= 128 ? 3 : 2;
};
template <int N>
struct FwdSizes<8, N> {
  static constexpr int kQ = 16, kP = 32, kBlocks = 1;
};

template <class F, int kWidth>
struct FwdTiles : FwdSizes<sizeof(typename F::Element), kWidth> {
  using E = typename F::Element;
  using R = typename F::Real;
  using Sizes = FwdSizes<sizeof(E), kWidth>;
  using Sizes::kQ, Sizes::kP;
  static constexpr bool kSplit = std::is_same_v<E, float>;  // B, C and P: split.cuh
  static constexpr int kN = kWidth, kWarps = kP / 16, kThreads = 32 * kWarps;
  static constexpr int kStepsWarp = kWarps - kQ / 16;  // it has the fewest pairs
  static constexpr int kPadAlong = kSplit ? kSplitPad : F::kPadAlong;
  static constexpr int kPadAcross = kSplit ? kSplitPad : F::kPadAcross;
  static constexpr int kLdX = kP + F::kPadAcross, kLdP = kQ + kPadAlong;
  static constexpr int kLdB = kN + kPadAcross, kLdC = kN + kPadAlong;
  alignas(16) E B[kQ * kLdB];
  alignas(16) E C[kQ * kLdC];
  alignas(16) E x[2][kQ * kLdX];
  Steps<F, kQ> steps[2];
  struct {
    int64_t x, z, y, B, C;
  } first;  // where the row's first token lies
  alignas(16) E P[kQ * kLdP];
  // Factors of split rows; P's: of 16 of its terms, times that of C.
  alignas(16) R from_B[kSplit ? kQ : 1], from_C[kSplit ? kQ : 1], from_P[kSplit ? kQ / 16 : 1][kQ];
  alignas(16) E z[kQ * kLdX];  // allocated for z alone
  static constexpr int bytes(bool z) { return int(z ? sizeof(FwdTiles) : offsetof(FwdTiles, z)); }
};

}  // namespace mamba_ops::gpu

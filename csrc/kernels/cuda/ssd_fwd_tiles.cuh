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

// A stretch of tokens of one cell and one run.
struct Chunk {
  int64_t begin, cell_end;
  int tokens;           // 0: none
  bool enters, leaves;  // the state before it is to be fetched, the one after it to be kept
};

// Sizes by the bytes of a factor and the width that holds n; kBlocks: of a multiprocessor. kSmall: those that
// fit where a block has 99 KB of shared memory, where others do not.
template <int kBytes, int kN, bool kSmall>
struct FwdSizes;
template <int N, bool kSmall>
struct FwdSizes<2, N, kSmall> {
  static constexpr int kN = N, kQ = kSmall ? 32 : 64, kP = 64, kBlocks = N <= 128 ? 3 : 2;
};
template <int N>
struct FwdSizes<4, N, false> {
  static constexpr int kN = N, kQ = 32, kP = 64, kBlocks = N <= 128 ? 3 : 2;
};
template <int N>
struct FwdSizes<8, N, false> {
  static constexpr int kN = N, kQ = 16, kP = 32, kBlocks = 1;
};

template <class F, class Sizes>
struct FwdTiles : Sizes {
  using E = typename F::Element;
  using R = typename F::Real;
  using Sizes::kN, Sizes::kP, Sizes::kQ;
  static constexpr bool kSplit = std::is_same_v<E, float>;  // B, C and P: split.cuh
  static constexpr int kWarps = kP / 16, kThreads = 32 * kWarps;
  static constexpr int kTilesX = kSplit ? 1 : 2;
  static constexpr int kStepsWarp = kWarps - kQ / 16;  // it has the fewest pairs
  static constexpr int kPadAlong = kSplit ? kSplitPad : F::kPadAlong;
  static constexpr int kPadAcross = kSplit ? kSplitPad : F::kPadAcross;
  static constexpr int kLdX = kP + F::kPadAcross, kLdP = kQ + kPadAlong;
  static constexpr int kLdB = kN + kPadAcross, kLdC = kN + kPadAlong;
  alignas(16) E B[kQ * kLdB];
  alignas(16) E C[kQ * kLdC];
  alignas(16) E x[kTilesX][kQ * kLdX];
  Steps<F, kQ> steps[2];
  Chunk chunks[kSplit ? 2 : 1];
  struct Work {
    int row, head, piece, first_p, channels;
    int64_t begin, end;  // of the piece
    HeadParameters<R> parameters;
  } work;
  struct {
    int64_t x, z, y, B, C;
  } first;  // where the row's first token lies
  R D[kP];
  alignas(16) E P[kQ * kLdP];
  // Factors of split rows; P's: of 16 of its terms, times that of C.
  alignas(16) R from_B[kSplit ? kQ : 1], from_C[kSplit ? kQ : 1], from_P[kSplit ? kQ / 16 : 1][kQ];
  R largest[kSplit ? kP : 1];               // of a row of the state
  alignas(16) E z[kSplit ? 1 : kQ * kLdX];  // allocated for z alone
  static constexpr int bytes(bool z) { return int(z ? sizeof(FwdTiles) : offsetof(FwdTiles, z)); }
};

}  // namespace mamba_ops::gpu

// SSD backward, portable: what a launch is given, sizes and shared memory of a block (see ssd_bwd.cu).
#pragma once
#include "kernels/cuda/ssd.h"
#include "kernels/cuda/ssd_states.h"
#include "kernels/cuda/ssd_tile.cuh"

namespace mamba_ops::gpu {

struct BwdArgs {
  SsdBwd p;  // p.fwd.dims.heads: of a block
  Sequences seqs;
  int64_t states;  // rows of states
  Rows x, z, dy, dx, dz, B, C, dB, dC;
  Rows states_in, dstates_out;       // rows of n values
  int64_t blocks, share, per_share;  // of heads: blocks in all, heads that share B and C, their blocks
  int64_t q, cells;                  // tokens of a cell, cells of a row
  int64_t first_cell, count;         // of this launch
  int64_t slots;
  const void* before[2];  // (b, slots, h, p, padded n): states before the cells, gradients after
  void* sums;             // (b, cells, h, 2 + D's width): dA, ddt_bias, dD
  void* partial_BC;       // (head blocks, b, l, 2, padded n); null: one block has all heads of a group

  __host__ __device__ int64_t sums_width() const {
    return 2 + (p.dD.data ? p.fwd.dims.D_per_channel ? p.fwd.dims.p : 1 : 0);
  }
};

// Sizes by the bytes of a factor and the width that holds n. kGroups warps share 16 tokens. kSmall: those
// that fit where a block has 99 KB of shared memory; float64 has no others (n > 128 does not fit there).
template <int kBytes, int kN, bool kSmall>
struct BwdSizes;
template <int N>
struct BwdSizes<2, N, false> {
  static constexpr int kN = N, kQ = 64, kP = N <= 128 ? 64 : 32, kGroups = 4, kStages = N <= 128 ? 2 : 1;
};
template <int N>
struct BwdSizes<2, N, true> {
  static constexpr int kN = N, kQ = N <= 128 ? 64 : 32, kP = N <= 64 ? 64 : 32, kGroups = 4, kStages = 1;
};
template <int N>
struct BwdSizes<4, N, false> {
  static constexpr int kN = N, kQ = N <= 128 ? 64 : 32, kP = 32, kGroups = 4, kStages = 1;
};
template <int N>
struct BwdSizes<4, N, true> {
  static constexpr int kN = N, kQ = N <= 128 ? 32 : 16, kP = kQ, kGroups = kQ / 8, kStages = 1;
};
template <int N>
struct BwdSizes<8, N, false> {
  static constexpr int kN = N, kQ = 16, kP = 16, kGroups = 2, kStages = 1;
};

template <class F, class Sizes>
struct BwdTiles : Sizes {
  using E = typename F::Element;
  using R = typename F::Real;
  using Sizes::kQ, Sizes::kP, Sizes::kN, Sizes::kGroups, Sizes::kStages;
  static constexpr int kRows = kQ / 16, kWarps = kRows * kGroups, kThreads = 32 * kWarps;
  static constexpr int kParts = kThreads / kP;
  static constexpr int kLdN = kN + F::kPadAlong, kLdS = kN + F::kPadAcross;
  static constexpr int kLdP = kP + F::kPadAlong, kLdQ = kQ + F::kPadAlong;
  static constexpr int kHeads = kWarps < 4 ? kWarps : 4;  // whose steps are made at once
  struct Stage {
    alignas(16) E x[kQ * kLdP];
    alignas(16) E go[kQ * kLdP];
    alignas(16) E H[kP * kLdS];
    alignas(16) E G[kP * kLdS];
    R skip[kP];  // D
  };
  struct alignas(16) Head {
    typename F::Sum s[kQ];
    R delta[kQ], from_start[kQ], to_end[kQ];
    R decay;
    R sums[4][kQ];  // over its channels, for every token: W (as i less as j), r, k, x . dX
    R D[kP];        // go . x for every channel of a slice
    R v;            // <H, G>
  };
  alignas(16) E B[kQ * kLdN];
  alignas(16) E C[kQ * kLdN];
  Stage stage[kStages];
  alignas(16) E M[kQ * kLdQ];  // (j, i), j <= i; before that z; at the end dCB
  Head heads[kHeads];
  R W_of_j[kGroups][kQ], W_of_i[kRows][kQ];  // sums of W over i > j, over j < i
  R r[kGroups][kQ], k[kGroups][kQ], dot[kGroups][kQ];
  R D[kParts][kP];
  R v[kWarps];
  static_assert(kLdQ >= kLdP && kParts >= kRows);
};

}  // namespace mamba_ops::gpu

// Selective scan (Mamba-1), per channel c and state i:
//   delta_t = softplus?(delta + bias);  a_t = exp(delta_t A);  h_t = a_t h_{t-1} + delta_t B_t u_t
//   o_t = k Re(sum_i C_t h_t) + D u_t;  y = o silu(z) or o          k = 1, or 2 where A, B, C, h are complex
#pragma once
#include "kernels/view.h"

namespace mamba_ops {

// The state that enters every token at a multiple of this is kept for the backward: on the CPU, and on CUDA.
inline constexpr int64_t kScanCheckpoint = 128;
inline constexpr int64_t kScanCheckpointCuda = 64;
inline constexpr int64_t kScanMaxState = 256;
inline constexpr int64_t kScanChannels = 64;       // of a unit of work
inline constexpr int64_t kScanReduceTokens = 256;  // of a unit of the second pass of the reductions

struct ScanDims {
  int64_t b, d, l, n;
  int64_t groups_B, groups_C;  // of channels; 1 where constant
  bool complex, softplus;
  bool constant_B, constant_C;  // (d, n) instead of (b, g, n, l)
  int64_t checkpoint = kScanCheckpoint;

  int64_t parts() const { return complex ? 2 : 1; }  // real numbers in one state
  int64_t sharing() const {
    return common_divisor(d / groups_B, d / groups_C);
  }  // consecutive channels that share B and C
  int64_t blocks_per_share() const { return (sharing() + kScanChannels - 1) / kScanChannels; }
  int64_t channel_blocks() const { return d == 0 ? 0 : d / sharing() * blocks_per_share(); }
  int64_t reduce_units() const { return 1 + b * ((l + kScanReduceTokens - 1) / kScanReduceTokens); }
};

// State rows are (rows, d, n, parts) in the arithmetic type, contiguous; null: absent.
struct ScanFwd {
  ScanDims dims;
  View u, delta, z, y;  // (b, d, l)
  View A, B, C;         // (d, n); (b, g, n, l) or (d, n)
  View D, delta_bias;   // (d)
  const void* states_in;
  void* states_out;
  void*
      checkpoints;  // (b, l / checkpoint, parts, n, d): states that enter tokens checkpoint, 2 checkpoint ...
  void* delta_sums;  // (pieces, d): sum of delta_t over each piece, for the segment form; else null
  Pieces pieces;

  int64_t units() const { return pieces.groups * dims.channel_blocks(); }
};

struct ScanBwd {
  ScanFwd fwd;              // y and states_out are absent
  View dy, du, ddelta, dz;  // (b, d, l)
  View dA, dB, dC;          // as A, B, C
  View dD, ddelta_bias;     // (d)
  const void* dstates_out;  // gradient of the states that leave
  void* dstates_in;         // gradient of the states that enter
  // Partial sums in the arithmetic type, reduced in a second pass in fixed order.
  void* partial_A;   // (piece groups, parts, n, padded d), then the same for a constant B, a constant C
  void* partial_d;   // (piece groups, 2, padded d): dD, ddelta_bias
  void* partial_BC;  // (channel blocks, b, l, 2, parts, padded n): dB, dC
};

}  // namespace mamba_ops

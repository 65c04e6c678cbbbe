// SSD (Mamba-2), per head:  delta = clamp(softplus?(dt + bias));  S_t = exp(delta_t A) S_{t-1} + delta_t x_t
// B_t^T  (p x n)
//   o_t = S_t C_t + D x_t;  y = o silu(z) or o.   Computed chunk by chunk:
//   s = cumsum(delta A) in the chunk, T = s_last, X_j = delta_j x_j, L_ij = exp(s_i - s_j) for i >= j else 0
//   M = (C B^T) o L;  o_i = sum_j M_ij X_j + e^{s_i} H C_i + D x_i;  H <- e^T H + sum_j e^{T - s_j} X_j B_j^T
#pragma once
#include "kernels/view.h"

namespace mamba_ops {

inline constexpr int64_t kSsdChunk = 64;                          // the chunk_size of choice
inline constexpr int64_t kSsdMaxChunk = 256, kSsdMaxWidth = 256;  // of a chunk; of p and n
// Chunks whose states the backward holds at once; longer sequences are run forward once more to find where
// each such span begins.
inline constexpr int64_t kSsdSpan = 32;
inline constexpr int64_t kSsdReduceTokens = 256;  // of a unit of the second pass of the reductions

struct SsdDims {
  int64_t b, l, h, p, n;
  int64_t groups_B, groups_C;
  int64_t q;      // tokens in a chunk
  int64_t heads;  // of a unit of work: they share B and C
  bool softplus, D_per_channel;
  bool tf32;  // on CUDA: factors of products in float32 may be rounded to TF32
  double dt_min, dt_max;

  int64_t sharing() const {
    return common_divisor(h / groups_B, h / groups_C);
  }  // consecutive heads that share B and C
  int64_t blocks_per_share() const { return (sharing() + heads - 1) / heads; }
  int64_t head_blocks() const { return h == 0 ? 0 : h / sharing() * blocks_per_share(); }
  int64_t reduce_units() const { return 1 + b * ((l + kSsdReduceTokens - 1) / kSsdReduceTokens); }
};

// State rows are (rows, h, p, n) in the arithmetic type, contiguous; null: absent.
struct SsdFwd {
  SsdDims dims;
  View x, z, y;     // (b, l, h, p)
  View dt;          // (b, l, h)
  View A, dt_bias;  // (h)
  View B, C;        // (b, l, g, n)
  View D;           // (h) or (h, p)
  const void* states_in;
  void* states_out;
  void* log_decays;  // (pieces, h): sum of delta A over each piece, for the segment form; else null
  Pieces pieces;

  int64_t units() const { return pieces.groups * dims.head_blocks(); }
};

struct SsdBwd {
  SsdFwd fwd;         // y and states_out are absent
  View dy, dx, dz;    // (b, l, h, p)
  View ddt;           // (b, l, h)
  View dA, ddt_bias;  // (h)
  View dB, dC;        // (b, l, g, n)
  View dD;            // (h) or (h, p)
  const void* dstates_out;
  void* dstates_in;
  // Partial sums in the arithmetic type, reduced in a second pass in fixed order.
  void* partial_BC;  // (head blocks, b, l, 2, padded n): dB, dC
  void* partial_h;   // (piece groups, h, 2 + padded p): dA, ddt_bias, dD per channel
};

}  // namespace mamba_ops

// States of the SSD between pieces of the sequences, without the outputs: what the backward starts its cells
// from, and the forward its pieces where it splits sequences.
#pragma once
#include "kernels/cuda/sequences.h"
#include "kernels/ssd.h"

namespace mamba_ops {

// Pieces of `cells` cells of `q` tokens, beginning with token `begin` of every row, `count` of them. The
// arrays are (b, count, h, p, padded n), (b, count, h); of the direction that is not wanted null.
struct SsdPieces {
  int64_t q, cells, begin, count;
  void* states[2];  // before every piece; the gradients of those after it
  void* decays[2];  // arithmetic type: work space
  bool wide;        // states in the arithmetic type, else in that of the factors
  // In the arithmetic type, (h, p, padded n) for every row, rows `carry_stride` values apart; null: zeros.
  // The state before the first piece, the gradient of the state after the last one; and where that of the
  // state before the first piece goes, or null.
  const void* carry_in[2];
  int64_t carry_stride[2];
  void* carry_out;
};

inline constexpr int64_t kSsdPadN = 8;  // of rows of state arrays
inline constexpr int64_t ssd_padded_n(const SsdDims& dims) {
  return (dims.n + kSsdPadN - 1) / kSsdPadN * kSsdPadN;
}

// Two launches. p.dy, p.dstates_out: for the gradients.
const char* ssd_states(const SsdBwd& p, const Sequences& seqs, const SsdPieces& pieces, void* stream);

}  // namespace mamba_ops

// States of the SSD between cells and pieces of the sequences, without the outputs: what the backward starts
// its cells from, and the forward its pieces where it splits sequences.
#pragma once
#include "kernels/cuda/sequences.h"
#include "kernels/ssd.h"

namespace mamba_ops {

inline constexpr int64_t kSsdPadN = 8;  // of rows of state arrays
inline constexpr int64_t ssd_padded_n(const SsdDims& dims) {
  return (dims.n + kSsdPadN - 1) / kSsdPadN * kSsdPadN;
}

// Direction 0: H, from the left; 1: G, the gradients, from the right.

// Rows cut into `count` pieces of `cells` cells of `q` tokens. What a piece makes of nothing, and what it
// leaves of the state that enters it: ends (b, count, h, p, padded n), decays (b, count, h), both in the
// arithmetic type; of the direction that is not wanted null. Those of the last piece of a direction do not
// exist.
struct SsdPieces {
  int64_t q, cells, count;
  void* ends[2];
  void* decays[2];

  int64_t heads(const SsdDims& dims) const { return dims.b * count * dims.h; }
  int64_t size(const SsdDims& dims) const { return heads(dims) * dims.p * ssd_padded_n(dims); }
};

// Finds the ends, where there are pieces. p.dy, p.dstates_out: for direction 1. One launch.
const char* ssd_ends(const SsdBwd& p, const Sequences& seqs, const SsdPieces& pieces, void* stream);

// H before each of the cells of pieces [first, first + some), and G after it: both (b, cells, h, p, padded n)
// in the type of the factors. One launch.
const char* ssd_states(const SsdBwd& p, const Sequences& seqs, const SsdPieces& pieces, int64_t first,
                       int64_t some, void* H, void* G, void* stream);

}  // namespace mamba_ops

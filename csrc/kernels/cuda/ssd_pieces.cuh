// What enters a piece: the ends of the pieces before it, one after another (see ssd_states.h).
#pragma once
#include "kernels/cuda/ssd_states.h"
#include "kernels/cuda/ssd_tile.cuh"

namespace mamba_ops::gpu {

// state (16 rows from p on by 8 kTiles columns from n on) <- the same after one more piece.
template <int kTiles, class R>
__device__ inline void pass_piece(R (&state)[kTiles][4], const SsdDims& dims, const SsdPieces& pieces,
                                  bool reverse, int64_t row, int64_t piece, int64_t head, int64_t p,
                                  int64_t n, int64_t rows) {
  const int64_t slot = (row * pieces.count + piece) * dims.h + head, ldn = ssd_padded_n(dims);
  const R* end =
      static_cast<const R*>(reverse ? pieces.ends[1] : pieces.ends[0]) + (slot * dims.p + p) * ldn + n;
  scale(state, static_cast<const R*>(reverse ? pieces.decays[1] : pieces.decays[0])[slot]);
  for_state(state, rows, dims.n - n, [&](R& v, int r, int c) { v += end[r * ldn + c]; });
}

// The most pieces of so many cells: more would pass more ends than they have cells.
inline int64_t most_pieces(int64_t cells) {
  int64_t pieces = 1;
  while ((pieces + 1) * (pieces + 1) <= cells) ++pieces;
  return pieces;
}

}  // namespace mamba_ops::gpu

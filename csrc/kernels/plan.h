// How work is cut: sequences into pieces, pieces into groups. Everything here follows from the sizes of a call alone,
// never from the number of threads, so that results are bitwise the same on any machine of one instruction set.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/view.h"

namespace mamba_ops {

// One sequence: tokens [begin, end) of a batch row, and its rows in the initial and final states (-1: none).
struct Run {
  int64_t row, begin, end, state_in, state_out;
};

// b rows of l tokens, one sequence each.
std::vector<Run> runs_of_rows(int64_t b, int64_t l);
// Sequences between the neighbours of a row where seq_idx differs; the initial state enters the first sequence of a
// row, and the final state is that of the last one. seq_idx: strides in elements of T.
template <class T>
std::vector<Run> runs_of_seq_idx(const T* seq_idx, int64_t stride_b, int64_t stride_l, int64_t b, int64_t l);
// s sequences packed in row 0: offsets 0 = cu[0] <= ... <= cu[s] = l.
template <class T>
std::vector<Run> runs_of_cu_seqlens(const T* cu_seqlens, int64_t stride, int64_t s);

struct PieceList {
  std::vector<Piece> pieces;
  std::vector<int64_t> group;

  Pieces view() const { return {pieces.data(), group.data(), int64_t(group.size()) - 1}; }
};

// Cuts every run at the multiples of `max_tokens` of its row and deals the pieces, in order, into at most `max_groups` groups
// of about equally many tokens.
PieceList cut(const std::vector<Run>& runs, int64_t max_tokens, int64_t max_groups);

}  // namespace mamba_ops

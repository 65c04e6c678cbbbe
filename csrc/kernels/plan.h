// How work is cut: sequences into pieces, pieces into groups. Everything here follows from the sizes of a
// call alone, never from the number of threads, so that results are bitwise the same on any machine of one
// instruction set.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/selective_scan.h"
#include "kernels/ssd.h"
#include "kernels/view.h"

namespace mamba_ops {

// One sequence: tokens [begin, end) of a batch row, and its rows in the initial and final states (-1: none).
struct Run {
  int64_t row, begin, end, state_in, state_out;
};

// b rows of l tokens, one sequence each.
std::vector<Run> runs_of_rows(int64_t b, int64_t l);
// Sequences between the neighbours of a row where seq_idx differs; the initial state enters the first
// sequence of a row, and the final state is that of the last one. seq_idx: strides in elements of T.
template <class T>
std::vector<Run> runs_of_seq_idx(const T* seq_idx, int64_t stride_b, int64_t stride_l, int64_t b, int64_t l);
// s sequences packed in row 0: offsets 0 = cu[0] <= ... <= cu[s] = l.
template <class T>
std::vector<Run> runs_of_cu_seqlens(const T* cu_seqlens, int64_t stride, int64_t s);

inline constexpr int64_t kMaxGroups = 16;  // of pieces: so many partial sums over tokens

struct PieceList {
  std::vector<Piece> pieces;
  std::vector<int64_t> group;

  Pieces view() const { return {pieces.data(), group.data(), int64_t(group.size()) - 1}; }
};

// Cuts every run at the multiples of `max_tokens` of its row and deals the pieces, in order, into at most
// `max_groups` groups of about equally many tokens. Every piece names the state rows of its run.
PieceList cut(const std::vector<Run>& runs, int64_t max_tokens, int64_t max_groups);

// The sequences of a recurrence, each a piece; or, where those make too few units of work, cut into segments.
// Segments take three phases: every piece is run from a zero state, the true states between pieces follow
// from their ends, then every piece is run on its own. The gradients likewise, in reverse.
class Segments {
 public:
  Segments(const std::vector<Run>& runs, const ScanDims& dims);
  // Also settles dims.heads, the heads of a unit.
  Segments(const std::vector<Run>& runs, SsdDims& dims);

  bool split() const { return split_; }
  int64_t count() const { return int64_t(list_.pieces.size()); }
  const PieceList& list() const { return list_; }

  // The pieces of the first phase: from nothing to a row of their own.
  PieceList alone(bool reverse) const;
  // The pieces of the third phase: piece k enters from row k of `entering` (in reverse: its gradient does).
  // Rows that no piece leads to are set from `states`, (rows, size) values, zero where absent.
  template <class R>
  PieceList joined(R* entering, int64_t size, const void* states, bool reverse) const;

 private:
  struct Grain {
    int64_t units_per_group;  // units of work that every group of pieces makes
    int64_t enough;           // units that keep the threads of a large machine busy
    int64_t min_tokens;       // of a segment
    int64_t grid;             // segments end at its multiples
  };
  Segments(const std::vector<Run>& runs, int64_t l, const Grain& grain);

  PieceList list_;
  bool split_ = false;
};

}  // namespace mamba_ops

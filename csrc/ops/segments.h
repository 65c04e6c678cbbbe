// The three-phase form over segments, for long sequences with too few channels or heads to keep the threads busy: every
// piece is run from a zero state, the true states between pieces follow from their ends, then every piece is run on its own.
// Whether a call takes it follows from its sizes alone.
#pragma once
#include <algorithm>

#include "ops/dispatch.h"

namespace mamba_ops {

struct Segments {
  PieceList pieces;
  bool split = false;

  // Cuts runs into at most max_groups groups of whole runs; where that makes fewer than `enough` units of `per_group` each,
  // into segments of at least min_tokens, a multiple of `grid`.
  Segments(const std::vector<Run>& runs, int64_t l, int64_t per_group, int64_t max_groups, int64_t enough, int64_t min_tokens,
           int64_t grid)
      : pieces(cut(runs, INT64_MAX, max_groups)) {
    const int64_t units = (int64_t(pieces.group.size()) - 1) * per_group;
    if (units == 0 || units >= enough) return;
    const int64_t cuts = (enough + units - 1) / units;
    const int64_t tokens = std::max(min_tokens, (l / cuts + grid - 1) / grid * grid);
    PieceList shorter = cut(runs, tokens, max_groups);
    split = shorter.pieces.size() > pieces.pieces.size();
    if (split) pieces = std::move(shorter);
  }

  int64_t count() const { return int64_t(pieces.pieces.size()); }

  // The pieces for the first phase: from nothing, to a row of their own.
  PieceList alone(bool reverse) const {
    PieceList list = pieces;
    for (int64_t k = 0; k < count(); ++k) {
      list.pieces[k].state_in = reverse ? k : -1;
      list.pieces[k].state_out = reverse ? -1 : k;
    }
    return list;
  }

  // The pieces for the third phase, each entered from its row of `entering`; the rows of those that no piece comes before (after,
  // with reverse) are set from `states`, zero where absent.
  template <class R>
  PieceList joined(const Tensor& entering, const void* states, bool reverse) const {
    PieceList list = pieces;
    const int64_t size = count() ? entering.numel() / count() : 0;
    for (int64_t k = 0; k < count(); ++k) {
      Piece& piece = list.pieces[k];
      int64_t& from = reverse ? piece.state_out : piece.state_in;
      if (reverse ? piece.end == piece.run_end : piece.begin == piece.run_begin) {
        R* to = static_cast<R*>(entering.data_ptr()) + k * size;
        if (states && from >= 0)
          std::copy_n(static_cast<const R*>(states) + from * size, size, to);
        else
          std::fill_n(to, size, R(0));
      }
      from = k;
    }
    return list;
  }
};

}  // namespace mamba_ops

#include "kernels/plan.h"

#include <algorithm>

namespace mamba_ops {

std::vector<Run> runs_of_rows(int64_t b, int64_t l) {
  std::vector<Run> runs;
  runs.reserve(b);
  for (int64_t row = 0; row < b; ++row) runs.push_back({row, 0, l, row, row});
  return runs;
}

template <class T>
std::vector<Run> runs_of_seq_idx(const T* seq_idx, int64_t stride_b, int64_t stride_l, int64_t b, int64_t l) {
  std::vector<Run> runs;
  for (int64_t row = 0; row < b; ++row) {
    const T* id = seq_idx + row * stride_b;
    int64_t begin = 0;
    for (int64_t t = 1; t <= l; ++t)
      if (t == l || id[t * stride_l] != id[(t - 1) * stride_l]) {
        runs.push_back({row, begin, t, begin == 0 ? row : -1, t == l ? row : -1});
        begin = t;
      }
    if (l == 0) runs.push_back({row, 0, 0, row, row});
  }
  return runs;
}

template <class T>
std::vector<Run> runs_of_cu_seqlens(const T* cu_seqlens, int64_t stride, int64_t s) {
  std::vector<Run> runs;
  runs.reserve(s);
  for (int64_t k = 0; k < s; ++k)
    runs.push_back({0, int64_t(cu_seqlens[k * stride]), int64_t(cu_seqlens[(k + 1) * stride]), k, k});
  return runs;
}

template std::vector<Run> runs_of_seq_idx(const int32_t*, int64_t, int64_t, int64_t, int64_t);
template std::vector<Run> runs_of_seq_idx(const int64_t*, int64_t, int64_t, int64_t, int64_t);
template std::vector<Run> runs_of_cu_seqlens(const int32_t*, int64_t, int64_t);
template std::vector<Run> runs_of_cu_seqlens(const int64_t*, int64_t, int64_t);

PieceList cut(const std::vector<Run>& runs, int64_t max_tokens, int64_t max_groups) {
  PieceList list;
  int64_t total = 0;
  for (const Run& run : runs) {
    int64_t begin = run.begin;
    do {
      const int64_t end = std::min(run.end, (begin / max_tokens + 1) * max_tokens);
      list.pieces.push_back({run.row, begin, end, run.begin, run.end, run.state_in, run.state_out});
      begin = end;
    } while (begin < run.end);
    total += run.end - run.begin;
  }
  const int64_t count = int64_t(list.pieces.size());
  const int64_t groups = std::min(max_groups, count);
  list.group.push_back(0);
  int64_t seen = 0;
  for (int64_t i = 0; i < count; ++i) {
    seen += list.pieces[i].end - list.pieces[i].begin;
    const int64_t made = int64_t(list.group.size());  // this group's number, from 1
    if (i + 1 == count || (made < groups && seen * groups >= total * made)) list.group.push_back(i + 1);
  }
  return list;
}

Segments::Segments(const std::vector<Run>& runs, const ScanDims& dims)
    : Segments(runs, dims.l, Grain{dims.channel_blocks(), 16, 1024, kScanCheckpoint}) {}

namespace {

constexpr int64_t kSsdUnits = 8, kSsdMaxHeads = 8;

// Even blocks of heads, as large as leaves enough units: heads of a unit share C B^T.
int64_t heads_of_unit(const SsdDims& dims, int64_t runs) {
  if (dims.h == 0) return 1;
  const int64_t share = dims.sharing(), rows = std::min(runs, kMaxGroups);
  const int64_t most = std::clamp<int64_t>(dims.h * rows / kSsdUnits, 1, std::min(share, kSsdMaxHeads));
  const int64_t blocks = (share + most - 1) / most;
  return (share + blocks - 1) / blocks;
}

}  // namespace

Segments::Segments(const std::vector<Run>& runs, SsdDims& dims)
    : Segments(runs, dims.l, [&] {
        dims.heads = heads_of_unit(dims, int64_t(runs.size()));
        return Grain{dims.head_blocks(), kSsdUnits, 1024, dims.q};
      }()) {}

Segments::Segments(const std::vector<Run>& runs, int64_t l, const Grain& grain)
    : list_(cut(runs, std::max<int64_t>(l, 1), kMaxGroups)) {
  const int64_t units = (int64_t(list_.group.size()) - 1) * grain.units_per_group;
  if (units == 0 || units >= grain.enough) return;
  const int64_t cuts = (grain.enough + units - 1) / units;
  const int64_t tokens = std::max(grain.min_tokens, l / cuts);
  PieceList shorter = cut(runs, (tokens + grain.grid - 1) / grain.grid * grain.grid, kMaxGroups);
  split_ = shorter.pieces.size() > list_.pieces.size();
  if (!split_) return;
  list_ = std::move(shorter);
  for (Piece& piece : list_.pieces) {
    if (piece.begin > piece.run_begin) piece.state_in = -1;
    if (piece.end < piece.run_end) piece.state_out = -1;
  }
}

PieceList Segments::alone(bool reverse) const {
  PieceList list = list_;
  for (int64_t k = 0; k < count(); ++k) {
    list.pieces[k].state_in = reverse ? k : -1;
    list.pieces[k].state_out = reverse ? -1 : k;
  }
  return list;
}

template <class R>
PieceList Segments::joined(R* entering, int64_t size, const void* states, bool reverse) const {
  PieceList list = list_;
  for (int64_t k = 0; k < count(); ++k) {
    Piece& piece = list.pieces[k];
    int64_t& row = reverse ? piece.state_out : piece.state_in;
    if (reverse ? piece.end == piece.run_end : piece.begin == piece.run_begin) {
      if (states && row >= 0)
        std::copy_n(static_cast<const R*>(states) + row * size, size, entering + k * size);
      else
        std::fill_n(entering + k * size, size, R(0));
    }
    row = k;
  }
  return list;
}
template PieceList Segments::joined(float*, int64_t, const void*, bool) const;
template PieceList Segments::joined(double*, int64_t, const void*, bool) const;

}  // namespace mamba_ops

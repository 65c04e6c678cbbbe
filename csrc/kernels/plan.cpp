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
      list.pieces.push_back({run.row, begin, end, run.begin, run.end, begin == run.begin ? run.state_in : -1,
                             end == run.end ? run.state_out : -1});
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

}  // namespace mamba_ops

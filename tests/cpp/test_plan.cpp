// How work is cut: every token exactly once, in order, whatever the sequences; the state rows that pieces
// name.
#include "tensor.h"

namespace mamba_ops {

namespace {

// What holds for every list of pieces of these runs: pieces follow their run in order, no token is left out
// or doubled, none crosses a multiple of max_tokens, groups are consecutive and none is empty.
void check_pieces(const PieceList& list, const std::vector<Run>& runs, int64_t max_tokens,
                  int64_t max_groups) {
  size_t k = 0;
  int64_t wrong = 0;
  for (const Run& run : runs) {
    int64_t at = run.begin;
    do {
      REQUIRE(k < list.pieces.size());
      const Piece& piece = list.pieces[k++];
      wrong += piece.row != run.row || piece.run_begin != run.begin || piece.run_end != run.end;
      wrong += piece.begin != at || piece.end < at || piece.end > run.end;
      wrong += piece.end == piece.begin && run.begin != run.end;
      wrong += piece.end > piece.begin && piece.begin / max_tokens != (piece.end - 1) / max_tokens;
      wrong += piece.end < run.end && piece.end % max_tokens != 0;
      at = piece.end;
    } while (at < run.end && k < list.pieces.size());
    wrong += at != run.end;
  }
  CHECK(wrong == 0);
  CHECK(k == list.pieces.size());
  REQUIRE(!list.group.empty());
  CHECK(list.group.front() == 0);
  CHECK(list.group.back() == int64_t(list.pieces.size()));
  CHECK(int64_t(list.group.size()) - 1 <= max_groups);
  for (size_t g = 1; g < list.group.size(); ++g) CHECK(list.group[g] > list.group[g - 1]);
}

ScanDims scan_dims(int64_t b, int64_t d, int64_t l) {
  return {.b = b,
          .d = d,
          .l = l,
          .n = 16,
          .groups_B = 1,
          .groups_C = 1,
          .complex = false,
          .softplus = true,
          .constant_B = false,
          .constant_C = false};
}

SsdDims ssd_dims(int64_t b, int64_t l, int64_t h, int64_t g = 1) {
  return {.b = b,
          .l = l,
          .h = h,
          .p = 64,
          .n = 128,
          .groups_B = g,
          .groups_C = g,
          .q = kSsdChunk,
          .heads = 0,
          .softplus = true,
          .D_per_channel = false,
          .dt_min = 0,
          .dt_max = 1};
}

std::vector<Run> packed(const std::vector<int32_t>& cu_seqlens) {
  return runs_of_cu_seqlens(cu_seqlens.data(), 1, int64_t(cu_seqlens.size()) - 1);
}

}  // namespace

TEST_CASE("runs of rows") {
  const std::vector<Run> runs = runs_of_rows(3, 5);
  REQUIRE(runs.size() == 3);
  for (int64_t row = 0; row < 3; ++row) {
    CHECK(runs[row].row == row);
    CHECK(runs[row].begin == 0);
    CHECK(runs[row].end == 5);
    CHECK(runs[row].state_in == row);
    CHECK(runs[row].state_out == row);
  }
  CHECK(runs_of_rows(0, 5).empty());
}

TEST_CASE("runs of seq_idx: ids may return, the ends of a row own the states") {
  const int64_t ids[2][6] = {{7, 7, -1, 7, 7, 7}, {3, 3, 3, 3, 3, 3}};
  const std::vector<Run> runs = runs_of_seq_idx(&ids[0][0], 6, 1, 2, 6);
  const std::vector<std::array<int64_t, 5>> want = {
      {0, 0, 2, 0, -1}, {0, 2, 3, -1, -1}, {0, 3, 6, -1, 0}, {1, 0, 6, 1, 1}};
  REQUIRE(runs.size() == want.size());
  for (size_t i = 0; i < want.size(); ++i)
    CHECK(std::array{runs[i].row, runs[i].begin, runs[i].end, runs[i].state_in, runs[i].state_out} ==
          want[i]);
  // The same ids, read by their strides.
  int32_t strided[6][2][3] = {};
  for (int t = 0; t < 6; ++t)
    for (int row = 0; row < 2; ++row) strided[t][row][0] = int32_t(ids[row][t]);
  CHECK(runs_of_seq_idx(&strided[0][0][0], 3, 6, 2, 6).size() == want.size());
  CHECK(runs_of_seq_idx(&strided[0][0][0], 3, 6, 2, 0).size() == 2);  // rows without tokens keep their states
}

TEST_CASE("runs of cu_seqlens, with empty sequences") {
  const std::vector<Run> runs = packed({0, 0, 4, 4, 9, 9});
  REQUIRE(runs.size() == 5);
  int64_t at = 0;
  for (int64_t k = 0; k < 5; ++k) {
    CHECK(runs[k].row == 0);
    CHECK(runs[k].begin == at);
    CHECK(runs[k].state_in == k);
    CHECK(runs[k].state_out == k);
    at = runs[k].end;
  }
  CHECK(at == 9);
}

TEST_CASE("cut: every token once, every sequence a piece") {
  std::mt19937 random(1);
  for (int trial = 0; trial < 300; ++trial) {
    const int64_t l = random() % 3000, s = 1 + random() % 40, max_tokens = 1 + random() % 1500,
                  max_groups = 1 + random() % 20;
    std::vector<int32_t> ends = {0, int32_t(l)};
    for (int64_t k = 1; k < s; ++k) ends.push_back(int32_t(l ? random() % (l + 1) : 0));
    std::sort(ends.begin(), ends.end());
    CAPTURE(trial, l, max_tokens, max_groups);
    const std::vector<Run> runs = packed(ends);
    const PieceList list = cut(runs, max_tokens, max_groups);
    check_pieces(list, runs, max_tokens, max_groups);
    for (const Piece& piece : list.pieces) {
      CHECK(piece.state_in == runs[piece.state_in].state_in);
      CHECK(piece.begin >= runs[piece.state_in].begin);
      CHECK(piece.end <= runs[piece.state_out].end);
    }
  }
}

TEST_CASE("cut: groups are about even") {
  const std::vector<Run> runs = runs_of_rows(1, 64 * 100);
  const PieceList list = cut(runs, 100, 16);
  REQUIRE(list.group.size() == 17);
  for (size_t g = 1; g < 17; ++g) CHECK(list.group[g] - list.group[g - 1] == 4);
  CHECK(cut({}, 10, 16).pieces.empty());
  CHECK(cut({}, 10, 16).view().groups == 0);
}

TEST_CASE("segments: only where sequences make too few units, on the grid, the same for any machine") {
  const int64_t l = GENERATE(1, 1000, 5000, 65537);
  const int64_t d = GENERATE(1, 64, 5000);
  CAPTURE(l, d);
  const std::vector<Run> runs = runs_of_rows(1, l);
  const Segments segments(runs, scan_dims(1, d, l));
  CHECK(segments.split() == (segments.count() > 1));
  if (l <= 1000 || d == 5000) CHECK(!segments.split());
  if (l >= 5000 && d <= 64) CHECK(segments.count() >= 4);
  int64_t at = 0;
  for (const Piece& piece : segments.list().pieces) {
    CHECK(piece.begin == at);
    at = piece.end;
    if (piece.end < l) CHECK(piece.end % kScanCheckpoint == 0);
    CHECK(piece.state_in == (piece.begin == 0 ? 0 : -1));
    CHECK(piece.state_out == (piece.end == l ? 0 : -1));
  }
  CHECK(at == l);
}

TEST_CASE("segments of an SSD settle the heads of a unit") {
  const int64_t h = GENERATE(1, 3, 24, 80), g = GENERATE(1, 1, 8), l = GENERATE(0, 1, 200, 8000);
  if (h % g != 0) return;
  CAPTURE(h, g, l);
  SsdDims dims = ssd_dims(1, l, h, g);
  const Segments segments(runs_of_rows(1, l), dims);
  CHECK(dims.heads >= 1);
  CHECK(dims.heads <= h / g);
  CHECK(dims.head_blocks() * dims.heads >= h);
  for (const Piece& piece : segments.list().pieces)
    if (piece.end < l) CHECK(piece.end % dims.q == 0);
}

TEST_CASE("segments join: every piece enters from its own row, runs from their initial states") {
  const std::vector<Run> runs = packed({0, 3000, 3000, 7000});
  const Segments segments(runs, scan_dims(1, 2, 7000));
  REQUIRE(segments.split());
  const int64_t count = segments.count(), size = 4;
  const bool reverse = GENERATE(false, true);
  CAPTURE(reverse);
  std::vector<float> states(3 * size), entering(count * size, -1);
  for (size_t i = 0; i < states.size(); ++i) states[i] = float(i);
  const PieceList alone = segments.alone(reverse),
                  joined = segments.joined(entering.data(), size, states.data(), reverse);
  int64_t sequence = -1;
  for (int64_t k = 0; k < count; ++k) {
    const Piece &piece = joined.pieces[k], &first = alone.pieces[k];
    CHECK((reverse ? first.state_in : first.state_out) == k);
    CHECK((reverse ? first.state_out : first.state_in) == -1);
    CHECK((reverse ? piece.state_out : piece.state_in) == k);
    if (piece.begin == piece.run_begin) ++sequence;
    const bool end = reverse ? piece.end == piece.run_end : piece.begin == piece.run_begin;
    CHECK(entering[k * size] == (end ? float(sequence * size) : -1));
  }
  CHECK(sequence == 2);
  segments.joined(entering.data(), size, nullptr, reverse);
  CHECK(entering[reverse ? (count - 1) * size : 0] == 0);
}

}  // namespace mamba_ops

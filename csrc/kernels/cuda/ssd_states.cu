// States of the SSD along the cells of pieces (math: kernels/ssd.h; per head, s from the cell's first token):
//
//   H <- 2^T H + sum_j (2^(T - s_j) delta_j x_j) B_j^T       from left to right
//   G <- 2^T G + sum_i (2^s_i go_i) C_i^T                    from right to left; go = dy silu(z)
//
// A block owns one piece of one row and direction, and 64 channels of one head: 8 warps, each with 16 rows of
// p and half the columns of n in registers. It goes through the cells, 8 at a time: first every warp makes
// the steps of one, then their products follow each other, the next cell's tiles arriving meanwhile. ssd_ends
// begins with zeros and leaves the last state; ssd_states begins with what the pieces before leave, and
// writes the state before every cell. Only the run that reaches the far edge of a cell counts; where it
// begins (ends) in the cell, its initial (final) state's row takes the place of H (G), and the piece's decay
// is 0.
//
// Shared memory: two tiles of x or go (q x 64) and of B or C (q x n), and of z where there is one. float32: B
// and C are split in place, three products of float16 for one (split.cuh). No atomics, every order is fixed:
// bitwise repeatable. Bound by L2, as every head reads B and C again: 82 % of its peak (b4 l4096 h80 p64 n128
// bfloat16, 0.58 ms, ncu on an H100; 0.76 with states stored in pairs); float32 by L2 too, 75 %, and issue
// slots 43 %.
#include "kernels/cuda/ssd_states.h"

#include "kernels/cuda/ssd_split.cuh"
#include "kernels/cuda/ssd_tile.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kThreads = 256, kP = 64, kWarps = kThreads / 32;

struct StatesArgs {
  SsdFwd fwd;
  Sequences seqs;
  SsdPieces pieces;
  Rows in[2], to[2], z;  // x, dy; B, C
  const void* far[2];    // rows of states_in, dstates_out
  int64_t first, some;   // pieces of this launch
  void* states[2];       // before the cells; null: the ends are wanted
  int first_direction;
};

template <class F, int kN, int kTokens>
struct StatesTiles {
  using E = typename F::Element;
  using R = typename F::Real;
  static constexpr int kQ = kTokens;
  static constexpr bool kSplit = std::is_same_v<E, float>;  // B: split.cuh
  static constexpr int kLdX = kP + F::kPadAcross, kLdB = kN + (kSplit ? kSplitPad : F::kPadAcross);
  // A cell: the tokens that count, and their weights.
  struct Cell {
    alignas(16) R weight[kQ];
    int64_t begin, state;  // row of the states that take the place of H or G, -1: zeros
    R decay;
    int tokens;
    bool edge;
  };
  alignas(16) E B[2][kQ * kLdB];
  alignas(16) E x[2][kQ * kLdX];
  alignas(16) R from_B[2][kSplit ? kQ : 1];  // of split rows
  Cell cells[kWarps];
  alignas(16) E z[2][kQ * kLdX];  // allocated for z alone
  static constexpr int bytes(bool z) { return int(z ? sizeof(StatesTiles) : offsetof(StatesTiles, z)); }
};

template <class F, int kN, int kTokens>
struct States {
  using T = StatesTiles<F, kN, kTokens>;
  using E = typename F::Element;
  using R = typename F::Real;
  using Cell = typename T::Cell;
  static constexpr int kColumns = kN / 2, kQ = T::kQ;

  const StatesArgs& a;
  T& tiles;
  const SsdDims& dims;
  const bool reverse;
  int64_t row, piece, head, group;
  int first_p, channels;
  const int warp = threadIdx.x / 32;
  const int first_row = warp / 2 * 16, first_column = warp % 2 * kColumns;
  R state[kColumns / 8][4];

  __device__ States(const StatesArgs& args, T& shared, int direction, int64_t id)
      : a(args), tiles(shared), dims(args.fwd.dims), reverse(direction == 1) {
    const int64_t slices = (dims.p + kP - 1) / kP;
    first_p = int(id % slices) * kP;
    channels = int(min(dims.p - first_p, int64_t(kP)));
    id /= slices;
    head = id % dims.h;
    group = head / (dims.h / (reverse ? dims.groups_C : dims.groups_B));
    id /= dims.h;
    row = id % dims.b;
    piece = a.first + id / dims.b;
  }

  // By one warp. Cells count from the piece's near edge.
  __device__ void make_cell(int64_t i, Cell& cell) const {
    const int64_t cells = a.pieces.cells, at = piece * cells + (reverse ? cells - 1 - i : i);
    int64_t begin = min(at * a.pieces.q, dims.l), end = min(begin + a.pieces.q, dims.l);
    if (!reverse) begin = last_start(a.seqs, row, begin, end);
    if (reverse) end = first_start(a.seqs, row, begin, end);
    const int tokens = int(end - begin);
    const LaneSteps<F, kQ> steps(a.fwd, row, begin, head, HeadParameters<R>(a.fwd, head), tokens);
#pragma unroll
    for (int k = 0; k < steps.kPerLane; ++k) {
      const int t = threadIdx.x % 32 * steps.kPerLane + k;
      if (t < kQ) cell.weight[t] = reverse ? steps.from_start(k) : steps.to_end(k) * steps.delta[k];
    }
    if (threadIdx.x % 32 != 0) return;
    cell.begin = tokens ? begin : 0;
    cell.tokens = tokens;
    cell.decay = steps.decay();
    cell.edge = tokens && is_edge(a.seqs, row, reverse ? end : begin, dims.l);
    cell.state = !cell.edge ? -1
                 : reverse  ? state_row_out(a.seqs, row, end, dims.l)
                            : state_row(a.seqs, row, begin);
  }

  __device__ void load(int stage, const Cell& cell) const {
    const auto channels_of = [&](E* tile, const Rows& from) {
      load_tokens<F, kQ, kP, kThreads>(tile, T::kLdX, from, place(from.view, row, cell.begin, head, first_p),
                                       cell.tokens, channels);
    };
    channels_of(tiles.x[stage], reverse ? a.in[1] : a.in[0]);
    if (reverse && a.z.view.data) channels_of(tiles.z[stage], a.z);
    const Rows& to = reverse ? a.to[1] : a.to[0];
    load_tokens<F, kQ, kN, kThreads>(tiles.B[stage], T::kLdB, to, place(to.view, row, cell.begin, group, 0),
                                     cell.tokens, int(dims.n));
  }
  __device__ void gate(int stage) const {
    for (int k = 2 * threadIdx.x; k < kQ * kP; k += 2 * kThreads) {
      const int at = k / kP * T::kLdX + k % kP;
      R go[2], z[2];
      F::load_pair(go, tiles.x[stage] + at);
      F::load_pair(z, tiles.z[stage] + at);
      F::store_pair(tiles.x[stage] + at, go[0] * silu(z[0]), go[1] * silu(z[1]));
    }
    __syncthreads();
  }

  __device__ void add(const E* x, const E* B, const R* from_B, const Cell& cell) {
    if (cell.edge) {
      const R* from = static_cast<const R*>(reverse ? a.far[1] : a.far[0]);
      if (from) from += ((cell.state * dims.h + head) * dims.p + first_p + first_row) * dims.n + first_column;
      load_state(state, cell.state >= 0 ? from : nullptr, dims.n, channels - first_row,
                 dims.n - first_column);
    }
    if constexpr (T::kSplit) {
      constexpr int kPiece = kQ < kSplitTerms ? kQ : kSplitTerms;
#pragma unroll 1
      for (int k = 0; k < kQ; k += kPiece)
        add_split_tokens<F, kPiece>(state, k == 0 ? cell.decay : R(1), x + k * T::kLdX + first_row, T::kLdX,
                                    cell.weight + k, B + k * T::kLdB, T::kLdB, from_B + k, first_column);
    } else {
      scale(state, cell.decay);
#pragma unroll 1
      for (int k = 0; k < kQ; k += 16) {
        const auto left = F::weighted(F::left_turned(x + k * T::kLdX + first_row, T::kLdX), cell.weight + k);
        multiply_columns<F, true>(state, left, B + k * T::kLdB + first_column, T::kLdB);
      }
    }
  }

  // Where a state of this block's head lies in (rows, slots, h, p, padded n).
  __device__ int64_t state_at(int64_t slots, int64_t slot) const {
    const int64_t ldn = ssd_padded_n(dims);
    return (((row * slots + slot) * dims.h + head) * dims.p + first_p + first_row) * ldn + first_column;
  }
  __device__ void store_before(int64_t i) const {
    const int64_t cells = a.pieces.cells, ldn = ssd_padded_n(dims);
    const int64_t slot = (piece - a.first) * cells + (reverse ? cells - 1 - i : i);
    E* to = static_cast<E*>(reverse ? a.states[1] : a.states[0]) + state_at(a.some * cells, slot);
    store_state_factors<F>(to, ldn, state, channels - first_row, ldn - first_column);
  }
  __device__ void store_end(R decay) {
    const int64_t ldn = ssd_padded_n(dims);
    R* to = static_cast<R*>(reverse ? a.pieces.ends[1] : a.pieces.ends[0]) + state_at(a.pieces.count, piece);
    store_state(to, ldn, state, channels - first_row, ldn - first_column);
    if (first_p == 0 && threadIdx.x == 0)
      static_cast<R*>(reverse ? a.pieces.decays[1]
                              : a.pieces.decays[0])[(row * a.pieces.count + piece) * dims.h + head] = decay;
  }

  __device__ void run() {
    const bool ends = !a.states[a.first_direction];
    if (ends && piece == (reverse ? 0 : a.pieces.count - 1)) return;
    const int64_t cells = a.pieces.cells, others = reverse ? a.pieces.count - 1 - piece : piece;
    load_state<kColumns / 8, R>(state, nullptr, 0, 0, 0);
    for (int64_t k = 0; !ends && k < others; ++k)
      pass_piece(state, dims, a.pieces, reverse, row, reverse ? a.pieces.count - 1 - k : k, head,
                 first_p + first_row, first_column, channels - first_row);
    R decay = 1;
    for (int64_t first = 0; first < cells; first += kWarps) {
      const int some = int(min(cells - first, int64_t(kWarps)));
      __syncthreads();
      if (warp < some) make_cell(first + warp, tiles.cells[warp]);
      __syncthreads();
      load(0, tiles.cells[0]);
      commit_copies();
      for (int k = 0; k < some; ++k) {
        const Cell& cell = tiles.cells[k];
        wait_for_copies();
        if constexpr (T::kSplit) {
          if (!(reverse ? a.to[1] : a.to[0]).direct) __syncthreads();
          split_tile<kQ, kN, kWarps>(tiles.B[k % 2], T::kLdB, tiles.from_B[k % 2]);
        }
        __syncthreads();
        if (reverse && a.z.view.data) gate(k % 2);
        if (k + 1 < some) load((k + 1) % 2, tiles.cells[k + 1]);
        commit_copies();
        if (!ends) store_before(first + k);
        add(tiles.x[k % 2], tiles.B[k % 2], tiles.from_B[k % 2], cell);
        decay *= cell.edge ? R(0) : cell.decay;
      }
    }
    if (ends) store_end(decay);
  }
};

template <class F, int kN, int kTokens>
__global__ void __launch_bounds__(kThreads, kN <= 128 && sizeof(typename F::Element) < 8 ? 2 : 1)
    ssd_chunk_states(const StatesArgs a) {
  extern __shared__ __align__(16) unsigned char memory[];
  using T = StatesTiles<F, kN, kTokens>;
  States<F, kN, kTokens>(a, *reinterpret_cast<T*>(memory), a.first_direction + blockIdx.y, blockIdx.x).run();
}

template <class F, int kN, int kTokens>
const char* launch(const StatesArgs& a, int directions, cudaStream_t stream) {
  const SsdDims& dims = a.fwd.dims;
  const int64_t blocks = a.some * dims.b * dims.h * ceil_div(dims.p, kP);
  if (blocks > INT_MAX) return "more blocks than one launch may have";
  const int bytes = StatesTiles<F, kN, kTokens>::bytes(a.first_direction + directions > 1 && a.z.view.data);
  if (const char* error = allow_shared(ssd_chunk_states<F, kN, kTokens>, bytes)) return error;
  ssd_chunk_states<F, kN, kTokens><<<dim3(unsigned(blocks), directions), kThreads, bytes, stream>>>(a);
  return launch_error();
}

const char* launch(const SsdBwd& p, const Sequences& seqs, const SsdPieces& pieces, int64_t first,
                   int64_t some, bool H, bool G, void* to_H, void* to_G, void* stream) {
  const SsdDims& dims = p.fwd.dims;
  return by_factors(p.fwd, [&]<class F>() {
    const std::initializer_list<int64_t> tokens = {dims.b, dims.l, dims.h, dims.p};
    const StatesArgs a{.fwd = p.fwd,
                       .seqs = seqs,
                       .pieces = pieces,
                       .in = {rows_of<F>(p.fwd.x, tokens), rows_of<F>(p.dy, tokens)},
                       .to = {rows_of<F>(p.fwd.B, {dims.b, dims.l, dims.groups_B, dims.n}),
                              rows_of<F>(p.fwd.C, {dims.b, dims.l, dims.groups_C, dims.n})},
                       .z = rows_of<F>(p.fwd.z, tokens),
                       .far = {p.fwd.states_in, p.dstates_out},
                       .first = first,
                       .some = some,
                       .states = {to_H, to_G},
                       .first_direction = H ? 0 : 1};
    return by_width(dims.n, [&]<int kN>() {
      constexpr int kMost = kCellTokens<F, kN>, kFew = std::max(kMost / 2, 16);
      const cudaStream_t to = static_cast<cudaStream_t>(stream);
      const int directions = int(H) + int(G);
      return pieces.q <= kFew ? launch<F, kN, kFew>(a, directions, to)
                              : launch<F, kN, kMost>(a, directions, to);
    });
  });
}

}  // namespace

}  // namespace gpu

const char* ssd_ends(const SsdBwd& p, const Sequences& seqs, const SsdPieces& pieces, void* stream) {
  return gpu::launch(p, seqs, pieces, 0, pieces.count, pieces.ends[0], pieces.ends[1], nullptr, nullptr,
                     stream);
}

const char* ssd_states(const SsdBwd& p, const Sequences& seqs, const SsdPieces& pieces, int64_t first,
                       int64_t some, void* H, void* G, void* stream) {
  return gpu::launch(p, seqs, pieces, first, some, true, true, H, G, stream);
}

}  // namespace mamba_ops

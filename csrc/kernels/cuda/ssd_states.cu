// States of the SSD at the edges of pieces (math: kernels/ssd.h; per head, s from the cell's first token):
//
//   H <- 2^T H + sum_j (2^(T - s_j) delta_j x_j) B_j^T       forward, over the cells of a piece
//   G <- 2^T G + sum_i (2^s_i go_i) C_i^T                    backward; go = dy silu(z)
//
// state_ends: a block owns one piece of one row and direction, 64 channels of one head, or of 8 heads where a
// piece is one cell; 8 warps, each with 16 rows of p and half the columns of n in registers. It goes through
// items (head, cell), 8 at a time: first every warp makes the steps of one, then their products follow each
// other, the next item's tiles arriving meanwhile. Only the run that reaches the far edge of a cell counts;
// where it begins (ends) in the cell, its initial (final) state's row takes the place of H (G), and the
// piece's decay is 0. Shared memory: two tiles of x or go (q x 64) and of B or C (q x n), and of z where
// there is one. state_pass: every thread owns 16 bytes of a state and goes through the pieces: the state that
// enters a piece replaces its end. Bound by memory. No atomics, every order is fixed: bitwise repeatable.
#include "kernels/cuda/ssd_states.h"

#include "kernels/cuda/ssd_tile.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kEndThreads = 256, kEndP = 64, kEndWarps = kEndThreads / 32;

struct EndsArgs {
  SsdFwd fwd;
  Sequences seqs;
  SsdPieces pieces;
  Rows in[2], to[2], z;        // x, dy; B, C
  const void* far[2];          // rows of states_in, dstates_out
  int first_direction, heads;  // heads of a block
};

template <class F, int kN>
struct EndsTiles {
  using E = typename F::Element;
  using R = typename F::Real;
  static constexpr int kQ = kCellTokens<F, kN>;
  static constexpr int kLdX = kEndP + F::kPadAcross, kLdB = kN + F::kPadAcross;
  // One head in one cell: the tokens that count, and their weights.
  struct Item {
    alignas(16) R weight[kQ];
    int64_t begin, state;  // row of the states that take the place of H or G, -1: zeros
    R decay;
    int tokens;
    bool edge;
  };
  alignas(16) E B[2][kQ * kLdB];
  alignas(16) E x[2][kQ * kLdX];
  Item items[kEndWarps];
  alignas(16) E z[2][kQ * kLdX];  // allocated for z alone
  static constexpr int bytes(bool z) { return int(z ? sizeof(EndsTiles) : offsetof(EndsTiles, z)); }
};

template <class F, int kN>
struct Ends {
  using T = EndsTiles<F, kN>;
  using E = typename F::Element;
  using R = typename F::Real;
  using Item = typename T::Item;
  static constexpr int kColumns = kN / 2, kQ = T::kQ;

  const EndsArgs& a;
  T& tiles;
  const SsdDims& dims;
  const SsdPieces& pieces;
  const bool reverse;
  int64_t row, piece, first_head;
  int first_p, channels;
  const int warp = threadIdx.x / 32;
  const int first_row = warp / 2 * 16, first_column = warp % 2 * kColumns;
  R state[kColumns / 8][4];

  __device__ Ends(const EndsArgs& args, T& shared, int direction, int64_t id)
      : a(args), tiles(shared), dims(args.fwd.dims), pieces(args.pieces), reverse(direction == 1) {
    const int64_t slices = (dims.p + kEndP - 1) / kEndP, blocks = (dims.h + a.heads - 1) / a.heads;
    first_p = int(id % slices) * kEndP;
    channels = int(min(dims.p - first_p, int64_t(kEndP)));
    id /= slices;
    first_head = id % blocks * a.heads;
    id /= blocks;
    row = id % dims.b;
    piece = id / dims.b;
  }

  __device__ int64_t head_of(int64_t i) const { return first_head + i / pieces.cells; }
  __device__ int64_t cell_of(int64_t i) const {
    i %= pieces.cells;
    return piece * pieces.cells + (reverse ? pieces.cells - 1 - i : i);
  }
  __device__ int64_t group_of(int64_t i) const {
    return head_of(i) / (dims.h / (reverse ? dims.groups_C : dims.groups_B));
  }

  // By one warp.
  __device__ void make_item(int64_t i, Item& item) const {
    int64_t begin = min(pieces.begin + cell_of(i) * pieces.q, dims.l), end = min(begin + pieces.q, dims.l);
    if (!reverse) begin = last_start(a.seqs, row, begin, end);
    if (reverse) end = first_start(a.seqs, row, begin, end);
    const int tokens = int(end - begin);
    constexpr int kPerLane = (kQ + 31) / 32;
    const HeadParameters<R> head(a.fwd, head_of(i));
    const LaneSteps<F, kQ> steps(a.fwd, row, begin, head_of(i), head, tokens);
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int t = threadIdx.x % 32 * kPerLane + k;
      if (t < kQ) item.weight[t] = reverse ? steps.from_start(k) : steps.to_end(k) * steps.delta[k];
    }
    if (threadIdx.x % 32 != 0) return;
    item.begin = tokens ? begin : 0;
    item.tokens = tokens;
    item.decay = steps.decay();
    item.edge = tokens && is_edge(a.seqs, row, reverse ? end : begin, dims.l);
    item.state = !item.edge ? -1
                 : reverse  ? state_row_out(a.seqs, row, end, dims.l)
                            : state_row(a.seqs, row, begin);
  }

  __device__ void load_B(E* tile, int64_t i, const Item& item) const {
    load_tokens<F, kQ, kN, kEndThreads>(tile, T::kLdB, a.to[reverse], row, item.begin, group_of(i), 0,
                                        item.tokens, int(dims.n));
  }
  __device__ void load_x(int stage, int64_t i, const Item& item) const {
    load_tokens<F, kQ, kEndP, kEndThreads>(tiles.x[stage], T::kLdX, a.in[reverse], row, item.begin,
                                           head_of(i), first_p, item.tokens, channels);
    if (reverse && a.z.view.data)
      load_tokens<F, kQ, kEndP, kEndThreads>(tiles.z[stage], T::kLdX, a.z, row, item.begin, head_of(i),
                                             first_p, item.tokens, channels);
  }
  __device__ void gate(int stage) const {
    for (int k = 2 * threadIdx.x; k < kQ * kEndP; k += 2 * kEndThreads) {
      const int at = k / kEndP * T::kLdX + k % kEndP;
      R go[2], z[2];
      F::load_pair(go, tiles.x[stage] + at);
      F::load_pair(z, tiles.z[stage] + at);
      F::store_pair(tiles.x[stage] + at, go[0] * silu(z[0]), go[1] * silu(z[1]));
    }
    __syncthreads();
  }

  __device__ void add(const E* x, const E* B, int64_t i, const Item& item) {
    if (item.edge) {
      const R* from = static_cast<const R*>(reverse ? a.far[1] : a.far[0]);
      if (from)
        from += ((item.state * dims.h + head_of(i)) * dims.p + first_p + first_row) * dims.n + first_column;
      load_state(state, item.state >= 0 ? from : nullptr, dims.n, channels - first_row,
                 dims.n - first_column);
    }
    scale(state, item.decay);
#pragma unroll
    for (int k = 0; k < kQ; k += 16) {
      const auto left = F::weighted(F::left_turned(x + k * T::kLdX + first_row, T::kLdX), item.weight + k);
      multiply_columns<F, true>(state, left, B + k * T::kLdB + first_column, T::kLdB);
    }
  }

  __device__ void store(int64_t head, R decay) {
    const int64_t slot = (row * pieces.count + piece) * dims.h + head, ldn = ssd_padded_n(dims);
    const int64_t at = (slot * dims.p + first_p + first_row) * ldn + first_column;
    void* states = reverse ? pieces.states[1] : pieces.states[0];
    if (pieces.wide)
      store_state(static_cast<R*>(states) + at, ldn, state, channels - first_row, ldn - first_column);
    else
      store_state_pairs<F>(static_cast<E*>(states) + at, ldn, state, channels - first_row,
                           ldn - first_column);
    if (first_p == 0 && threadIdx.x == 0)
      static_cast<R*>(reverse ? pieces.decays[1] : pieces.decays[0])[slot] = decay;
  }

  __device__ void run() {
    const int64_t count = min(int64_t(a.heads), dims.h - first_head) * pieces.cells;
    int in_B = 0;  // the tile that holds B
    R decay = 0;   // of the piece so far
    for (int64_t first = 0; first < count; first += kEndWarps) {
      const int some = int(min(count - first, int64_t(kEndWarps)));
      __syncthreads();
      if (warp < some) make_item(first + warp, tiles.items[warp]);
      __syncthreads();
      load_x(0, first, tiles.items[0]);
      load_B(tiles.B[in_B], first, tiles.items[0]);
      commit_copies();
      for (int k = 0; k < some; ++k) {
        const int64_t i = first + k;
        const Item& item = tiles.items[k];
        wait_for_copies();
        __syncthreads();
        if (reverse && a.z.view.data) gate(k % 2);
        const bool more = k + 1 < some;
        const bool other_B = more && (pieces.cells > 1 || group_of(i + 1) != group_of(i));
        if (more) load_x((k + 1) % 2, i + 1, tiles.items[k + 1]);
        if (other_B) load_B(tiles.B[1 - in_B], i + 1, tiles.items[k + 1]);
        commit_copies();

        if (i % pieces.cells == 0) {
          load_state<kColumns / 8, R>(state, nullptr, 0, 0, 0);
          decay = 1;
        }
        add(tiles.x[k % 2], tiles.B[in_B], i, item);
        decay *= item.edge ? R(0) : item.decay;
        if ((i + 1) % pieces.cells == 0) store(head_of(i), decay);
        if (other_B) in_B = 1 - in_B;
      }
    }
  }
};

template <class F, int kN>
__global__ void __launch_bounds__(kEndThreads, kN <= 128 && sizeof(typename F::Element) < 8 ? 2 : 1)
    state_ends(const EndsArgs a) {
  extern __shared__ __align__(16) unsigned char memory[];
  Ends<F, kN>(a, *reinterpret_cast<EndsTiles<F, kN>*>(memory), a.first_direction + blockIdx.y, blockIdx.x)
      .run();
}

constexpr int kPassThreads = 256;

template <class S, class R>
__global__ void __launch_bounds__(kPassThreads)
    state_pass(const SsdPieces pieces, int first_direction, int64_t heads, int64_t rows, int64_t size) {
  constexpr int kVector = 16 / sizeof(S), kBatch = 8;
  struct alignas(16) Vector {
    S v[kVector];
  };
  const int direction = first_direction + blockIdx.y;
  const int64_t per_head = size / kVector;
  const int64_t id = int64_t(blockIdx.x) * kPassThreads + threadIdx.x;
  if (id >= rows * heads * per_head) return;
  const int64_t row_head = id / per_head, at = id % per_head * kVector;
  const int64_t row = row_head / heads, head = row_head % heads;
  const int64_t slot = row * pieces.count * heads + head;
  S* states = static_cast<S*>(direction == 0 ? pieces.states[0] : pieces.states[1]) + slot * size + at;
  const R* decays = static_cast<const R*>(direction == 0 ? pieces.decays[0] : pieces.decays[1]) + slot;
  const R* from = static_cast<const R*>(direction == 0 ? pieces.carry_in[0] : pieces.carry_in[1]);
  const int64_t carry_at =
      row * (direction == 0 ? pieces.carry_stride[0] : pieces.carry_stride[1]) + head * size + at;
  R state[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) state[i] = from ? from[carry_at + i] : R(0);

  for (int64_t first = 0; first < pieces.count; first += kBatch) {
    Vector end[kBatch];
    R decay[kBatch];
    const auto piece_of = [&](int k) { return direction == 0 ? first + k : pieces.count - 1 - first - k; };
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (first + k < pieces.count) {
        end[k] = *reinterpret_cast<const Vector*>(states + piece_of(k) * heads * size);
        decay[k] = decays[piece_of(k) * heads];
      }
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (first + k < pieces.count) {
        Vector before;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          before.v[i] = from_real<S>(state[i]);
          state[i] = decay[k] * state[i] + to_real(end[k].v[i]);
        }
        *reinterpret_cast<Vector*>(states + piece_of(k) * heads * size) = before;
      }
  }
  if (direction == 1 && pieces.carry_out)
#pragma unroll
    for (int i = 0; i < kVector; ++i) static_cast<R*>(pieces.carry_out)[carry_at + i] = state[i];
}

template <class F, int kN>
const char* launch(const EndsArgs& a, cudaStream_t stream) {
  using R = typename F::Real;
  const SsdDims& dims = a.fwd.dims;
  const int directions = (a.pieces.states[0] != nullptr) + (a.pieces.states[1] != nullptr);
  const int64_t blocks = a.pieces.count * dims.b * ceil_div(dims.h, a.heads) * ceil_div(dims.p, kEndP);
  const int64_t size = dims.p * ssd_padded_n(dims);
  const bool wide = a.pieces.wide;
  const int64_t vector = 16 / (wide ? sizeof(R) : sizeof(typename F::Element));
  const int64_t pass_blocks = ceil_div(dims.b * dims.h * (size / vector), kPassThreads);
  if (blocks > INT_MAX || pass_blocks > INT_MAX) return "more blocks than one launch may have";
  const int bytes = EndsTiles<F, kN>::bytes(directions > a.first_direction && a.z.view.data);
  if (const char* error = allow_shared(state_ends<F, kN>, bytes)) return error;
  state_ends<F, kN><<<dim3(unsigned(blocks), directions), kEndThreads, bytes, stream>>>(a);
  const auto pass = wide ? state_pass<R, R> : state_pass<typename F::Element, R>;
  pass<<<dim3(unsigned(pass_blocks), directions), kPassThreads, 0, stream>>>(a.pieces, a.first_direction,
                                                                             dims.h, dims.b, size);
  return launch_error();
}

}  // namespace

}  // namespace gpu

const char* ssd_states(const SsdBwd& p, const Sequences& seqs, const SsdPieces& pieces, void* stream) {
  using namespace gpu;
  const SsdDims& dims = p.fwd.dims;
  return by_factors(p.fwd.x.dtype, [&]<class F>() {
    const std::initializer_list<int64_t> tokens = {dims.b, dims.l, dims.h, dims.p};
    const EndsArgs a{.fwd = p.fwd,
                     .seqs = seqs,
                     .pieces = pieces,
                     .in = {rows_of<F>(p.fwd.x, tokens), rows_of<F>(p.dy, tokens)},
                     .to = {rows_of<F>(p.fwd.B, {dims.b, dims.l, dims.groups_B, dims.n}),
                            rows_of<F>(p.fwd.C, {dims.b, dims.l, dims.groups_C, dims.n})},
                     .z = rows_of<F>(p.fwd.z, tokens),
                     .far = {p.fwd.states_in, p.dstates_out},
                     .first_direction = pieces.states[0] ? 0 : 1,
                     .heads = pieces.cells > 1 ? 1 : 8};
    return by_width(dims.n, [&]<int kN>() { return launch<F, kN>(a, static_cast<cudaStream_t>(stream)); });
  });
}

}  // namespace mamba_ops

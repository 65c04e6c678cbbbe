// SSD backward, portable (math: kernels/ssd.h), cell by cell of q tokens, all cells at once:
//
//   go = dy silu(z);  dM_ij = go_i . X_j;  W = dM o M;  dCB = dM o L      (i >= j)
//   dX_j = sum_i M_ij go_i + 2^(T - s_j) G B_j;   dx_j = delta_j dX_j + D go_j
//   dC_i = sum_j dCB_ij B_j + chi_i,  chi_i = 2^s_i H^T go_i;    r_i = C_i . chi_i
//   dB_j = sum_i dCB_ij C_i + beta_j,  beta_j = 2^(T - s_j) G^T X_j;    k_j = B_j . beta_j
//   da_t = sum_{i >= t} (sum_j W_ij - sum_m W_mi) + sum_{i >= t} r_i + sum_{j < t} k_j + 2^T <G, H>
//   ddelta_j = x_j . dX_j + A da_j;   dA = sum delta da
//
// 1: ssd_ends, where there are too few rows and heads: they are cut into pieces.
// 2: ssd_states: H before every cell, and G, the gradient of the state after it.
//
// 3: ssd_backward: a block owns a cell of one row and a few heads that share B and C. It goes through the
// heads, kP channels at a time, with C B^T, its gradient, dB and dC in registers: kQ / 16 x kGroups warps, 16
// tokens (as j, as i, or as rows of dx) by a share of the columns. Row and column sums of W are those of one
// float32 tile without its diagonal: what cancels is exact up to float32. Four warps make the steps of four
// heads at once, and in the end what comes of them. Where runs begin in the cell its chunks follow each
// other, with the states of their runs; the block writes the gradients of those. Shared memory: B, C (kQ x
// kN); x, go (kQ x kP), H, G (kP x kN), twice where they fit; M (kQ x kQ). GPUs with less of it take smaller
// tiles.
//
// 4: ssd_reduce: sums of dA, ddt_bias, dD over cells, and of dB, dC over blocks of heads, in order.
//
// No atomics, every order is fixed by the sizes and the GPU's kind: bitwise repeatable. Nothing but the
// inputs is saved. Workspace: the states of cells, in the factors' type, for spans of the sequences that take
// at most kSpanValues together (4 GiB in 16 bits, at least one cell): longer calls run 2 and 3 for span after
// span. Beside that the ends of 1 and the partial sums of 4, of which those of dB and dC are not needed where
// one block has all heads of a group.
//
// 3 is bound by instructions other than products, and their latency: issue slots 42 % of their peak (float32:
// 48 %), tensor cores 9 % (21 %), shared memory and L1 46 % (42 %); most waits are for shared memory, in
// float32 for the instruction before (ncu on an H100).
#include <algorithm>

#include "kernels/cuda/ssd_bwd_products.cuh"
#include "kernels/cuda/ssd_bwd_steps.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int64_t kSpanValues = int64_t(1) << 31;
constexpr int kReduceThreads = 256;

template <class F, class Sizes>
__global__ void __launch_bounds__(BwdTiles<F, Sizes>::kThreads, 1) ssd_backward(const BwdArgs a) {
  using T = BwdTiles<F, Sizes>;
  extern __shared__ __align__(16) unsigned char memory[];
  const int64_t rest = blockIdx.x / a.blocks;
  Backward<F, Sizes> backward(a, *reinterpret_cast<T*>(memory), rest / a.count, a.first_cell + rest % a.count,
                              blockIdx.x % a.blocks);
  if (is_invalid_pack(a.seqs, a.p.fwd.dims.l))
    backward.fill_nan();
  else
    backward.run();
}

// Block (head, which): the sum of one number over all rows and cells.
template <class R>
__device__ void reduce_sums(const BwdArgs& a, int64_t head, int64_t which, bool invalid) {
  __shared__ double shared[kReduceThreads];
  const int64_t width = a.sums_width(), h = a.p.fwd.dims.h, count = a.p.fwd.dims.b * a.cells;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kReduceThreads)
    sum += static_cast<const R*>(a.sums)[(i * h + head) * width + which];
  shared[threadIdx.x] = sum;
  for (int d = kReduceThreads / 2; d > 0; d /= 2) {
    __syncthreads();
    if (threadIdx.x < d) shared[threadIdx.x] += shared[threadIdx.x + d];
  }
  if (threadIdx.x != 0) return;
  sum = invalid ? double(NAN) : shared[0];
  if (which == 0)
    store_one(a.p.dA, head * a.p.dA.stride[0], sum);
  else if (which > 1)
    store_one(a.p.dD, head * a.p.dD.stride[0] + (which - 2) * a.p.dD.stride[1], sum);
  else if (a.p.ddt_bias.data)
    store_one(a.p.ddt_bias, head * a.p.ddt_bias.stride[0], sum);
}

// dB and dC from the partial sums of the blocks of heads; with bad offsets NaN in any case.
template <class R>
__device__ void reduce_BC(const BwdArgs& a, int64_t first, int64_t stride, bool invalid) {
  const SsdDims& dims = a.p.fwd.dims;
  const int64_t ldn = ssd_padded_n(dims), tokens = dims.b * dims.l;
  for (int which = 0; which < 2; ++which) {
    const View& out = which == 0 ? a.p.dB : a.p.dC;
    const int64_t groups = which == 0 ? dims.groups_B : dims.groups_C, blocks = a.blocks / groups;
    for (int64_t i = first; i < tokens * groups * dims.n; i += stride) {
      const int64_t n = i % dims.n, group = i / dims.n % groups, token = i / dims.n / groups;
      R sum = 0;
      if (invalid)
        sum = NAN;
      else
        for (int64_t k = group * blocks; k < (group + 1) * blocks; ++k)
          sum += static_cast<const R*>(a.partial_BC)[((k * tokens + token) * 2 + which) * ldn + n];
      store_one(out,
                token / dims.l * out.stride[0] + token % dims.l * out.stride[1] + group * out.stride[2] +
                    n * out.stride[3],
                sum);
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kReduceThreads) ssd_reduce(const BwdArgs a) {
  const int64_t sums = a.p.fwd.dims.h * a.sums_width();
  const bool invalid = is_invalid_pack(a.seqs, a.p.fwd.dims.l);
  if (blockIdx.x < sums)
    reduce_sums<R>(a, blockIdx.x / a.sums_width(), blockIdx.x % a.sums_width(), invalid);
  else if (a.partial_BC || invalid || a.p.fwd.dims.h == 0)
    reduce_BC<R>(a, (blockIdx.x - sums) * kReduceThreads + threadIdx.x, (gridDim.x - sums) * kReduceThreads,
                 invalid);
}

template <class R>
__global__ void pass_all_gradients(const R* from, R* to, int64_t count, const Sequences seqs, int64_t l) {
  const bool invalid = is_invalid_pack(seqs, l);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x)
    to[i] = invalid ? R(NAN) : from ? from[i] : R(0);
}

// How a call is cut, and where its workspace lies.
struct BwdPlan {
  SsdPieces pieces;
  int64_t span;                                           // pieces whose states are held at once
  int64_t heads;                                          // of a block
  int64_t ends, decays, states, sums, partial_BC, bytes;  // offsets, -1: not needed

  template <class F, class Sizes>
  static BwdPlan of(SsdDims dims, int64_t sums_width) {
    using T = BwdTiles<F, Sizes>;
    using R = typename F::Real;
    BwdPlan plan{};
    SsdPieces& pieces = plan.pieces;
    pieces.q = std::min<int64_t>(dims.q, T::kQ);
    const int64_t cells = ceil_div(dims.l, pieces.q), row_heads = dims.b * dims.h;
    const int64_t cell = row_heads * dims.p * ssd_padded_n(dims);  // values of its states
    const int64_t at_once =
        std::clamp<int64_t>(kSpanValues / std::max<int64_t>(2 * cell, 1), 1, std::max<int64_t>(cells, 1));
    // Pieces where whole rows are too few blocks for the states.
    const int64_t processors = multiprocessors();
    const int64_t blocks = std::max<int64_t>(2 * row_heads * ceil_div(dims.p, 64), 1);
    const int64_t wanted = std::clamp<int64_t>(2 * processors / blocks, 1, most_pieces(at_once));
    const bool spans = at_once < cells;
    pieces.cells = spans ? at_once / wanted : ceil_div(at_once, wanted);
    pieces.count = ceil_div(cells, pieces.cells);
    plan.span = spans ? at_once / pieces.cells : std::max<int64_t>(pieces.count, 1);

    // As few blocks of heads as keep the GPU busy: each has partial sums of dB and dC.
    const int64_t share = std::max<int64_t>(dims.sharing(), 1);
    const int64_t others = std::max<int64_t>(dims.b * std::min(cells, at_once) * (dims.h / share), 1);
    plan.heads = ceil_div(share, std::clamp<int64_t>(ceil_div(4 * processors, others), 1, share));
    dims.heads = plan.heads;

    const auto take = [&](bool wanted, int64_t count, int64_t size_of) {
      const int64_t at = wanted ? plan.bytes : -1;
      if (wanted) plan.bytes += aligned(count * size_of);
      return at;
    };
    const bool whole_groups = dims.blocks_per_share() == 1 && dims.groups_B == dims.groups_C;
    const bool split = pieces.count > 1;
    plan.ends = take(split, 2 * pieces.size(dims), sizeof(R));
    plan.decays = take(split, 2 * pieces.heads(dims), sizeof(R));
    plan.states = take(true, 2 * plan.span * pieces.cells * cell, sizeof(typename F::Element));
    plan.sums = take(true, cells * row_heads * sums_width, sizeof(R));
    plan.partial_BC =
        take(!whole_groups, dims.head_blocks() * dims.b * dims.l * 2 * ssd_padded_n(dims), sizeof(R));
    return plan;
  }
};

template <class F, class Sizes>
struct BwdLaunch {
  using T = BwdTiles<F, Sizes>;
  using E = typename F::Element;
  using R = typename F::Real;
  BwdArgs a;
  BwdPlan plan;
  char* workspace;
  cudaStream_t stream;

  BwdLaunch(const SsdBwd& p, const Sequences& seqs, int64_t states, void* memory, cudaStream_t to)
      : workspace(static_cast<char*>(memory)), stream(to) {
    const SsdDims& dims = p.fwd.dims;
    const std::initializer_list<int64_t> tokens = {dims.b, dims.l, dims.h, dims.p};
    const std::initializer_list<int64_t> B = {dims.b, dims.l, dims.groups_B, dims.n},
                                         C = {dims.b, dims.l, dims.groups_C, dims.n};
    const auto rows_of_states = [&](const void* data) {
      View v{
          .data = const_cast<void*>(data), .dtype = sizeof(R) == 8 ? DType::f64 : DType::f32, .stride = {}};
      v.stride[0] = dims.n;
      v.stride[1] = 1;
      return rows_of<F>(v, {2, dims.n});
    };
    a = {.p = p,
         .seqs = seqs,
         .states = states,
         .x = rows_of<F>(p.fwd.x, tokens),
         .z = rows_of<F>(p.fwd.z, tokens),
         .dy = rows_of<F>(p.dy, tokens),
         .dx = rows_of<F>(p.dx, tokens),
         .dz = rows_of<F>(p.dz, tokens),
         .B = rows_of<F>(p.fwd.B, B),
         .C = rows_of<F>(p.fwd.C, C),
         .dB = rows_of<F>(p.dB, B),
         .dC = rows_of<F>(p.dC, C),
         .states_in = rows_of_states(p.fwd.states_in),
         .dstates_out = rows_of_states(p.dstates_out),
         .blocks = 0,
         .share = 0,
         .per_share = 0,
         .q = 0,
         .cells = 0,
         .first_cell = 0,
         .count = 0,
         .slots = 0,
         .before = {},
         .sums = nullptr,
         .partial_BC = nullptr};
    plan = BwdPlan::of<F, Sizes>(dims, a.sums_width());
    a.p.fwd.dims.heads = plan.heads;
    a.blocks = a.p.fwd.dims.head_blocks();
    a.share = dims.sharing();
    a.per_share = a.p.fwd.dims.blocks_per_share();
    a.q = plan.pieces.q;
    a.cells = ceil_div(dims.l, a.q);
    a.sums = at(plan.sums);
    a.partial_BC = at(plan.partial_BC);
  }

  void* at(int64_t offset) const { return offset < 0 ? nullptr : workspace + offset; }

  const char* run_span(int64_t first) {
    const SsdDims& dims = a.p.fwd.dims;
    const SsdPieces& pieces = plan.pieces;
    const int64_t some = std::min(plan.span, pieces.count - first);
    a.first_cell = first * pieces.cells;
    a.count = std::min(some * pieces.cells, a.cells - a.first_cell);
    a.slots = some * pieces.cells;
    const int64_t size = a.slots * dims.b * dims.h * dims.p * ssd_padded_n(dims);
    E* const H = static_cast<E*>(at(plan.states));
    a.before[0] = H;
    a.before[1] = H + size;
    if (const char* error = ssd_states(a.p, a.seqs, pieces, first, some, H, H + size, stream)) return error;
    const int64_t blocks = dims.b * a.count * a.blocks;
    if (blocks > INT_MAX) return "more blocks than one launch may have";
    const int bytes = sizeof(T);
    if (const char* error = allow_shared(ssd_backward<F, Sizes>, bytes)) return error;
    ssd_backward<F, Sizes><<<unsigned(blocks), T::kThreads, bytes, stream>>>(a);
    return launch_error();
  }

  const char* run() {
    const SsdDims& dims = a.p.fwd.dims;
    SsdPieces& pieces = plan.pieces;
    const bool empty = dims.b * dims.l * dims.h == 0;
    if (pieces.count > 1 && !empty) {
      for (int i = 0; i < 2; ++i) {
        pieces.ends[i] = static_cast<R*>(at(plan.ends)) + i * pieces.size(dims);
        pieces.decays[i] = static_cast<R*>(at(plan.decays)) + i * pieces.heads(dims);
      }
      if (const char* error = ssd_ends(a.p, a.seqs, pieces, stream)) return error;
    }
    for (int64_t first = 0; first < pieces.count && !empty; first += plan.span)
      if (const char* error = run_span(first)) return error;
    const int64_t values = dims.b * dims.l * std::max(dims.groups_B, dims.groups_C) * dims.n;
    const int64_t blocks = dims.h * a.sums_width() + std::clamp<int64_t>(values / kReduceThreads, 1, 8192);
    ssd_reduce<R><<<unsigned(blocks), kReduceThreads, 0, stream>>>(a);
    return launch_error();
  }
};

// f.template operator()<F, Sizes>() for the types and widths of a call, and what the GPU has.
template <class Function>
auto by_kernel(const SsdFwd& p, Function f) {
  return by_factors(p, [&]<class F>() {
    return by_width(p.dims.n, [&]<int kN>() {
      constexpr int kBytes = sizeof(typename F::Element);
      using Large = BwdSizes<kBytes, kN, false>;
      using Small = BwdSizes<kBytes, kN, kBytes != 8>;
      return sizeof(BwdTiles<F, Large>) <= size_t(shared_bytes()) ? f.template operator()<F, Large>()
                                                                  : f.template operator()<F, Small>();
    });
  });
}

}  // namespace

}  // namespace gpu

int64_t ssd_bwd_portable_workspace(const SsdBwd& p, const Sequences& seqs, int64_t states) {
  using namespace gpu;
  return by_kernel(p.fwd, [&]<class F, class Sizes>() {
    return BwdLaunch<F, Sizes>(p, seqs, states, nullptr, nullptr).plan.bytes;
  });
}

const char* ssd_bwd_portable(const SsdBwd& p, const Sequences& seqs, int64_t states, void* workspace,
                             void* cuda_stream) {
  using namespace gpu;
  const SsdDims& dims = p.fwd.dims;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  return by_kernel(p.fwd, [&]<class F, class Sizes>() -> const char* {
    using R = typename F::Real;
    const int64_t count = states * dims.h * dims.p * dims.n;
    if (dims.b * dims.l * dims.h == 0 && p.dstates_in && count > 0)
      pass_all_gradients<R><<<256, 256, 0, stream>>>(static_cast<const R*>(p.dstates_out),
                                                     static_cast<R*>(p.dstates_in), count, seqs, dims.l);
    return BwdLaunch<F, Sizes>(p, seqs, states, workspace, stream).run();
  });
}

}  // namespace mamba_ops

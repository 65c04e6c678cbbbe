// SSD forward, portable (math: kernels/ssd.h): chunk by chunk with the state in registers.
//
//   P_ij = (C_i . B_j) 2^(s_i - s_j) delta_j for i >= j;   Y^T = (H C^T) 2^s_i + X^T P^T
//   y = (Y + D x) silu(z);   H <- 2^T H + sum_j (2^(T - s_j) delta_j x_j) B_j^T
//
// A block owns one head of one row (or a piece of that row), and kP channels of it; it goes through the
// chunks in order. A warp owns 16 of the channels: their states are its sums, and as they are the left factor
// of H C^T; X^T, read across, is that of the other two products. P alone goes through shared memory: kQ / 16
// warps by kWarps 16 / kQ make its blocks on and below the diagonal; the warp with the fewest makes the steps
// of the next chunk too.
//
// float32: three products of float16 for one (split.cuh). Every warp splits the rows of B and C that it has
// copied; P is split when it is made, H and x^T in registers. H's largest values are found when it is made,
// in the shadow of its products.
//
// Shared memory: tiles of B and C (kQ x kN), free for the next chunk's once P is there; two of x (kQ x kP), y
// takes the place of the one in use; P (kQ x kQ); z (kQ x kP) where there is one. In float32 one tile of x; z
// and y pass between registers and memory. There B and x are copied during H C^T, the next C from P on, and
// what a warp knows of its chunk stays in shared memory: its registers are full, and the less is allocated,
// the more of L1 is left for what they do not hold.
//
// A run that begins takes its initial state's row, one that ends leaves its final state's; sequences without
// tokens are copied by the block of the run that follows them. Where there are too few blocks, sequences are
// cut into pieces, and ssd_ends finds what each makes of nothing: two launches instead of one. No atomics,
// every order is fixed by the sizes and the GPU's kind: bitwise repeatable.
//
// Bound by latency: with b h = 320 there are 2.4 warps a scheduler. b 4, l 4096, h 80, p 64, n 128 takes
// 0.47 ms in bfloat16, 1.10 in float32 (H100, whose multiprocessors are the H200's). ncu: shared memory and
// L1 52 % of their peak, issue slots 29 %, tensor cores 23 %; float32 48, 39 and 23 %. In float32 twice the
// warps, each with half of a state's columns, take 1.37 (80 registers, a third more instructions), y by way
// of shared memory 1.17; splitting H by a bound of its rows in the place of their largest values 1.09, but
// columns 10^6 apart then lose two digits.
#include <algorithm>

#include "kernels/cuda/ssd.h"
#include "kernels/cuda/ssd_fwd.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

template <class F, class Sizes>
__global__ void __launch_bounds__(FwdTiles<F, Sizes>::kThreads, FwdTiles<F, Sizes>::kBlocks)
    ssd_forward(const FwdArgs a) {
  using T = FwdTiles<F, Sizes>;
  extern __shared__ __align__(16) unsigned char memory[];
  const SsdDims& dims = a.p.dims;
  const int64_t slices = (dims.p + T::kP - 1) / T::kP;
  unsigned id = blockIdx.x;
  const int first_p = int(id % unsigned(slices)) * T::kP;
  id /= unsigned(slices);
  const int head = int(id % unsigned(dims.h));
  id /= unsigned(dims.h);
  Forward<F, Sizes> forward(a, *reinterpret_cast<T*>(memory), int(id % unsigned(dims.b)), head,
                            int(id / unsigned(dims.b)), first_p);
  if (is_invalid_pack(a.seqs, dims.l))
    forward.fill_nan();
  else
    forward.run();
}

// The final states of rows or sequences without tokens.
template <class R>
__global__ void pass_all_states(const R* from, R* to, int64_t count, const Sequences seqs, int64_t l) {
  const bool invalid = is_invalid_pack(seqs, l);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x)
    to[i] = invalid ? R(NAN) : from ? from[i] : R(0);
}

// Pieces of the rows, where whole rows are too few blocks to fill the GPU.
template <class F, class Sizes>
SsdPieces pieces_of(const SsdDims& dims) {
  using T = FwdTiles<F, Sizes>;
  constexpr int64_t kFewestTokens = 1024;  // of a piece: their states are run twice
  const int64_t q = std::min<int64_t>(dims.q, T::kQ), cells = ceil_div(dims.l, q);
  const int64_t blocks = std::max<int64_t>(dims.b * dims.h * ceil_div(dims.p, T::kP), 1);
  const int64_t wanted =
      std::clamp<int64_t>(T::kBlocks * multiprocessors() / blocks, 1,
                          std::max<int64_t>(std::min(dims.l / kFewestTokens, most_pieces(cells)), 1));
  SsdPieces pieces{};
  pieces.q = q;
  pieces.cells = ceil_div(cells, wanted);
  pieces.count = ceil_div(cells, std::max<int64_t>(pieces.cells, 1));
  return pieces;
}

// f.template operator()<F, Sizes>() for the types and widths of a call, and what the GPU has.
template <class Function>
auto by_kernel(const SsdFwd& p, Function f) {
  return by_factors(p, [&]<class F>() {
    return by_width(p.dims.n, [&]<int kN>() {
      constexpr int kBytes = sizeof(typename F::Element);
      using Large = FwdSizes<kBytes, kN, false>;
      using Small = FwdSizes<kBytes, kN, kBytes == 2 && (kN > 128)>;
      return FwdTiles<F, Large>::bytes(bool(p.z)) <= shared_bytes() ? f.template operator()<F, Large>()
                                                                    : f.template operator()<F, Small>();
    });
  });
}

template <class F, class Sizes>
const char* launch(const SsdFwd& p, const Sequences& seqs, int64_t states, void* workspace,
                   cudaStream_t stream) {
  using T = FwdTiles<F, Sizes>;
  using R = typename F::Real;
  const SsdDims& dims = p.dims;
  SsdPieces pieces = pieces_of<F, Sizes>(dims);
  if (pieces.count > 1) {
    SsdBwd inner{};
    inner.fwd = p;
    pieces.ends[0] = workspace;
    pieces.decays[0] = static_cast<char*>(workspace) + aligned(pieces.size(dims) * sizeof(R));
    if (const char* error = ssd_ends(inner, seqs, pieces, stream)) return error;
  }
  const std::initializer_list<int64_t> tokens = {dims.b, dims.l, dims.h, dims.p};
  const FwdArgs a{.p = p,
                  .seqs = seqs,
                  .states = states,
                  .x = rows_of<F>(p.x, tokens),
                  .z = rows_of<F>(p.z, tokens),
                  .y = rows_of<F>(p.y, tokens),
                  .B = rows_of<F>(p.B, {dims.b, dims.l, dims.groups_B, dims.n}),
                  .C = rows_of<F>(p.C, {dims.b, dims.l, dims.groups_C, dims.n}),
                  .pieces = pieces};
  const int64_t blocks = pieces.count * dims.b * dims.h * ceil_div(dims.p, T::kP);
  if (blocks > INT_MAX) return "more blocks than one launch may have";
  const int bytes = T::bytes(bool(p.z));
  if (const char* error = allow_shared(ssd_forward<F, Sizes>, bytes)) return error;
  ssd_forward<F, Sizes><<<unsigned(blocks), T::kThreads, bytes, stream>>>(a);
  return launch_error();
}

}  // namespace

}  // namespace gpu

int64_t ssd_fwd_portable_workspace(const SsdFwd& p, const Sequences&, int64_t) {
  using namespace gpu;
  return by_kernel(p, [&]<class F, class Sizes>() -> int64_t {
    const SsdPieces pieces = pieces_of<F, Sizes>(p.dims);
    const int64_t real = sizeof(typename F::Real);
    return pieces.count > 1 ? aligned(pieces.size(p.dims) * real) + aligned(pieces.heads(p.dims) * real) : 0;
  });
}

const char* ssd_fwd_portable(const SsdFwd& p, const Sequences& seqs, int64_t states, void* workspace,
                             void* cuda_stream) {
  using namespace gpu;
  const SsdDims& dims = p.dims;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  if (dims.b * dims.l * dims.h > 0)
    return by_kernel(
        p, [&]<class F, class Sizes>() { return launch<F, Sizes>(p, seqs, states, workspace, stream); });
  const int64_t count = states * dims.h * dims.p * dims.n;
  if (!p.states_out || count == 0) return nullptr;
  return by_factors(p, [&]<class F>() {
    using R = typename F::Real;
    pass_all_states<R><<<256, 256, 0, stream>>>(static_cast<const R*>(p.states_in),
                                                static_cast<R*>(p.states_out), count, seqs, dims.l);
    return launch_error();
  });
}

}  // namespace mamba_ops

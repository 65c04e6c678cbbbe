// SSD, backward on Hopper (math: kernels/ssd.h and, step by step, the headers of the launches). p = 64, n =
// 64 or 128, bfloat16 or float16, no states of packed sequences; other calls are the portable kernels'.
//
// Four launches, nothing saved but the inputs:
//   steps    delta and the sums s of every token (and D in float32), so that no other launch reads dt
//   states   H at the left edge of every chunk of 128 tokens by the forward recurrence, the gradient G of the
//            state at its right edge by the reversed one, in 16 bits; few chains over long rows in segments
//   chunks   a block of heads and 64 tokens at a time: dx; dB, dC, the sums for the steps, per block of heads
//   reduce   ddt, and the sums over tokens (dA, ddt_bias, dD) and over blocks of heads (dB, dC)
//
// With a gate the first launch is that of ssd_bwd_gate.cu: the forward once more, for the gradients of o and
// z and the sums for dD; it makes the steps too. Where its blocks wait for each other a memset clears its
// flags.
//
// Chunks are 128 tokens for the states, which halves their traffic, and 64 for everything else, so that what
// the heads of a group add up to (dB, dC, dCB) fits in registers.
//
// Budget per head and 64 tokens, n = 128, 16-bit values:
//   memory     x, dy twice, dx, H and G written and read: 9 tiles of 8 KiB, and 1.5 KiB of float32 sums
//   products   states 2 x 8 units of 64 x 64 x 16 (32 cycles each), chunks 48: 2048 cycles in all
//   shared     chunks: 57 KiB loaded, 160 KiB read by products, 120 KiB as fragments, CB, P and dx: at 128
//              bytes a cycle 2700 cycles, the next wall after what is measured below
//
// Workspace: 2.2 times x at n = 128 (per token and head 256 bytes of states and 25 of steps and sums), at any
// length, and at most 17 MiB of states that blocks hand over; a gate adds one x and 9 MiB.
//
// Measured on an H200 (copy 4.17 TB/s; bf16, D, dt_bias, softplus; ms, medians, L2 flushed; launches by ncu):
//   b l h groups (n = 128)   whole   steps   states   chunks   reduce
//   4 4096 80 1              0.650   0.015   0.201    0.399    0.029   (packed: 0.662; n = 64: 0.547)
//   8 2048 24 1              0.231   0.014   0.065    0.136    0.014
//   2 8192 128 8             1.10    0.018   0.332    0.704    0.038
//   1 65536 32 1             1.24    0.017   0.524    0.670    0.036
//   1 65536 128 1            4.20
// All before the edges took the weighted tokens of dB and dC as sums of two factors (errors 1.02 times
// mamba_ssm's, were 1.13 times): since then the first row takes 0.69. With a gate it takes 0.97 (n = 64:
// 0.82), the second 0.34, the third 1.62. What bounds it, first row (ncu): states: L2 88 % and DRAM 76 % of
// their peaks. With 320 chains uncut on 264 places, 56 in a second round, the whole took 0.72 ms; one block
// of four heads and three stages an SM, 0.76. chunks: the latency of the pairs, whose first warp has the most
// of them: issue slots 43 %, L2 65 %, DRAM 50 %, shared memory 64 %. It took 0.425 ms while the edges were
// unrolled further (1.0 warps waited for instructions at each one issued, now 0.6) and the pairs read shared
// memory only where they needed it. One warpgroup for pairs and inputs together took 0.50 ms, sums over
// columns for dD in the inputs' 0.52 ms (H100). No gain: launches that begin early; the last sums of the
// pairs by the warps with the fewest; a third stage of states for n = 64.
//
// Deterministic: every sum has an order fixed by the sizes alone (blocks of heads are chosen for 132 SMs on
// any GPU); the integer counters of `reduce` only tell which block is last.
#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/sm90/ssd_bwd_edges.cuh"
#include "kernels/cuda/sm90/ssd_bwd_gate.h"
#include "kernels/cuda/sm90/ssd_bwd_inputs.cuh"
#include "kernels/cuda/sm90/ssd_bwd_pairs.cuh"
#include "kernels/cuda/sm90/ssd_bwd_reduce.cuh"
#include "kernels/cuda/sm90/ssd_bwd_states.cuh"
#include "kernels/cuda/sm90/ssd_bwd_steps.cuh"
#include "kernels/cuda/sm90/tensor_map.h"
#include "kernels/cuda/ssd.h"

namespace mamba_ops {

namespace gpu::sm90 {

namespace {

template <class T, int kN, bool kPacked>
__global__ void __launch_bounds__(kChunkThreads, 1)
    ssd_bwd_chunks(const __grid_constant__ SsdBwdMaps maps, const __grid_constant__ SsdBwdArgs a) {
  using Shared = ChunksShared<kN>;
  extern __shared__ uint8_t raw_shared[];
  uint8_t* shared = raw_shared + (-shared_address(raw_shared) & 1023);
  const uint32_t base = shared_address(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      barrier_init(base + Shared::kFull + 8 * i, 1);
      barrier_init(base + Shared::kEmpty + 8 * i, 3 * kWarpgroup);
    }
    barrier_init(base + Shared::kFactorsReady, 1);
    for (int i = 0; i < 2; ++i) barrier_init(base + Shared::kPReady + 8 * i, 4);
    barrier_init(base + Shared::kPFree, 4);
    barriers_ready();
  }
  __syncthreads();
  // Of 128 registers a thread.
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    take_registers<184>();
    walk_pairs<T, kN, kPacked>(a, shared, base);
  } else if (warpgroup == 1) {
    give_registers<104>();
    walk_inputs<T, kN, kPacked>(maps, a, shared, base);
  } else if (warpgroup == 2) {
    take_registers<200>();
    walk_edges<T, kN, kPacked>(maps, a, shared, base);
  } else {
    give_registers<24>();
    if (threadIdx.x == 3 * kWarpgroup) load_heads<kN>(maps, a, base);
  }
}

constexpr int kSms = 132;  // what blocks of heads are chosen for: sums come out the same on every GPU
constexpr int kStateBlocks = 2 * kSms;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Workspace {
  int64_t grad_o, gate, starts, states, steps, sums, anchors, D, skips, partial_BC, partial_h, arrived;
  int64_t flags, handed, decays, bytes;
};

// Heads of a block such that the blocks fill the SMs in whole turns; entering a tile costs about as much as
// two heads.
int heads_of_block(int64_t tiles, int shares, int sharing) {
  int best = sharing;
  double best_cost = INFINITY;
  for (int blocks = 1; blocks <= sharing; ++blocks) {
    const int heads = int(ceil_div(sharing, blocks));
    const double cost = double(ceil_div(tiles * shares * ceil_div(sharing, heads), kSms)) * (heads + 2);
    if (cost < 0.98 * best_cost) {
      best_cost = cost;
      best = heads;
    }
  }
  return best;
}

SsdBwdArgs arguments(const SsdBwd& p, const Sequences& seqs) {
  const SsdDims& dims = p.fwd.dims;
  SsdBwdArgs a{};
  a.p = p;
  a.p.fwd.z = a.p.dz = {};
  a.seqs = seqs;
  if (!dims.D_per_channel) a.p.fwd.D.stride[1] = 0;
  a.b = int(dims.b);
  a.l = int(dims.l);
  a.h = int(dims.h);
  a.tiles = int(ceil_div(dims.l, kTile));
  a.chunks = int(ceil_div(dims.l, kChunk));
  a.heads_per_B = int(dims.h / dims.groups_B);
  a.heads_per_C = int(dims.h / dims.groups_C);
  a.sharing = int(dims.sharing());
  a.shares = a.h / a.sharing;
  a.heads = heads_of_block(dims.b * a.tiles, a.shares, a.sharing);
  a.blocks = int(ceil_div(a.sharing, a.heads));
  a.blocks_B = a.heads_per_B / a.sharing * a.blocks;
  a.blocks_C = a.heads_per_C / a.sharing * a.blocks;
  a.parts = int(std::clamp<int64_t>(dims.b * a.chunks / 2, 1, 128));
  a.makes_skips = p.fwd.D && !p.fwd.z;
  const int chains = int(2 * ceil_div(a.sharing, kStateHeads) * a.shares * a.b);
  // Segments where chains leave SMs idle. Two would gain nothing: all but the last are walked twice.
  a.segments = std::min(kStateBlocks / chains, a.tiles / 4);
  if (a.segments < 3) a.segments = 1;
  a.cut = {a.tiles, chains, a.segments > 1 ? a.segments * chains : std::min(chains, kStateBlocks)};
  return a;
}

// The gradient of o, in the workspace.
View grad_of_o(const SsdBwd& p, void* data) {
  const SsdDims& dims = p.fwd.dims;
  return {data, p.dy.dtype, {dims.l * dims.h * dims.p, dims.h * dims.p, dims.p, 1}};
}

// p: with its gate.
Workspace workspace(const SsdBwdArgs& a, const SsdBwd& p) {
  const int64_t heads = int64_t(a.b) * a.h;
  Workspace at{};
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at.bytes;
    at.bytes += ceil_div(bytes, 256) * 256;
    return begin;
  };
  const int64_t n = p.fwd.dims.n;
  if (p.fwd.z) {
    at.grad_o = take(heads * a.l * kTile * 2);
    at.gate = take(ssd_bwd_gate_workspace(p, a.seqs));
  }
  at.starts = take(a.seqs.has_runs() ? int64_t(a.b) * a.chunks * 2 * sizeof(uint64_t) : 0);
  at.states = take(heads * a.chunks * 2 * (n / 64) * kTileBytes);
  at.steps = take(heads * a.chunks * kStepBytes);
  at.sums = take(heads * a.tiles * kSums * kTile * sizeof(float));
  at.anchors = take(heads * a.chunks * 4 * sizeof(float));
  at.D = take(a.h * kTile * sizeof(float));
  at.skips = take(heads * a.tiles * 4 * (p.fwd.dims.D_per_channel ? kTile : 1) * sizeof(float));
  at.partial_BC = take(
      a.sums_blocks() ? int64_t(a.blocks) * a.shares * a.b * a.tiles * kTile * 2 * n * sizeof(float) : 0);
  at.partial_h = take(int64_t(a.parts) * a.h * kHeadSums * sizeof(double));
  at.arrived = take(a.h * sizeof(int));
  if (const int64_t handed = a.handed_count()) {
    at.flags = take((1 + handed) * sizeof(int));
    at.handed = take(handed * kTile * n * sizeof(float));
    at.decays = take(handed * sizeof(float));
  }
  return at;
}

struct TokenDims {
  MapDim dim[4];
};
TokenDims token_dims(const View& v, int64_t inner, const SsdDims& dims, int64_t middle, int box) {
  return {{{inner, v.stride[3], 64},
           {dims.l, v.stride[1], box},
           {middle, v.stride[2], 1},
           {dims.b, v.stride[0], 1}}};
}

const char* make_maps(SsdBwdMaps& maps, const SsdBwd& p) {
  const SsdDims& dims = p.fwd.dims;
  const char* error = nullptr;
  const auto make = [&](CUtensorMap& map, const View& v, int64_t inner, int64_t middle, int box) {
    if (!error)
      error = make_map(map, v.dtype, v.data, token_dims(v, inner, dims, middle, box).dim, 4,
                       CU_TENSOR_MAP_SWIZZLE_128B);
  };
  make(maps.x, p.fwd.x, dims.p, dims.h, kTile);
  make(maps.dy, p.dy, dims.p, dims.h, kTile);
  make(maps.dx, p.dx, dims.p, dims.h, 16);
  make(maps.B, p.fwd.B, dims.n, dims.groups_B, kTile);
  make(maps.C, p.fwd.C, dims.n, dims.groups_C, kTile);
  return error;
}

template <class Kernel>
const char* allow_shared(Kernel kernel, int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// After the steps.
template <class T, int kN>
const char* launch(const SsdBwdMaps& maps, const SsdBwdArgs& a, cudaStream_t stream) {
  constexpr int kStatesBytes = StatesShared<kN>::kBytes, kChunksBytes = ChunksShared<kN>::kBytes;
  const auto states = ssd_bwd_states<T, kN>;
  const auto chunks = a.starts ? ssd_bwd_chunks<T, kN, true> : ssd_bwd_chunks<T, kN, false>;
  if (const char* error = allow_shared(states, kStatesBytes)) return error;
  if (const char* error = allow_shared(chunks, kChunksBytes)) return error;
  const int64_t items = int64_t(a.tiles) * a.b * a.blocks * a.shares;
  const int64_t sum_blocks = ceil_div(a.h, kReduceHeads) * a.parts,
                factor_blocks = a.sums_blocks() ? 2 * kSms : 0;
  const auto reduce = a.p.fwd.dt.dtype == DType::f32 ? ssd_bwd_reduce<T, float> : ssd_bwd_reduce<T, T>;
  states<<<a.cut.blocks, kStateThreads, kStatesBytes, stream>>>(maps, a);
  chunks<<<unsigned(std::min<int64_t>(items, kSms)), kChunkThreads, kChunksBytes, stream>>>(maps, a);
  reduce<<<unsigned(sum_blocks + factor_blocks), kReduceThreads, 0, stream>>>(a);
  return launch_error();
}

const char* run(const SsdBwd& p, const Sequences& seqs, void* memory, cudaStream_t stream) {
  SsdBwdArgs a = arguments(p, seqs);
  const Workspace at = workspace(a, p);
  uint8_t* base = static_cast<uint8_t*>(memory);
  if (p.fwd.z) a.p.dy = grad_of_o(p, base + at.grad_o);
  a.starts = seqs.has_runs() ? reinterpret_cast<uint64_t*>(base + at.starts) : nullptr;
  a.states = base + at.states;
  a.steps = reinterpret_cast<float*>(base + at.steps);
  a.sums = reinterpret_cast<float*>(base + at.sums);
  a.anchors = reinterpret_cast<float*>(base + at.anchors);
  a.D = p.fwd.D ? reinterpret_cast<float*>(base + at.D) : nullptr;
  a.skips = reinterpret_cast<float*>(base + at.skips);
  a.partial_BC = reinterpret_cast<float*>(base + at.partial_BC);
  a.partial_h = reinterpret_cast<double*>(base + at.partial_h);
  a.arrived = reinterpret_cast<int*>(base + at.arrived);
  a.ticket = reinterpret_cast<int*>(base + at.flags);
  a.flags = a.ticket + 1;
  a.handed = reinterpret_cast<float*>(base + at.handed);
  a.decays = reinterpret_cast<float*>(base + at.decays);
  SsdBwdMaps maps;
  if (const char* error = make_maps(maps, a.p)) return error;
  const DType type = p.fwd.x.dtype, dt_type = p.fwd.dt.dtype;
  if (p.fwd.z) {
    if (const char* error = ssd_bwd_gate(p, a, base + at.gate, stream)) return error;
  } else {
    const auto steps = dt_type == DType::f32    ? ssd_bwd_steps<float>
                       : dt_type == DType::bf16 ? ssd_bwd_steps<bf16>
                                                : ssd_bwd_steps<f16>;
    steps<<<step_blocks(a), 32 * kStepWarps, 0, stream>>>(a);
  }
  if (p.fwd.dims.n == 128)
    return type == DType::bf16 ? launch<bf16, 128>(maps, a, stream) : launch<f16, 128>(maps, a, stream);
  return type == DType::bf16 ? launch<bf16, 64>(maps, a, stream) : launch<f16, 64>(maps, a, stream);
}

}  // namespace

}  // namespace gpu::sm90

bool ssd_bwd_hopper_takes(const SsdBwd& p, const Sequences& seqs) {
  using namespace gpu::sm90;
  const SsdFwd& f = p.fwd;
  const SsdDims& dims = f.dims;
  const DType type = f.x.dtype;
  if ((type != DType::bf16 && type != DType::f16) || f.B.dtype != type || f.C.dtype != type ||
      p.dy.dtype != type || p.dx.dtype != type || dims.p != kTile || (dims.n != 64 && dims.n != 128))
    return false;
  // In a pack every sequence has states of its own: chunks that straddle sequences cannot carry them.
  if (seqs.cu_seqlens.data && (f.states_in || p.dstates_out)) return false;
  const auto reachable = [&](const View& v, int64_t inner, int64_t middle) {
    return can_map(v.data, token_dims(v, inner, dims, middle, kTile).dim, 4);
  };
  if (!reachable(f.x, dims.p, dims.h) || !reachable(p.dy, dims.p, dims.h) ||
      !reachable(p.dx, dims.p, dims.h) || !reachable(f.B, dims.n, dims.groups_B) ||
      !reachable(f.C, dims.n, dims.groups_C) || !reachable(p.dB, dims.n, dims.groups_B) ||
      !reachable(p.dC, dims.n, dims.groups_C))
    return false;
  if (f.z && !(reachable(p.dz, dims.p, dims.h) && ssd_bwd_gate_takes(p, grad_of_o(p, nullptr), seqs)))
    return false;
  for (const void* states : {f.states_in, p.dstates_out})
    if (reinterpret_cast<uintptr_t>(states) % sizeof(float2)) return false;
  // Tokens, tiles and blocks are counted in 32 bits.
  const int64_t blocks = dims.b * ceil_div(dims.l, kTile) * dims.h;
  if (dims.l >= int64_t(1) << 30 || blocks >= int64_t(1) << 30) return false;
  return gpu::device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

int64_t ssd_bwd_hopper_workspace(const SsdBwd& p, const Sequences& seqs, int64_t) {
  using namespace gpu::sm90;
  return workspace(arguments(p, seqs), p).bytes;
}

const char* ssd_bwd_hopper(const SsdBwd& p, const Sequences& seqs, int64_t, void* memory, void* stream) {
  return gpu::sm90::run(p, seqs, memory, static_cast<cudaStream_t>(stream));
}

}  // namespace mamba_ops

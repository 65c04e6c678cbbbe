// SSD, forward, on Hopper (math: kernels/ssd.h; cutting and steps: ssd_fwd.cuh; the two halves of a block:
// ssd_fwd_help.cuh, ssd_fwd_slab.cuh; long sequences: ssd_fwd_ends.cuh).
//
//   Y^T = e^{s_i} o (H C^T) + X^T P^T,  P_ij = (C_i . B_j) e^{s_i - s_j} dt_j for i >= j, + D where i = j
//   H  <- e^T H + (X o w)^T B,          w_j = e^{T - s_j} dt_j
//
// A block owns a pair of slabs of one batch row and walks along the sequence in chunks of 64 tokens; 512
// threads, one block per SM:
//   warpgroups 0, 1  a slab each. H (64 x n, float32) stays in registers and is rounded straight into
//                    fragments; every product has the slab's 64 channels as its rows.
//   warpgroups 2, 3  even and odd chunks: steps and decays (warps 0, 1), loads of the chunk after (warp 2),
//                    C B^T once for both slabs, P for each (16 x 16 blocks left of the diagonal as products
//                    of row and column factors, all <= 1 for A <= 0; the blocks on it with direct
//                    exponentials).
// Shared memory (n = 128: 225 KiB): 3 stages (n = 64: 4) of B, C and the pair's X; P for 2 chunks; 2 tiles of
// z and y per slab, the gate works in place; the factors of 4 chunks.
//
// Hand-over (hand_over.cuh). Where a chain is cut between two blocks, the later part waits for a flag of the
// block before, which makes the state that it hands over first, before it waits for anything. Ticket and
// flags are cleared by a memset in front of the kernel: a replayed graph clears them too. No sum depends on
// the order of blocks: bitwise repeatable.
//
// Threads that hand over what they stored themselves arrive at the barriers one by one, not one for its warp:
// the compiler drops __syncwarp() where a warp is whole, and racecheck sees no other order among its threads.
//
// Measured (b4 l4096 h80 p64 g1 bf16, D, dt bias, softplus; ms, medians, L2 flushed; in brackets x and y from
// L2):
//                           n = 128           gate              n = 64            b8 l2048 h24, n = 128
//   H200 (4.2 TB/s)         0.136 (0.133)     0.178 (0.170)     0.117 (0.111)     0.054
//   H100 (2.97 TB/s)        0.149 (0.130)     0.206 (0.170)     0.144 (0.107)     0.055   (w of one half)
// w_j is the sum of two halves: one half costs y a fifth of its accuracy, and saves 2 %.
// Bound: where memory is fast, the latency of the chain through a chunk. ncu (H100, n = 128): by count of
// cycles tensor cores 47 %, issue slots 36 %, shared memory and L1 63 %; the same tiles of x and y copied in
// the same order, and nothing else, take 0.124 ms there. Slabs and helpers wait for each other in turn: the
// slabs for P, steps, X, B and C in a third of their samples, the helpers for B and C, whose stage the slabs
// free late, in 16 %, for their warps 0, 1 in 16 %. No gain: X in a ring of its own, with four stages of B
// and C and z and y in one tile a slab (0.144 instead of 0.133, gate 0.22: H200); the steps of the next chunk
// made beside C B^T (0.154 instead of 0.149: H100); flags cleared by a launch beside which the blocks start;
// loads and stores that L2 drops first; P of both slabs at once where n = 64 leaves the registers.
#include "kernels/cuda/sm90/ssd_fwd_call.h"
#include "kernels/cuda/sm90/ssd_fwd_ends.cuh"
#include "kernels/cuda/sm90/ssd_fwd_slab.cuh"
#include "kernels/cuda/ssd.h"

namespace mamba_ops {

namespace gpu::sm90::forward {

namespace {

template <class T, class Dt, int kN, bool kPacked>
__global__ void __launch_bounds__(512, 1)
    ssd_fwd_chunks(const __grid_constant__ Maps maps, const __grid_constant__ FwdArgs args) {
  extern __shared__ uint8_t memory[];
  __shared__ int ticket;
  if (threadIdx.x == 0) ticket = args.take_number();
  run_block<T, Dt, kN, kPacked>(maps, args, memory, ticket);
}

template <class T, class Dt, int kN, bool kPacked>
const char* launch(const Maps& maps, const FwdArgs& args, cudaStream_t stream) {
  const Plan& plan = args.plan;
  cudaError_t error = clear_flags(args, stream);
  if (error == cudaSuccess && plan.segments > 1) {
    constexpr int kBytes = EndsShared<kN>::kBytes;
    error = allow_shared(ssd_fwd_ends<T, Dt, kN, kPacked>, kBytes);
    if (error == cudaSuccess)
      ssd_fwd_ends<T, Dt, kN, kPacked><<<plan.chains * plan.ends(), 384, kBytes, stream>>>(maps, args);
  }
  constexpr int kBytes = Shared<kN>::kBytes;
  if (error == cudaSuccess) error = allow_shared(ssd_fwd_chunks<T, Dt, kN, kPacked>, kBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  ssd_fwd_chunks<T, Dt, kN, kPacked><<<plan.blocks, 512, kBytes, stream>>>(maps, args);
  return launch_error();
}

}  // namespace

}  // namespace gpu::sm90::forward

bool ssd_fwd_hopper_takes(const SsdFwd& p, const Sequences& seqs) {
  using namespace gpu::sm90::forward;
  const SsdDims& dims = p.dims;
  const DType type = p.x.dtype;
  if (type != DType::bf16 && type != DType::f16) return false;
  if (p.B.dtype != type || p.C.dtype != type || (p.z && p.z.dtype != type)) return false;
  const bool whole_slabs =
      dims.p == 128 || dims.p == 256 || (dims.p >= 32 && dims.p <= 64 && dims.p % 8 == 0);
  if (!whole_slabs || dims.n < 16 || dims.n > 128 || dims.n % 8) return false;
  for (const void* states : {p.states_in, static_cast<const void*>(p.states_out)})
    if (reinterpret_cast<uintptr_t>(states) % sizeof(float2)) return false;
  // In a pack every sequence has states of its own: chunks that straddle sequences cannot carry them.
  if (seqs.cu_seqlens.data && (p.states_in || p.states_out)) return false;
  for (const View* v : {&p.x, &p.y, &p.z})
    if (*v && !can_map(v->data, slab_map(dims, *v, 1, 1).dims, 5)) return false;
  if (!can_map(p.B.data, group_map(dims, p.B, dims.groups_B).dims, 4)) return false;
  if (!can_map(p.C.data, group_map(dims, p.C, dims.groups_C).dims, 4)) return false;
  return gpu::device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

int64_t ssd_fwd_hopper_workspace(const SsdFwd& p, const Sequences& seqs, int64_t) {
  using namespace gpu::sm90::forward;
  FwdArgs args = fwd_args(p, seqs);
  return place(args, padded_n(p.dims), nullptr);
}

const char* ssd_fwd_hopper(const SsdFwd& p, const Sequences& seqs, int64_t, void* workspace,
                           void* cuda_stream) {
  using namespace gpu::sm90::forward;
  const SsdDims& dims = p.dims;
  FwdArgs args = fwd_args(p, seqs);
  place(args, padded_n(dims), workspace);
  Maps maps{};
  if (const char* error = make_maps(maps, p, args)) return error;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const auto go = [&]<class T, class Dt>() {
    const auto sized = [&]<int kN>() {
      return seqs.has_runs() ? launch<T, Dt, kN, true>(maps, args, stream)
                             : launch<T, Dt, kN, false>(maps, args, stream);
    };
    return padded_n(dims) == 64 ? sized.template operator()<64>() : sized.template operator()<128>();
  };
  const bool wide_steps = p.dt.dtype == DType::f32;
  if (p.x.dtype == DType::bf16)
    return wide_steps ? go.operator()<bf16, float>() : go.operator()<bf16, bf16>();
  return wide_steps ? go.operator()<f16, float>() : go.operator()<f16, f16>();
}

}  // namespace mamba_ops

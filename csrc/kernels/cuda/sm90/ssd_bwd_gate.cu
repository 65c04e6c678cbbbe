// The SSD's gradient of the gate, on Hopper: what the backward begins with where there is a gate.
//
//   o: the forward without its gate;   do = dy silu(z)   dz = dy o silu'(z)   dD = sum do x
//
// The forward once more (ssd_fwd.cu: a block owns a pair of slabs, 512 threads), whose accumulators of o go
// through dy and z, which take the place of its tiles of z and y: z and dy of a chunk come while its products
// run, dz and do leave from where they lay. So o is never rounded, nor what dD sums. Blocks begin with the
// steps that the next launches read (ssd_bwd_steps.cuh).
//
// Sequences in segments: a block makes the end of its own segment first, and raises a flag, then waits for
// those of the segments before (the forward has a launch for that).
//
// Deterministic: as the forward; the sums for dD are of one chunk and 16 channels, added up by the last
// launch.
//
// Measured: b4 l4096 h80 n128 bf16, D, on an H200 (copy 4.19 TB/s) 0.297 ms of the whole backward's 0.98
// (ncu); 0.97 since z and dy are fetched to L2 a chunk ahead. Five tensors of x's size are 0.20. Bound by the
// chain through a chunk, 3.8 us where the forward with a gate takes 2.3: z and dy have one tile each a slab,
// so that they come only when dz and do have left. DRAM 61 %, L2 41 %, shared memory 39 %, issue slots 39 %.
// With the steps in a launch of their own the backward takes 0.004 to 0.04 ms more.
#include "kernels/cuda/sm90/ssd_bwd_gate.h"

#include "kernels/cuda/sm90/ssd_bwd_steps.cuh"
#include "kernels/cuda/sm90/ssd_fwd_call.h"
#include "kernels/cuda/sm90/ssd_fwd_ends.cuh"
#include "kernels/cuda/sm90/ssd_fwd_slab.cuh"
#include "kernels/cuda/ssd.h"

namespace mamba_ops::gpu::sm90 {

using namespace forward;

namespace {

template <class T, class Dt, int kN, bool kPacked>
__global__ void __launch_bounds__(512, 1)
    ssd_bwd_gate_chunks(const __grid_constant__ GateMaps maps, const __grid_constant__ FwdArgs args,
                        const __grid_constant__ SsdBwdArgs a, unsigned step_blocks) {
  extern __shared__ uint8_t memory[];
  __shared__ int number;
  if (threadIdx.x == 0) number = args.take_number();
  for (unsigned block = blockIdx.x; block < step_blocks; block += gridDim.x) {
    make_steps<Dt, 16>(a, block, *reinterpret_cast<StepBuffer*>(memory));
    __syncthreads();
  }
  fence_async_proxy();
  __syncthreads();
  const int segment = number % args.plan.segments, warpgroup = threadIdx.x / 128;
  if (segment + 1 < args.plan.segments) {
    make_end<T, Dt, kN, kPacked>(maps, args, memory, number / args.plan.segments, segment);
    fence_async_proxy();
    __threadfence();
    __syncthreads();
    if (warpgroup < 2) raise_flag(flag_of(args, number, warpgroup), 1 + warpgroup);
  }
  run_block<T, Dt, kN, kPacked>(maps, args, memory, number);
}

template <class T, class Dt, int kN, bool kPacked>
const char* launch(const GateMaps& maps, const FwdArgs& args, const SsdBwdArgs& a, cudaStream_t stream) {
  constexpr int kBytes = std::max(Shared<kN>::kBytes, EndsShared<kN>::kBytes);
  const auto kernel = ssd_bwd_gate_chunks<T, Dt, kN, kPacked>;
  cudaError_t error = clear_flags(args, stream);
  if (error == cudaSuccess) error = allow_shared(kernel, kBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kernel<<<args.plan.blocks, 512, kBytes, stream>>>(maps, args, a, step_blocks(a));
  return launch_error();
}

}  // namespace

bool ssd_bwd_gate_takes(const SsdBwd& p, const View& grad_o, const Sequences& seqs) {
  SsdFwd forward = p.fwd;
  forward.y = grad_o;
  return ssd_fwd_hopper_takes(forward, seqs);
}

int64_t ssd_bwd_gate_workspace(const SsdBwd& p, const Sequences& seqs) {
  FwdArgs args = fwd_args(p.fwd, seqs, true);
  return place(args, padded_n(p.fwd.dims), nullptr);
}

const char* ssd_bwd_gate(const SsdBwd& p, const SsdBwdArgs& a, void* workspace, cudaStream_t stream) {
  const SsdDims& dims = p.fwd.dims;
  SsdFwd forward = p.fwd;
  forward.y = p.dz;
  FwdArgs args = fwd_args(forward, a.seqs, true);
  place(args, padded_n(dims), workspace);
  args.skips = a.D ? a.skips : nullptr;
  GateMaps maps{};
  const auto make = [&](CUtensorMap& map, const View& v) {
    return make_map(map, v.dtype, v.data, slab_map(dims, v, 1, 1).dims, 5, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (const char* error = make_maps(maps, forward, args)) return error;
  if (const char* error = make(maps.dy, p.dy)) return error;
  if (const char* error = make(maps.grad_o, a.p.dy)) return error;
  const auto go = [&]<class T, class Dt>() {
    const auto sized = [&]<int kN>() {
      return a.seqs.has_runs() ? launch<T, Dt, kN, true>(maps, args, a, stream)
                               : launch<T, Dt, kN, false>(maps, args, a, stream);
    };
    return padded_n(dims) == 64 ? sized.template operator()<64>() : sized.template operator()<128>();
  };
  const bool wide_steps = forward.dt.dtype == DType::f32;
  if (forward.x.dtype == DType::bf16)
    return wide_steps ? go.operator()<bf16, float>() : go.operator()<bf16, bf16>();
  return wide_steps ? go.operator()<f16, float>() : go.operator()<f16, f16>();
}

}  // namespace mamba_ops::gpu::sm90

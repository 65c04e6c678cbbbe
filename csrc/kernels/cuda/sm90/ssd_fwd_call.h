// What the host prepares for a launch of the Hopper forward of the SSD: how the call is cut, its workspace,
// its tensor maps.
#pragma once
#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/sm90/ssd_fwd.cuh"
#include "kernels/cuda/sm90/tensor_map.h"

namespace mamba_ops::gpu::sm90::forward {

inline int slabs_of(const SsdDims& dims) { return dims.p <= 64 ? 1 : int(dims.p / 64); }
inline int padded_n(const SsdDims& dims) { return dims.n <= 64 ? 64 : 128; }

// makes_ends: of Plan.
inline FwdArgs fwd_args(const SsdFwd& p, const Sequences& seqs, bool makes_ends = false) {
  const SsdDims& dims = p.dims;
  FwdArgs args{};
  args.l = int(dims.l);
  args.h = int(dims.h);
  args.p = int(dims.p);
  args.n = int(dims.n);
  args.slabs = slabs_of(dims);
  args.share = int(dims.sharing()) * args.slabs;
  args.pairs_of_share = (args.share + 1) / 2;
  args.pairs = int(dims.h / dims.sharing()) * args.pairs_of_share;
  args.heads_per_B = int(dims.h / dims.groups_B);
  args.heads_per_C = int(dims.h / dims.groups_C);
  args.softplus = dims.softplus;
  args.D_per_channel = p.D && dims.D_per_channel;
  args.z = bool(p.z);
  args.dt_min = float(dims.dt_min);
  args.dt_max = float(dims.dt_max);
  args.dt = p.dt;
  args.A = p.A;
  args.dt_bias = p.dt_bias;
  args.D = p.D;
  args.seqs = seqs;
  args.states_in = static_cast<const float*>(p.states_in);
  args.states_out = static_cast<float*>(p.states_out);

  // Segments of a chain where chains leave SMs idle. What enters one is put together from all ends before it:
  // at most 2 sqrt(chunks) segments.
  Plan& plan = args.plan;
  const int sms = int(multiprocessors());
  plan.chunks = int((dims.l + kQ - 1) / kQ);
  plan.chains = int(dims.b) * args.pairs;
  plan.segments = std::max(1, std::min(sms / plan.chains, plan.chunks / 4));
  while (plan.segments > 1 && int64_t(plan.segments) * plan.segments > 4 * int64_t(plan.chunks))
    --plan.segments;
  plan.blocks = plan.segments > 1 ? plan.segments * plan.chains : std::min(plan.chains, sms);
  plan.makes_ends = makes_ends && plan.segments > 1;
  plan.parts = 1;
  if (plan.segments > 1 && !makes_ends)
    plan.parts = std::clamp(sms / (plan.chains * (plan.segments - 1)), 1, plan.chunks / (4 * plan.segments));
  return args;
}

// Cuts the workspace; returns its size.
inline int64_t place(FwdArgs& args, int kN, void* workspace) {
  const Plan& plan = args.plan;
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    if (workspace)
      pointer =
          reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(workspace) + used);
    used += (count * int64_t(sizeof(*pointer)) + 255) / 256 * 256;
  };
  if (plan.waits()) take(args.ticket, plan.flag_bytes() / int64_t(sizeof(int)));
  if (plan.hands_over()) take(args.handed, int64_t(plan.blocks) * 2 * 64 * kN);
  if (plan.segments > 1) {
    take(args.ends, int64_t(plan.chains) * plan.ends() * 2 * 64 * kN);
    take(args.decays, int64_t(plan.chains) * plan.ends() * 2);
  }
  return used;
}

struct TokenMap {
  MapDim dims[5];
};
// (p, l, slab, h, b) of x, y or z.
inline TokenMap slab_map(const SsdDims& dims, const View& v, int slabs, int heads) {
  return {{{std::min<int64_t>(dims.p, 64), v.stride[3], 64},
           {dims.l, v.stride[1], kQ},
           {slabs_of(dims), 64, slabs},
           {dims.h, v.stride[2], heads},
           {dims.b, v.stride[0], 1}}};
}
// (n, l, g, b) of B or C.
inline TokenMap group_map(const SsdDims& dims, const View& v, int64_t groups) {
  return {{{dims.n, v.stride[3], 64},
           {dims.l, v.stride[1], kQ},
           {groups, v.stride[2], 1},
           {dims.b, v.stride[0], 1},
           {}}};
}

inline const char* make_maps(Maps& maps, const SsdFwd& p, const FwdArgs& args) {
  const SsdDims& dims = p.dims;
  const bool halves = args.slabs > 1;  // a pair: two slabs of a head, or of two heads
  const char* error = nullptr;
  const auto make = [&](CUtensorMap& map, const View& v, const TokenMap& token_map, int rank) {
    if (!error && v)
      error = make_map(map, p.x.dtype, v.data, token_map.dims, rank, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  make(maps.x, p.x, slab_map(dims, p.x, halves ? 2 : 1, halves ? 1 : 2), 5);
  make(maps.z, p.z, slab_map(dims, p.z, 1, 1), 5);
  make(maps.y, p.y, slab_map(dims, p.y, 1, 1), 5);
  make(maps.B, p.B, group_map(dims, p.B, dims.groups_B), 4);
  make(maps.C, p.C, group_map(dims, p.C, dims.groups_C), 4);
  return error;
}

// Before a launch whose blocks wait for each other.
inline cudaError_t clear_flags(const FwdArgs& args, cudaStream_t stream) {
  return args.plan.waits() ? cudaMemsetAsync(args.ticket, 0, args.plan.flag_bytes(), stream) : cudaSuccess;
}

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace mamba_ops::gpu::sm90::forward

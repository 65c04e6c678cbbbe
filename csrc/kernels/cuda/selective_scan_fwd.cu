// Selective scan, forward, for every call (math: kernels/selective_scan.h).
//
//   h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  o_t = k Re(C_t h_t) + D u_t;  y = o silu(z)
//
// Blocks, threads and tiles: selective_scan.cuh. A thread runs its slice of a channel's state through the
// tile, with one exponential and three multiply-adds for a token and state; the Q lanes of a channel add
// their parts of o by shuffles. At a multiple of kScanCheckpointCuda the states are kept for the backward.
// Without kOutput (the first phase of the segment form) only the end states, the sums of delta and the resets
// are made. Shared memory: delta, delta u and o of a tile (12.7 KiB in float), B and C of a pass (5 KiB).
// Every sum has a fixed order: bitwise repeatable. Latency bounds it, of the tile's loads between its
// barriers (b8 d1536 l2048 n16 on an H100: each scheduler issues 0.41 instructions a cycle, from 2.9 warps;
// DRAM 8 %).
#include "kernels/cuda/selective_scan_tile.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kStep = 8;  // tokens whose outputs are summed together

template <class S>
struct FwdTile : ScanTile<S> {
  RealOf<S> o[kScanPlane];
};

template <class S, bool kFast, bool kOutput>
__global__ void __launch_bounds__(kScanMaxThreads, Slice<S>::kStates)
    scan_fwd(const ScanFwd p, const Sequences seqs, const ScanCut cut, const ScanCarry<S> carry) {
  using R = RealOf<S>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& tile = *reinterpret_cast<FwdTile<S>*>(memory);
  const R twice = Number<S>::kParts;  // k

  for (int64_t unit = blockIdx.x; unit < cut.units(p.dims); unit += gridDim.x) {
    const ScanThread<S> me(p.dims, cut, seqs, unit);
    const Factor<S> B(tile.B, p.dims.constant_B, me), C(tile.C, p.dims.constant_C, me);
    R steps = 0;
    bool reset = false;
    __syncthreads();
    tile.load_channels(p, me);

    for (int64_t t0 = me.begin; t0 < me.end; t0 += kScanTile) {
      const int count = me.end - t0 < kScanTile ? int(me.end - t0) : kScanTile;
      const unsigned run_begins = me.run_begins(t0);
      reset |= run_begins != 0;
      __syncthreads();
      for (int pass = 0; pass < cut.passes; ++pass) {
        if (pass > 0) __syncthreads();
        const FactorLoad<S> B_load = load_B(p, me, t0, count, pass),
                            C_load = load_C(p, me, t0, kOutput ? count : 0, pass);
        const Slice<S> A = me.load_rates(p.A, pass);
        Slice<S> h{};
        if (t0 > me.begin || (kOutput && cut.segments > 1))
          h = me.load_carry(carry.states, me.carry_row(), pass);
        if (pass == 0) tile.load_steps(p, me, t0, count, kOutput ? tile.o : nullptr);
        B_load.store(tile.B);
        C_load.store(tile.C);
        if (kOutput && p.checkpoints && t0 % kScanCheckpointCuda == 0 && t0 > 0)
          me.store_checkpoint(p.checkpoints, t0, pass, h);
        __syncthreads();

        // kStep tokens; kBegins: runs begin among them.
        const auto run = [&]<bool kBegins>(int j0) {
          R out[kStep] = {};
#pragma unroll
          for (int j = 0; j < kStep; ++j) {
            if (kBegins && run_begins >> (j0 + j) & 1) {
              const int64_t t = t0 + j0 + j;
              if (kOutput && t > me.begin) me.store_states(p.states_out, me.leaving_row(t - 1), pass, h);
              h = me.load_states(p.states_in, state_row(seqs, me.row, t), pass);
            }
            const int at = (j0 + j) * kScanLd + me.channel;
            const R dt = tile.dt[at], dtu = tile.dtu[at];
            const Slice<S> b = B.at(j0 + j), c = C.at(j0 + j);
            if (!kOutput && pass == 0) steps += dt;
#pragma unroll
            for (int i = 0; i < me.kStates; ++i) {
              h.s[i] = decay<kFast>(dt, A.s[i]) * h.s[i] + dtu * b.s[i];
              if (kOutput) out[j] += real_part(c.s[i] * h.s[i]);
            }
          }
#pragma unroll
          for (int j = 0; kOutput && j < kStep; ++j) {
            out[j] = twice * me.sum_slices(out[j]);
            if (me.slice == 0) tile.o[(j0 + j) * kScanLd + me.channel] += out[j];
          }
        };
        for (int j0 = 0; j0 < count; j0 += kStep)
          (run_begins >> j0) % (1u << kStep) ? run.template operator()<true>(j0)
                                             : run.template operator()<false>(j0);

        me.store_carry(carry.states, me.carry_row(), pass, h);
        if (kOutput && t0 + count == me.end && me.run_ends(me.end - 1))
          me.store_states(p.states_out, me.leaving_row(me.end - 1), pass, h);
      }
      __syncthreads();
      for (Elements<S> e(me, p.u, t0, count); kOutput && e.more(); e.next()) {
        R y[e.kCount];
#pragma unroll
        for (int k = 0; k < e.kCount; ++k) y[k] = tile.o[e.at(k)];
        if (p.z.data) {
          R z[e.kCount];
          e.load(z, p.z);
#pragma unroll
          for (int k = 0; k < e.kCount; ++k) y[k] *= silu(z[k]);
        }
        e.store(p.y, y);
      }
    }
    if (!kOutput && me.slice == 0 && me.channel < me.channels)
      carry.steps[me.carry_row() * p.dims.d + me.first + me.channel] = steps;
    if (!kOutput && threadIdx.x == 0 && me.block == 0) carry.resets[me.carry_row()] = reset;
  }
}

template <class S, bool kFast>
const char* forward(const ScanFwd& p, const Sequences& seqs, int64_t states, void* workspace,
                    cudaStream_t stream) {
  const ScanCut cut = scan_cut<S>(p.dims);
  Carver carver{static_cast<char*>(workspace)};
  const ScanCarry<S> carry(p.dims, cut, carver);
  if (p.dims.l > 0 && cut.units(p.dims) > 0) {
    const char* error = nullptr;
    if (cut.segments > 1) {
      error = launch_units<FwdTile<S>>(scan_fwd<S, kFast, false>, p.dims, cut, stream, p, seqs, cut, carry);
      combine_segments<S, false>(p, cut, carry, stream);
    }
    if (!error)
      error = launch_units<FwdTile<S>>(scan_fwd<S, kFast, true>, p.dims, cut, stream, p, seqs, cut, carry);
    if (error) return error;
  }
  pass_empty_rows<S>(p.dims, seqs, states, p.states_in, p.states_out, stream);
  return launch_error();
}

}  // namespace

}  // namespace gpu

int64_t selective_scan_fwd_portable_workspace(const ScanFwd& p) {
  return gpu::by_state(p, [&]<class S, bool>() {
    gpu::Carver carver{nullptr};
    gpu::ScanCarry<S>(p.dims, gpu::scan_cut<S>(p.dims), carver);
    return carver.used;
  });
}

const char* selective_scan_fwd_portable(const ScanFwd& p, const Sequences& seqs, int64_t states,
                                        void* workspace, void* stream) {
  return gpu::by_state(p, [&]<class S, bool kFast>() {
    return gpu::forward<S, kFast>(p, seqs, states, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace mamba_ops

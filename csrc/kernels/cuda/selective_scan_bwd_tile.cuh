// Tiles of the portable selective scan's backward: what leads to lambda, what follows from it, and the sums
// over channels.
#pragma once
#include "kernels/cuda/selective_scan_reduce.cuh"
#include "kernels/cuda/selective_scan_tile.cuh"

namespace mamba_ops::gpu {

inline constexpr int kScanStep = 4;  // tokens that are run again with their states in registers
inline constexpr int kScanKept = kScanTile / kScanStep;

template <class S>
struct BwdTile : ScanTile<S> {
  using R = RealOf<S>;
  static constexpr int kValues = 2 * Slice<S>::kReals;  // of dB and dC in a thread

  R go[kScanPlane], o[kScanPlane], s[kScanPlane], gdt[kScanPlane];
  Slice<S> kept[kScanKept][kScanMaxThreads];
  R sums[2][kScanMaxSlices][kScanStep][32];  // of dB, dC over the channels of a warp; buffers take turns

  // dy silu(z) of tokens [t0, t0 + count).
  __device__ void load_grads(const ScanBwd& p, const ScanThread<S>& me, int64_t t0, int count) {
    const R poison = is_invalid(me.seqs) ? R(NAN) : R(0);
    for (Elements<S> e(me, p.fwd.u, t0, count); e.more(); e.next()) {
      R dy[e.kCount], z[e.kCount];
      e.load(dy, p.dy);
      if (p.fwd.z.data) e.load(z, p.fwd.z);
#pragma unroll
      for (int k = 0; k < e.kCount; ++k) {
        const R g = p.fwd.z.data ? dy[k] * silu(z[k]) : dy[k];
        go[e.at(k)] = e.inside(k) ? g + poison : R(0);
      }
    }
  }
};

// The derivative of softplus where it is `step`.
__device__ inline float softplus_slope(float step) { return step > 20 ? 1.f : -expm1f(-step); }
__device__ inline double softplus_slope(double step) { return step > 20 ? 1. : -expm1(-step); }

// Sums v over the channels of a warp, whose lanes are Q apart. The values are halved among the lanes as they
// are added: the lane ends with number lane / (32 / kValues).
template <int kValues, class R>
__device__ R sum_channels(R (&v)[kValues], int slices) {
  int mask = 16;
#pragma unroll
  for (int half = kValues / 2; half > 0; half /= 2, mask /= 2) {
    const bool upper = threadIdx.x & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const R mine = upper ? v[i + half] : v[i], other = upper ? v[i] : v[i + half];
      v[i] = mine + __shfl_xor_sync(kAllLanes, other, mask);
    }
  }
  for (; mask >= slices; mask /= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], mask);
  return v[0];
}

// du, ddelta and dz of tokens [t0, t0 + count); then go u lies in s, and ddelta in gdt.
template <class S>
__device__ void store_token_grads(const ScanBwd& p, BwdTile<S>& tile, const ScanThread<S>& me, int64_t t0,
                                  int count) {
  using R = RealOf<S>;
  for (Elements<S> e(me, p.fwd.u, t0, count); e.more(); e.next()) {
    R u[e.kCount], du[e.kCount], ddelta[e.kCount], o[e.kCount];
    e.load(u, p.fwd.u);
#pragma unroll
    for (int k = 0; k < e.kCount; ++k) {
      const int at = e.at(k);
      const R D = tile.D[e.channel(k)], step = tile.dt[at], go = tile.go[at], s = tile.s[at];
      du[k] = step * s + D * go;
      ddelta[k] = (u[k] * s + tile.gdt[at]) * (p.fwd.dims.softplus ? softplus_slope(step) : R(1));
      o[k] = tile.o[at] + D * u[k];
      tile.s[at] = go * u[k];
      tile.gdt[at] = ddelta[k];
    }
    e.store(p.du, du);
    e.store(p.ddelta, ddelta);
    if (!p.fwd.z.data) continue;
    R dy[e.kCount], z[e.kCount];
    e.load(dy, p.dy);
    e.load(z, p.fwd.z);
#pragma unroll
    for (int k = 0; k < e.kCount; ++k) o[k] *= dy[k] * silu_grad(z[k]);
    e.store(p.dz, o);
  }
}

// Adds up the sums of the warps for the tokens from t on, and writes them as the block's partials.
template <class S>
__device__ void store_channel_sums(const BwdWork<S>& work, const BwdTile<S>& tile, int buffer,
                                   const ScanThread<S>& me, const Window& window, int64_t t, int pass) {
  using R = RealOf<S>;
  constexpr int kReals = Slice<S>::kReals;
  const int bits = me.cut.slice_bits + (kReals == 4 ? 2 : 1);  // log2 of the reals of B or C in a pass
  const int64_t reals = me.dims.n * me.kParts;
  const int64_t token = ((me.block * me.dims.b + me.row) * me.cut.segments + me.segment) * window.tokens() +
                        t - me.begin - window.begin;
  for (int i = threadIdx.x; i < kScanStep * 2 << bits; i += 32 << me.cut.slice_bits) {
    const int j = i >> (bits + 1), which = i >> bits & 1, real = i & ((1 << bits) - 1);
    const int at = (pass << bits) + real;
    if (t + j >= me.end || at >= reals) continue;
    const int lane = (which * kReals + real % kReals) * (32 / tile.kValues) + real / kReals;
    R sum = 0;
    for (int warp = 0; warp < me.cut.slices(); ++warp) sum += tile.sums[buffer][warp][j][lane];
    work.sums_BC[(token + j) * 2 * reals + which * reals + at] = sum;
  }
}

}  // namespace mamba_ops::gpu

// Tiles of the portable selective scan: 32 tokens of a block's channels, between memory and shared memory.
#pragma once
#include "kernels/cuda/selective_scan.cuh"

namespace mamba_ops::gpu {

// Elements of a tile of (tokens, channels) that a thread moves between memory and registers, 8 at a time: its
// lane's place along the axis that is contiguous in memory, its warp's and every Q-th after it on the other.
template <class S>
struct Elements {
  using R = RealOf<S>;
  static constexpr int kCount = kScanTile / kScanMaxSlices;

  const ScanThread<S>& me;
  int64_t t0;
  bool channel_last;
  int fast, slow, step;  // places: along the contiguous axis, first on the other, from there to the next
  int fast_count, slow_count;  // how many there are

  __device__ Elements(const ScanThread<S>& me, const View& u, int64_t t0, int count)
      : me(me),
        t0(t0),
        channel_last(me.dims.d > 1 && (me.dims.l == 1 || u.stride[1] < u.stride[2])),
        fast(threadIdx.x % 32),
        slow(threadIdx.x / 32),
        step(me.cut.slices()),
        fast_count(channel_last ? me.channels : count),
        slow_count(channel_last ? count : me.channels) {}

  __device__ bool more() const { return slow < 32; }
  __device__ void next() { slow += kCount * step; }
  __device__ bool inside(int k) const { return fast < fast_count && slow + k * step < slow_count; }
  __device__ int channel(int k) const { return channel_last ? fast : slow + k * step; }
  // The place in the tile.
  __device__ int at(int k) const {
    const int other = slow + k * step;
    return channel_last ? other * kScanLd + fast : fast * kScanLd + other;
  }

  __device__ void load(R (&out)[kCount], const View& v) const {
    with_storage<R>(v, [&](const auto* p) {
      const auto* from = p + origin(v);
#pragma unroll
      for (int k = 0; k < kCount; ++k) out[k] = inside(k) ? R(to_real(from[k * stride(v)])) : R(0);
    });
  }
  __device__ void store(const View& v, const R (&values)[kCount]) const {
    with_storage<R>(v, [&]<class T>(T* p) {
      T* to = p + origin(v);
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (inside(k)) to[k * stride(v)] = from_real<T>(values[k]);
    });
  }

 private:
  __device__ int64_t stride(const View& v) const { return step * v.stride[channel_last ? 2 : 1]; }
  __device__ int64_t origin(const View& v) const {
    const int token = channel_last ? slow : fast;
    return me.row * v.stride[0] + (me.first + channel(0)) * v.stride[1] + (t0 + token) * v.stride[2];
  }
};

// Step sizes and B, C of a tile. Tokens past the end of the segment are steps of size 0 with nothing to add:
// they leave every state and gradient as it is.
template <class S>
struct ScanTile {
  using R = RealOf<S>;
  static constexpr int kFactor = kScanTile * (kScanMaxSlices + 1);

  R dt[kScanPlane], dtu[kScanPlane];  // delta_t, delta_t u_t
  Slice<S> B[kFactor], C[kFactor];    // of a pass; (token, Q + 1), or (Q, channel) where constant
  R bias[kScanWidth], D[kScanWidth];

  // What is the same for all tokens of a unit. Barriers around it are the caller's.
  __device__ void load_channels(const ScanFwd& p, const ScanThread<S>& me) {
    const int c = threadIdx.x;
    if (c >= kScanWidth) return;
    const auto one = [&](const View& v) {
      return v.data && c < me.channels ? load_one<R>(v, (me.first + c) * v.stride[0]) : R(0);
    };
    bias[c] = one(p.delta_bias);
    D[c] = one(p.D);
  }

  // dt, dtu of tokens [t0, t0 + count), and D u into skip, if given. NaN where the offsets are invalid.
  __device__ void load_steps(const ScanFwd& p, const ScanThread<S>& me, int64_t t0, int count,
                             R* skip = nullptr) {
    const R poison = is_invalid(me.seqs) ? R(NAN) : R(0);
    for (Elements<S> e(me, p.u, t0, count); e.more(); e.next()) {
      R raw[e.kCount], u[e.kCount];
      e.load(raw, p.delta);
      e.load(u, p.u);
#pragma unroll
      for (int k = 0; k < e.kCount; ++k) {
        const R before = raw[k] + bias[e.channel(k)];
        const R step = e.inside(k) ? (p.dims.softplus ? softplus(before) : before) + poison : R(0);
        dt[e.at(k)] = step;
        dtu[e.at(k)] = step * u[k];
        if (skip) skip[e.at(k)] = D[e.channel(k)] * u[k];
      }
    }
  }
};

// A thread's numbers of B or C of a pass, on their way from memory to a tile: as many as a slice holds.
template <class S>
struct FactorLoad {
  using R = RealOf<S>;
  static constexpr int kReals = Slice<S>::kReals, kParts = Number<S>::kParts;

  R value[kReals];
  int slice_bits;
  bool constant, rows_fast;  // rows: tokens, or channels where constant

  __device__ FactorLoad(const View& v, bool constant, int64_t groups, const ScanThread<S>& me, int64_t t0,
                        int count, int pass)
      : slice_bits(me.cut.slice_bits), constant(constant) {
    const int64_t stride = v.stride[constant ? 0 : 3], state_stride = v.stride[constant ? 1 : 2];
    const int64_t group = constant || groups == 1 ? 0 : me.first / (me.dims.d / groups);
    const int64_t origin =
        constant ? me.first * stride : me.row * v.stride[0] + group * v.stride[1] + t0 * stride;
    const int rows = constant ? me.channels : count, first_real = (pass * kReals) << slice_bits;
    rows_fast = stride < state_stride;
    with_storage<R>(v, [&](const auto* p) {
#pragma unroll
      for (int k = 0; k < kReals; ++k) {
        const int state = (first_real + real(k)) / kParts;
        value[k] = row(k) < rows && state < me.dims.n
                       ? R(to_real(p[origin + row(k) * stride + state * state_stride + real(k) % kParts]))
                       : R(0);
      }
    });
  }
  __device__ void store(Slice<S>* tile) const {
#pragma unroll
    for (int k = 0; k < kReals; ++k)
      reinterpret_cast<R*>(
          tile)[constant ? (real(k) / kReals * kScanWidth + row(k)) * kReals + real(k) % kReals
                         : row(k) * ((1 << slice_bits) + 1) * kReals + real(k)] = value[k];
  }

 private:
  // Number k of the thread: which row, and which real of the pass.
  __device__ int number(int k) const { return threadIdx.x + (k * 32 << slice_bits); }
  __device__ int row(int k) const { return rows_fast ? number(k) % 32 : (number(k) / kReals) >> slice_bits; }
  __device__ int real(int k) const {
    return rows_fast ? number(k) / 32 : number(k) & ((kReals << slice_bits) - 1);
  }
};

template <class S>
__device__ FactorLoad<S> load_B(const ScanFwd& p, const ScanThread<S>& me, int64_t t0, int count, int pass) {
  return {p.B, p.dims.constant_B, p.dims.groups_B, me, t0, count, pass};
}
template <class S>
__device__ FactorLoad<S> load_C(const ScanFwd& p, const ScanThread<S>& me, int64_t t0, int count, int pass) {
  return {p.C, p.dims.constant_C, p.dims.groups_C, me, t0, count, pass};
}

// A thread's slices of B or C in a tile.
template <class S>
struct Factor {
  const Slice<S>* p;
  int step;

  __device__ Factor(const Slice<S>* tile, bool constant, const ScanThread<S>& me)
      : p(tile + (constant ? me.slice * kScanWidth + me.channel : me.slice)),
        step(constant ? 0 : me.cut.slices() + 1) {}
  __device__ Slice<S> at(int token) const { return p[token * step]; }
};

}  // namespace mamba_ops::gpu

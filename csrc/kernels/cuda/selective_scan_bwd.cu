// Selective scan, backward, for every call (conj is the identity for a real scan; k: 1, or 2 if complex):
//
//   lambda_t = k conj(C_t) go_t + conj(a_{t+1}) lambda_{t+1}          dh0 = conj(a_0) lambda_0
//   dC_t = k go_t conj(h_t)   dB_t = delta_t u_t lambda_t             e_t = a_t h_{t-1}
//   s_t = sum_i Re(conj(B_t) lambda_t)                                du_t = delta_t s_t + D go_t
//   ddelta_t = (u_t s_t + sum_i Re(conj(A e_t) lambda_t)) softplus'   dA = sum_t delta_t conj(e_t) lambda_t
//   go = dy silu(z);  dz = dy o silu'(z);  dD = sum_t go_t u_t;  dbias = sum_t ddelta_t
//
// Blocks, threads and tiles: selective_scan.cuh. Tiles are taken from right to left. The state that enters
// one is a checkpoint, or (every second tile) comes from running the tile before it. The tile is run once to
// keep the state before every 4th token in shared memory; then, from right to left, 4 tokens are run again
// with a_t and h_{t-1} in registers, and the gradients follow with lambda in registers. Sums over states are
// taken by shuffles between the Q lanes of a channel. Sums over channels (dB, dC) are halved by shuffles
// between the channels of a warp until a lane holds one number, then added over the warps in shared memory
// and written as one partial per block and token; sums over tokens (dA, dD, dbias, constant dB, dC) collect
// in a row per segment. scan_reduce_tokens and scan_reduce_rows add up the partials in order: bitwise
// repeatable. The partials of dB and dC are bounded by kScanPartialBytes: every launch covers a window of the
// same offsets in each segment, from right to left, and is reduced before the next.
//
// Shared memory: 51 KiB in float, 80 in double. Latency bounds it: of the tile's loads, and of the chain of
// shuffles and barriers in every step (b8 d1536 l2048 n16 on an H100: each scheduler issues 0.44 instructions
// a cycle, from 2.9 warps).
#include "kernels/cuda/selective_scan_bwd_tile.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

__device__ inline bool any_begins(unsigned run_begins, int step) {
  return (run_begins >> (step * kScanStep)) % (1u << kScanStep) != 0;
}

template <class S>
__device__ void add(Slice<S>& sum, const S (&v)[Slice<S>::kStates]) {
#pragma unroll
  for (int i = 0; i < Slice<S>::kStates; ++i) sum.s[i] = sum.s[i] + v[i];
}

// Runs h, which enters token j0 of the tile that begins at t0, through a step.
template <bool kFast, bool kBegins, class S>
__device__ void run_step(const ScanBwd& p, const ScanThread<S>& me, const BwdTile<S>& tile, const Slice<S>& A,
                         unsigned run_begins, int64_t t0, int j0, int pass, Slice<S>& h,
                         Slice<S>* before = nullptr, Slice<S>* a = nullptr) {
  using R = RealOf<S>;
  const Factor<S> B(tile.B, p.fwd.dims.constant_B, me);
#pragma unroll
  for (int j = 0; j < kScanStep; ++j) {
    if (kBegins && run_begins >> (j0 + j) & 1)
      h = me.load_states(p.fwd.states_in, state_row(me.seqs, me.row, t0 + j0 + j), pass);
    if (before) before[j] = h;
    const int at = (j0 + j) * kScanLd + me.channel;
    const R dt = tile.dt[at], dtu = tile.dtu[at];
    const Slice<S> b = B.at(j0 + j);
#pragma unroll
    for (int i = 0; i < me.kStates; ++i) {
      const S through = decay<kFast>(dt, A.s[i]);
      if (a) a[j].s[i] = through;
      h.s[i] = through * h.s[i] + dtu * b.s[i];
    }
  }
}

// Runs h through the steps of a tile, but the last if `kept`; those keep what enters each of them.
template <bool kFast, class S>
__device__ void run_tile(const ScanBwd& p, const ScanThread<S>& me, BwdTile<S>& tile, const Slice<S>& A,
                         unsigned run_begins, int64_t t0, int steps, int pass, bool kept, Slice<S>& h) {
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (kept) tile.kept[step][threadIdx.x] = h;
    if (kept && step + 1 == steps) break;
    if (any_begins(run_begins, step))
      run_step<kFast, true>(p, me, tile, A, run_begins, t0, step * kScanStep, pass, h);
    else
      run_step<kFast, false>(p, me, tile, A, run_begins, t0, step * kScanStep, pass, h);
  }
}

// What enters a segment's last token from the right, or the left of the tile before.
template <class S>
__device__ Slice<S> entering_grad(const ScanBwd& p, const ScanThread<S>& me, int64_t end, int pass,
                                  const S* carry) {
  if (end == me.end && me.run_ends(end - 1))
    return me.load_states(p.dstates_out, me.leaving_row(end - 1), pass);
  return carry ? me.load_carry(carry, me.carry_row(), pass) : Slice<S>{};
}
// At the begin of a run, token t, the gradient of the run before enters.
template <class S>
__device__ Slice<S> grad_before(const ScanBwd& p, const ScanThread<S>& me, int64_t t, int pass) {
  return t > me.begin ? me.load_states(p.dstates_out, me.leaving_row(t - 1), pass) : Slice<S>{};
}

// What a thread carries through a pass over a tile.
template <class S>
struct Grads {
  Slice<S> lambda, dA, dB, dC;  // dB, dC: where constant
};

// The gradients of a step, from right to left.
template <bool kFast, bool kBegins, class S>
__device__ void reverse_step(const ScanBwd& p, const ScanThread<S>& me, BwdTile<S>& tile, const Slice<S>& A,
                             unsigned run_begins, int64_t t0, int step, int pass, Grads<S>& g) {
  using R = RealOf<S>;
  constexpr int kParts = me.kParts, kReals = me.kReals;
  const ScanDims& dims = p.fwd.dims;
  const Factor<S> B(tile.B, dims.constant_B, me), C(tile.C, dims.constant_C, me);
  const R twice = kParts;  // k
  const int j0 = step * kScanStep;
  Slice<S> before[kScanStep], a[kScanStep], h = tile.kept[step][threadIdx.x];
  run_step<kFast, kBegins>(p, me, tile, A, run_begins, t0, j0, pass, h, before, a);
  R s[kScanStep], gdt[kScanStep], o[kScanStep], over_channels[kScanStep];
#pragma unroll
  for (int j = kScanStep - 1; j >= 0; --j) {
    const int at = (j0 + j) * kScanLd + me.channel;
    const R dt = tile.dt[at], dtu = tile.dtu[at], go = twice * tile.go[at];
    const Slice<S> b = B.at(j0 + j), c = C.at(j0 + j);
    S gB[me.kStates], gC[me.kStates];
    s[j] = gdt[j] = o[j] = 0;
#pragma unroll
    for (int i = 0; i < me.kStates; ++i) {
      S& lambda = g.lambda.s[i];
      const S e = a[j].s[i] * before[j].s[i], x = e + dtu * b.s[i];
      lambda = lambda + go * conj(c.s[i]);
      const S el = conj(e) * lambda;
      gB[i] = dtu * lambda;
      gC[i] = go * conj(x);
      s[j] += real_part(conj(b.s[i]) * lambda);
      gdt[j] += real_part(conj(A.s[i]) * el);
      o[j] += real_part(c.s[i] * x);
      g.dA.s[i] = g.dA.s[i] + dt * el;
      lambda = conj(a[j].s[i]) * lambda;
    }
    if (kBegins && run_begins >> (j0 + j) & 1) {
      me.store_states(p.dstates_in, state_row(me.seqs, me.row, t0 + j0 + j), pass, g.lambda);
      g.lambda = grad_before(p, me, t0 + j0 + j, pass);
    }
    if (dims.constant_B) add(g.dB, gB);
    if (dims.constant_C) add(g.dC, gC);
    R values[2 * kReals];
#pragma unroll
    for (int i = 0; i < me.kStates; ++i) {
      values[i * kParts] = real_part(gB[i]);
      values[kReals + i * kParts] = real_part(gC[i]);
      if constexpr (kParts == 2) {
        values[i * 2 + 1] = gB[i].im;
        values[kReals + i * 2 + 1] = gC[i].im;
      }
    }
    over_channels[j] = dims.constant_B && dims.constant_C ? R(0) : sum_channels(values, me.cut.slices());
  }
#pragma unroll
  for (int j = 0; j < kScanStep; ++j) {
    const R sum_s = me.sum_slices(s[j]), sum_gdt = me.sum_slices(gdt[j]), sum_o = twice * me.sum_slices(o[j]);
    const int at = (j0 + j) * kScanLd + me.channel;
    if (me.slice == 0) {
      tile.s[at] = pass > 0 ? tile.s[at] + sum_s : sum_s;
      tile.gdt[at] = pass > 0 ? tile.gdt[at] + sum_gdt : sum_gdt;
      tile.o[at] = pass > 0 ? tile.o[at] + sum_o : sum_o;
    }
    tile.sums[step % 2][threadIdx.x / 32][j][threadIdx.x % 32] = over_channels[j];
  }
}

template <class S, bool kFast>
__global__ void __launch_bounds__(kScanMaxThreads, (Slice<S>::kStates + 2) / 2)
    scan_bwd(const ScanBwd p, const Sequences seqs, const ScanCut cut, const BwdWork<S> work,
             const Window window) {
  using R = RealOf<S>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& tile = *reinterpret_cast<BwdTile<S>*>(memory);
  const ScanDims& dims = p.fwd.dims;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  for (int64_t unit = blockIdx.x; unit < cut.units(dims); unit += gridDim.x) {
    const ScanThread<S> me(dims, cut, seqs, unit);
    const int64_t begin = me.begin + window.begin, carry_row = me.carry_row();
    const int64_t end = me.begin + window.end < me.end ? me.begin + window.end : me.end;
    const int64_t kinds = work.kinds(dims), row_A = carry_row * kinds, row_C = row_A + kinds - 1;
    R sum_D = 0, sum_bias = 0;
    __syncthreads();
    tile.load_channels(p.fwd, me);

    for (int64_t t0 = (end - 1) / kScanTile * kScanTile; t0 >= begin; t0 -= kScanTile) {
      const int count = end - t0 < kScanTile ? int(end - t0) : kScanTile,
                steps = (count + kScanStep - 1) / kScanStep;
      const int64_t checkpoint = t0 / kScanCheckpointCuda * kScanCheckpointCuda;
      const auto entering = [&](int pass) {
        return checkpoint > 0 ? me.load_checkpoint(p.fwd.checkpoints, checkpoint, pass) : Slice<S>{};
      };

      if (t0 > checkpoint) {
        const unsigned run_begins = me.run_begins(checkpoint);
        __syncthreads();
        for (int pass = 0; pass < cut.passes; ++pass) {
          if (pass > 0) __syncthreads();
          const FactorLoad<S> B_load = load_B(p.fwd, me, checkpoint, kScanTile, pass);
          const Slice<S> A = me.load_rates(p.fwd.A, pass);
          Slice<S> h = entering(pass);
          if (pass == 0) tile.load_steps(p.fwd, me, checkpoint, kScanTile);
          B_load.store(tile.B);
          __syncthreads();
          run_tile<kFast>(p, me, tile, A, run_begins, checkpoint, kScanKept, pass, false, h);
          me.store_carry(work.middle, carry_row, pass, h);
        }
      }

      const unsigned run_begins = me.run_begins(t0);
      __syncthreads();
      for (int pass = 0; pass < cut.passes; ++pass) {
        if (pass > 0) __syncthreads();
        const FactorLoad<S> B_load = load_B(p.fwd, me, t0, count, pass),
                            C_load = load_C(p.fwd, me, t0, count, pass);
        const Slice<S> A = me.load_rates(p.fwd.A, pass);
        Slice<S> h = t0 > checkpoint ? me.load_carry(work.middle, carry_row, pass) : entering(pass);
        Grads<S> g{.lambda = entering_grad(p, me, t0 + count, pass, work.carry.states)};
        if (t0 + count < me.end) {
          g.dA = me.load_carry(work.sums_A, row_A, pass);
          if (dims.constant_B) g.dB = me.load_carry(work.sums_A, row_A + 1, pass);
          if (dims.constant_C) g.dC = me.load_carry(work.sums_A, row_C, pass);
        }
        if (pass == 0) {
          tile.load_grads(p, me, t0, count);
          tile.load_steps(p.fwd, me, t0, count);
        }
        B_load.store(tile.B);
        C_load.store(tile.C);
        __syncthreads();
        run_tile<kFast>(p, me, tile, A, run_begins, t0, steps, pass, true, h);
#pragma unroll 1
        for (int step = steps - 1; step >= 0; --step) {
          if (any_begins(run_begins, step))
            reverse_step<kFast, true>(p, me, tile, A, run_begins, t0, step, pass, g);
          else
            reverse_step<kFast, false>(p, me, tile, A, run_begins, t0, step, pass, g);
          if (dims.constant_B && dims.constant_C) continue;
          __syncthreads();
          store_channel_sums(work, tile, step % 2, me, window, t0 + step * kScanStep, pass);
        }
        me.store_carry(work.carry.states, carry_row, pass, g.lambda);
        me.store_carry(work.sums_A, row_A, pass, g.dA);
        if (dims.constant_B) me.store_carry(work.sums_A, row_A + 1, pass, g.dB);
        if (dims.constant_C) me.store_carry(work.sums_A, row_C, pass, g.dC);
      }
      __syncthreads();
      store_token_grads(p, tile, me, t0, count);
      __syncthreads();
      for (int at = lane; warp == 0 && at < count * kScanLd; at += kScanLd) sum_D += tile.s[at];
      for (int at = lane; warp == cut.slices() - 1 && at < count * kScanLd; at += kScanLd)
        sum_bias += tile.gdt[at];
    }
    if (begin >= end || lane >= me.channels) continue;
    R* sums = work.sums_d + carry_row * 2 * dims.d + me.first + lane;
    if (warp == 0) sums[0] = sum_D + (end < me.end ? sums[0] : R(0));
    if (warp == cut.slices() - 1) sums[dims.d] = sum_bias + (end < me.end ? sums[dims.d] : R(0));
  }
}

// The first phase of the segment form: lambda alone, from zero, to what leaves the segment on the left.
template <class S, bool kFast>
__global__ void __launch_bounds__(kScanMaxThreads, (Slice<S>::kStates + 2) / 2)
    scan_bwd_ends(const ScanBwd p, const Sequences seqs, const ScanCut cut, const ScanCarry<S> carry) {
  using R = RealOf<S>;
  extern __shared__ __align__(16) unsigned char memory[];
  auto& tile = *reinterpret_cast<BwdTile<S>*>(memory);
  const ScanDims& dims = p.fwd.dims;
  const R twice = Number<S>::kParts;  // k

  for (int64_t unit = blockIdx.x; unit < cut.units(dims); unit += gridDim.x) {
    const ScanThread<S> me(dims, cut, seqs, unit);
    const Factor<S> C(tile.C, dims.constant_C, me);
    R delta_sum = 0;
    bool reset = false;
    __syncthreads();
    tile.load_channels(p.fwd, me);
    for (int64_t t0 = (me.end - 1) / kScanTile * kScanTile; t0 >= me.begin; t0 -= kScanTile) {
      const int count = me.end - t0 < kScanTile ? int(me.end - t0) : kScanTile;
      const unsigned run_begins = me.run_begins(t0);
      reset |= run_begins != 0;
      __syncthreads();
      for (int pass = 0; pass < cut.passes; ++pass) {
        if (pass > 0) __syncthreads();
        const FactorLoad<S> C_load = load_C(p.fwd, me, t0, count, pass);
        const Slice<S> A = me.load_rates(p.fwd.A, pass);
        Slice<S> lambda =
            entering_grad(p, me, t0 + count, pass, t0 + count < me.end ? carry.states : nullptr);
        if (pass == 0) {
          tile.load_grads(p, me, t0, count);
          tile.load_steps(p.fwd, me, t0, count);
        }
        C_load.store(tile.C);
        __syncthreads();
        for (int j = count - 1; j >= 0; --j) {
          const int at = j * kScanLd + me.channel;
          const R dt = tile.dt[at], go = twice * tile.go[at];
          const Slice<S> c = C.at(j);
          if (pass == 0) delta_sum += dt;
#pragma unroll
          for (int i = 0; i < me.kStates; ++i)
            lambda.s[i] = conj(decay<kFast>(dt, A.s[i])) * (lambda.s[i] + go * conj(c.s[i]));
          if (run_begins >> j & 1) lambda = grad_before(p, me, t0 + j, pass);
        }
        me.store_carry(carry.states, me.carry_row(), pass, lambda);
      }
    }
    if (me.slice == 0 && me.channel < me.channels)
      carry.steps[me.carry_row() * dims.d + me.first + me.channel] = delta_sum;
    if (threadIdx.x == 0 && me.block == 0) carry.resets[me.carry_row()] = reset;
  }
}

template <class S, bool kFast>
const char* backward(const ScanBwd& p, const Sequences& seqs, int64_t states, void* workspace,
                     cudaStream_t stream) {
  const ScanDims& dims = p.fwd.dims;
  const ScanCut cut = scan_cut<S>(dims);
  Carver carver{static_cast<char*>(workspace)};
  const BwdWork<S> work(dims, cut, carver);
  const bool any = dims.l > 0 && cut.units(dims) > 0;
  const char* error = nullptr;
  if (any && cut.segments > 1) {
    error = launch_units<BwdTile<S>>(scan_bwd_ends<S, kFast>, dims, cut, stream, p, seqs, cut, work.carry);
    combine_segments<S, true>(p.fwd, cut, work.carry, stream);
  }
  for (int64_t end = cut.tokens, begin; !error && dims.b * dims.l > 0 && end > 0; end = begin) {
    begin = std::max<int64_t>(end - work.window, 0);
    const Window window{begin, end};
    if (any)
      error = launch_units<BwdTile<S>>(scan_bwd<S, kFast>, dims, cut, stream, p, seqs, cut, work, window);
    if (dims.constant_B && dims.constant_C) continue;
    const int64_t numbers = cut.rows(dims) * window.tokens() * 2 * dims.n * Number<S>::kParts;
    scan_reduce_tokens<S>
        <<<scan_grid((numbers + kReduceThreads - 1) / kReduceThreads), kReduceThreads, 0, stream>>>(
            p, cut, work, window);
  }
  if (error) return error;
  if (dims.d > 0) {
    const int64_t numbers = (work.kinds(dims) * dims.n * Number<S>::kParts + 2) * dims.d;
    scan_reduce_rows<S>
        <<<scan_grid((numbers + kReduceThreads - 1) / kReduceThreads), kReduceThreads, 0, stream>>>(
            p, seqs, work, any ? cut.rows(dims) : 0);
  }
  pass_empty_rows<S>(dims, seqs, states, p.dstates_out, p.dstates_in, stream);
  return launch_error();
}

}  // namespace

}  // namespace gpu

int64_t selective_scan_bwd_portable_workspace(const ScanBwd& p) {
  return gpu::by_state(p.fwd, [&]<class S, bool>() {
    gpu::Carver carver{nullptr};
    gpu::BwdWork<S>(p.fwd.dims, gpu::scan_cut<S>(p.fwd.dims), carver);
    return carver.used;
  });
}

const char* selective_scan_bwd_portable(const ScanBwd& p, const Sequences& seqs, int64_t states,
                                        void* workspace, void* stream) {
  return gpu::by_state(p.fwd, [&]<class S, bool kFast>() {
    return gpu::backward<S, kFast>(p, seqs, states, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace mamba_ops

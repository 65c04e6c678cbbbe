// Selective scan, backward, for 16 real states a channel (math: kernels/selective_scan.h; which calls:
// selective_scan_tuned.cuh).
//
//   lambda_t = C_t go_t + m_{t+1};  m_t = a_t lambda_t;  dh_0 = m_0          go = dy silu(z)
//   w_t = m_t h_{t-1};  s_t = sum_i B_t lambda_t                             dA = sum_t delta_t w_t
//   du_t = delta_t s_t + D go_t;  ddelta_t = (u_t s_t + sum_i A w_t) softplus'
//   dB_t = sum_c delta_t u_t lambda_t;  dC_t = sum_c go_t h_t;  dz = dy o silu'(z)
//
// A block takes 32 channels of a row, a warp 8 of them, and goes through a piece of the row from right to
// left in windows of 64 tokens, from checkpoint to checkpoint. Of a window a warp
//   1. runs the recurrence again, as the forward does; the states before every 4th token and go stay in
//      shared memory, dz is finished (selective_scan_tuned_bwd.cuh);
//   2. takes its groups of 8 tokens from right to left, each as two runs of 4: forth with decays and states
//      in registers, then back. Here lane 4 g + q holds the states 2 g and 2 g + 1 of channels 2 q and
//      2 q + 1, and owns token g of these channels. So sums over channels, dB and dC, run along the columns
//      of an operand: on the tensor cores one multiplication a step with all but this step's column of
//      delta u (of go) zero, and one accumulator collects 8 steps; so do the outer products with B and C. In
//      float32 these are multiply-adds, and sums through shared memory. Sums over states go through shared
//      memory.
// dB and dC are added up over the warps of a block and written as one partial for every block and token;
// their memory is bounded: launches take the pieces in portions. dA, dD and ddelta_bias have a partial for
// each piece. The second pass (selective_scan_tuned_sums.cuh) adds partials in a fixed order: bitwise
// repeatable.
//
// The pieces of a row are chained: a block waits for the state gradient of the one on its right. Blocks take
// pieces in that order from a counter, so whoever waits waits for a block that runs. Rows of few channels are
// cut into segments whose chains run side by side, each from the gradient that a pass before has found.
//
// Shared memory: 56 KiB of a block, 74 in float32; three blocks a multiprocessor. Issue slots and latency
// bound it, some 1100 instructions for a warp and group: on an H100 with b4 d5120 l4096 in bfloat16, 2.9 ms,
// issue slots are 54 % busy, shared memory 47 %, special-function units 32 %, device memory 19 %.
#include "kernels/cuda/selective_scan_tuned_sums.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

__device__ inline void await_pieces(const int* done, int count) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(done) : "memory");
    if (seen < count) __nanosleep(200);
  } while (seen < count);
}

template <class T, Along kAlong, bool kGate>
__global__ void __launch_bounds__(kBwdWarps* kWarp, kBwdBlocks)
    scan_bwd_tuned(const ScanBwd params, const BwdCut cut, const BwdWork work, const BwdStrides strides,
                   int first_piece, int pieces, int launch) {
  extern __shared__ float4 s_memory[];
  BwdBlock<T>& block = *reinterpret_cast<BwdBlock<T>*>(s_memory);
  const ScanDims& dims = params.fwd.dims;
  const View &u_view = params.fwd.u, &delta_view = params.fwd.delta, &B_view = params.fwd.B,
             &C_view = params.fwd.C;
  const View &A_view = params.fwd.A, &D_view = params.fwd.D, &bias_view = params.fwd.delta_bias;
  if (threadIdx.x == 0) block.taken = atomicAdd(work.taken + launch, 1);
  __syncthreads();
  const BwdPlace at(dims, cut, block.taken, first_piece, pieces);
  if (at.begin >= dims.l) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  BwdWarp<T>& shared = block.warp[warp];
  const int64_t row = at.row;
  const T* B_start = factor<T>(B_view, dims.groups_B, dims, row, at.first, 0);
  const T* C_start = factor<T>(C_view, dims.groups_C, dims, row, at.first, 0);

  // Back through the groups of a window. Lane 4 g + q: states 2 g, 2 g + 1 of channels 2 q, 2 q + 1; value 2
  // c + s is state s of channel c. It owns token g.
  using Lane = LaneTokens<T, kAlong, Along::channels>;
  using Pairs = FactorPairs<T, kAlong>;
  constexpr bool kTensor = sizeof(T) == 2;
  const bool live = 2 * q < at.channels;
  uint32_t moves = Lane::live(at.channels);
  keep(moves);
  const int64_t channel = at.first + (live ? 2 * q : 0);
  float A[4], m[4], dA[4] = {}, D[2] = {}, bias[2] = {}, dD[2] = {}, dbias[2] = {};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int64_t of = channel + c;
#pragma unroll
    for (int s = 0; s < 2; ++s)
      A[2 * c + s] = load_one<float>(A_view, of * A_view.stride[0] + (2 * g + s) * A_view.stride[1]);
    if (D_view.data) D[c] = load_one<float>(D_view, of * D_view.stride[0]) * (1 / kOperandScale<T>);
    if (bias_view.data) bias[c] = load_one<float>(bias_view, of * bias_view.stride[0]);
  }
  const float input_scale = live ? kFromLog2 * kOperandScale<T> : 0.f;
  float2* sums_to = reinterpret_cast<float2*>(
                        work.sums_BC + work.group_sums(cut, dims.b, at.block, row, at.segment, at.piece, 0)) +
                    threadIdx.x;

  const auto back = [&](const BwdWindow& window) {
    const auto [begin, groups, tail] = window;
    const int64_t token = begin + (groups - 1) * kGroup;
    const auto lane_of = [&](const View& v) { return Lane(v, row, at.first, at.channels, token); };
    Lane u = lane_of(u_view), delta = lane_of(delta_view), du = lane_of(params.du),
         ddelta = lane_of(params.ddelta);
    Pairs B(B_view, B_start + token * B_view.stride[3]), C(C_view, C_start + token * C_view.stride[3]);
    Pack<T, 2> next_u, next_delta;
    typename Pairs::Raw next_B, next_C;
    if (tail < kGroup) {
      next_u = u.load_some(u_view, tail);
      next_delta = delta.load_some(delta_view, tail);
      next_B = B.load_some(B_view, tail);
      next_C = C.load_some(C_view, tail);
    } else {
      next_u = u.load(u_view);
      next_delta = delta.load(delta_view);
      next_B = B.load(B_view);
      next_C = C.load(C_view);
    }
    float2* to = sums_to + ((begin - at.begin) / kGroup + groups - 1) * (kGroupSums / 2);
    for (int group = groups - 1; group >= 0; --group) {
      const bool cut_short = tail < kGroup && group + 1 == groups;
      const float2 us = u.values(next_u), raw = delta.values(next_delta);
      float2 steps = {step_log2<T>(raw.x + bias[0], dims.softplus),
                      step_log2<T>(raw.y + bias[1], dims.softplus)};
      if (cut_short && g >= tail) steps = {};
      float2 slope = {1, 1};
      if (dims.softplus) slope = sigmoids(raw.x + bias[0], raw.y + bias[1]);
      const float2 input = {steps.x * input_scale * us.x, steps.y * input_scale * us.y};
      const float2 go = pair_at(shared.go[group], g);
      dD[0] = fmaf(go.x, us.x, dD[0]);
      dD[1] = fmaf(go.y, us.y, dD[1]);
      pair_at(shared.delta, g) = steps;
      pair_at(shared.input, g) = input;
      float b[2][2], c[2][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          keep(b[k][s] = Pairs::value(next_B, k, s));
          keep(c[k][s] = Pairs::value(next_C, k, s));
        }
        *reinterpret_cast<float2*>(&shared.B[2 * q + k][2 * g]) = {b[k][0], b[k][1]};
        if constexpr (!kTensor) *reinterpret_cast<float2*>(&shared.C[2 * q + k][2 * g]) = {c[k][0], c[k][1]};
      }
      __syncwarp();
      if (group > 0) {
        u.advance(-int64_t(strides.u));
        delta.advance(-int64_t(strides.delta));
        B.advance(-int64_t(strides.B));
        C.advance(-int64_t(strides.C));
        next_u = u.load(u_view);
        next_delta = delta.load(delta_view);
        next_B = B.load(B_view);
        next_C = C.load(C_view);
      }

      // Delta u and go of two tokens of channel g: right operands of the outer products with B and C.
      float input_of[2], go_of[2];
      if constexpr (kTensor) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          input_of[k] = shared.input[2 * q + k][g];
          go_of[k] = shared.go[group][2 * q + k][g];
        }
      }
      float sums_B[4] = {}, sums_C[4] = {};
      float2 of_run[2];  // s and sum_i A w of a channel, of a token of each run
#pragma unroll
      for (int run = kGroup / kRun - 1; run >= 0; --run) {
        float before[kRun][4], a[kRun][4], h[4];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float2 pair =
              reinterpret_cast<const float2*>(&shared.states[group][run][(2 * q + k) * 4 + g / 2])[g % 2];
          h[2 * k] = pair.x, h[2 * k + 1] = pair.y;
        }
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          const int t = run * kRun + k;
          const float2 step = pair_at(shared.delta, t);
          float x[4] = {};
          if constexpr (kTensor) {
            mma(x, {__float_as_uint(b[t % 2][0]), __float_as_uint(b[t % 2][1])},
                q == t / 2 ? __float_as_uint(input_of[t % 2]) : 0u);
            std::swap(x[1], x[2]);
          } else {
            const float2 in = pair_at(shared.input, t),
                         of_b = *reinterpret_cast<float2*>(&shared.B[t][2 * g]);
            x[0] = in.x * of_b.x, x[1] = in.x * of_b.y, x[2] = in.y * of_b.x, x[3] = in.y * of_b.y;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            before[k][i] = h[i];
            a[k][i] = exp2_of((i < 2 ? step.x : step.y) * A[i]);
            h[i] = fmaf(a[k][i], h[i], x[i]);
          }
          if constexpr (kTensor) {
            mma(sums_C,
                {__float_as_uint(h[0]), __float_as_uint(h[1]), __float_as_uint(h[2]), __float_as_uint(h[3])},
                {g == t ? __float_as_uint(go.x) : 0u, g == t ? __float_as_uint(go.y) : 0u});
          } else {
            const float2 of_go = pair_at(shared.go[group], t);
            shared.dC[t][lane] = {fmaf(of_go.x, h[0], of_go.y * h[2]), fmaf(of_go.x, h[1], of_go.y * h[3])};
          }
        }
#pragma unroll
        for (int k = kRun - 1; k >= 0; --k) {
          const int t = run * kRun + k;
          float lambda[4];
          if constexpr (kTensor) {
            float x[4] = {};
            mma(x, {__float_as_uint(c[t % 2][0]), __float_as_uint(c[t % 2][1])},
                q == t / 2 ? __float_as_uint(go_of[t % 2]) : 0u);
            std::swap(x[1], x[2]);
#pragma unroll
            for (int i = 0; i < 4; ++i) lambda[i] = m[i] + x[i];
            mma(sums_B,
                {__float_as_uint(lambda[0]), __float_as_uint(lambda[1]), __float_as_uint(lambda[2]),
                 __float_as_uint(lambda[3])},
                {g == t ? __float_as_uint(input.x) : 0u, g == t ? __float_as_uint(input.y) : 0u});
          } else {
            const float2 of_go = pair_at(shared.go[group], t),
                         of_c = *reinterpret_cast<float2*>(&shared.C[t][2 * g]);
            const float2 in = pair_at(shared.input, t);
#pragma unroll
            for (int i = 0; i < 4; ++i)
              lambda[i] = fmaf(i < 2 ? of_go.x : of_go.y, i % 2 ? of_c.y : of_c.x, m[i]);
            shared.dB[t][lane] = {fmaf(in.x, lambda[0], in.y * lambda[2]),
                                  fmaf(in.x, lambda[1], in.y * lambda[3])};
          }
          const float2 step = pair_at(shared.delta, t),
                       of_b = *reinterpret_cast<float2*>(&shared.B[t][2 * g]);
          float w[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            m[i] = a[k][i] * lambda[i];
            w[i] = m[i] * before[k][i];
            dA[i] = fmaf(i < 2 ? step.x : step.y, w[i], dA[i]);
          }
          shared.over_states[k][lane] =
              make_float4(fmaf(of_b.x, lambda[0], of_b.y * lambda[1]), fmaf(A[0], w[0], A[1] * w[1]),
                          fmaf(of_b.x, lambda[2], of_b.y * lambda[3]), fmaf(A[2], w[2], A[3] * w[3]));
        }
        __syncwarp();
        // Token g % 4 of the run, the lane's first channel if g < 4, else its second.
        float2 part[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          part[i] = reinterpret_cast<const float2*>(&shared.over_states[g % kRun][i * 4 + q])[g / kRun];
#pragma unroll
        for (int half = kGroup / 2; half > 0; half /= 2)
#pragma unroll
          for (int i = 0; i < half; ++i)
            part[i] = {part[i].x + part[i + half].x, part[i].y + part[i + half].y};
        of_run[run] = part[0];
        __syncwarp();
      }
      // The other channel of token g is with lane g + 4 or g - 4, whose token's first it wants in exchange.
      const bool upper = g >= kRun;
      const float2 mine = upper ? of_run[1] : of_run[0], give = upper ? of_run[0] : of_run[1];
      const float2 got = {__shfl_xor_sync(kAllLanes, give.x, 16), __shfl_xor_sync(kAllLanes, give.y, 16)};
      const float2 one = upper ? got : mine, two = upper ? mine : got;
      const float2 dus = {fmaf(steps.x * kFromLog2, one.x, D[0] * go.x),
                          fmaf(steps.y * kFromLog2, two.x, D[1] * go.y)};
      float2 ddeltas = {fmaf(us.x, one.x, one.y) * slope.x, fmaf(us.y, two.x, two.y) * slope.y};
      if (cut_short) {
        if (g >= tail) ddeltas = {};
        lane_of(params.du).store_some(params.du, moves, dus, tail);
        lane_of(params.ddelta).store_some(params.ddelta, moves, ddeltas, tail);
      } else {
        du.store(params.du, moves, dus);
        ddelta.store(params.ddelta, moves, ddeltas);
      }
      dbias[0] += ddeltas.x;
      dbias[1] += ddeltas.y;
      du.advance(-int64_t(strides.du));
      ddelta.advance(-int64_t(strides.ddelta));

      if constexpr (!kTensor) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float2 of_B{}, of_C{};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 v = shared.dB[2 * q + k][g * 4 + i], w = shared.dC[2 * q + k][g * 4 + i];
            of_B = {of_B.x + v.x, of_B.y + v.y};
            of_C = {of_C.x + w.x, of_C.y + w.y};
          }
          sums_B[k] = of_B.x, sums_B[2 + k] = of_B.y;
          sums_C[k] = of_C.x, sums_C[2 + k] = of_C.y;
        }
      }
      shared.sums[0][lane] = make_float4(sums_B[0], sums_B[1], sums_B[2], sums_B[3]);
      shared.sums[1][lane] = make_float4(sums_C[0], sums_C[1], sums_C[2], sums_C[3]);
      __syncthreads();
      float2 total = reinterpret_cast<const float2*>(block.warp[0].sums)[threadIdx.x];
#pragma unroll
      for (int w = 1; w < kBwdWarps; ++w) {
        const float2 part = reinterpret_cast<const float2*>(block.warp[w].sums)[threadIdx.x];
        total = {total.x + part.x, total.y + part.y};
      }
      __stcs(to, total);
      to -= kGroupSums / 2;
      __syncthreads();
    }
  };

  put_channels(params.fwd, at, shared);
  const int windows = int((at.end - at.begin + kScanCheckpointCuda - 1) / kScanCheckpointCuda);
  const int64_t chain = at.segment * dims.b + row,
                sums_row = (int64_t(at.segment) * cut.pieces + at.piece) * dims.b + row;
  int* done = work.done + chain * cut.channel_blocks + at.block;
  const auto states_of = [&](float* states, int64_t of_row, int c) {
    return reinterpret_cast<float2*>(states + (of_row * dims.d + channel + c) * kTunedState) + g;
  };
  for (int k = windows - 1; k >= 0; --k) {
    const int64_t begin = at.begin + k * kScanCheckpointCuda;
    const int tokens = int(std::min<int64_t>(at.end - begin, kWindowGroups * kGroup));
    const int groups = (tokens + kGroup - 1) / kGroup;
    const BwdWindow window{begin, groups, tokens - (groups - 1) * kGroup};
    run_again<T, kAlong, kGate>(params, strides, at, shared, B_start, C_start, window);
    if (k == windows - 1) {
      if (const int before = at.before(dims, cut); before > 0) {
        if (threadIdx.x == 0) await_pieces(done, before);
        __syncthreads();
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float2 v = __ldcg(states_of(work.carry, chain, c));
        m[2 * c] = v.x, m[2 * c + 1] = v.y;
      }
    }
    back(window);
  }

#pragma unroll
  for (int c = 0; c < 2; ++c) {
    if (live) {
      const float2 left = {m[2 * c], m[2 * c + 1]};
      *states_of(work.carry, chain, c) = left;
      if (at.begin == 0 && params.dstates_in)
        *states_of(static_cast<float*>(params.dstates_in), row, c) = left;
      *states_of(work.sums_A, sums_row, c) = {kFromLog2 * dA[2 * c], kFromLog2 * dA[2 * c + 1]};
    }
#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2) {
      dD[c] += __shfl_xor_sync(kAllLanes, dD[c], offset);
      dbias[c] += __shfl_xor_sync(kAllLanes, dbias[c], offset);
    }
    if (live && g == 0) {
      float* to = work.sums_d + sums_row * 2 * dims.d + channel + c;
      to[0] = dD[c] * (1 / kOperandScale<T>);
      to[dims.d] = dbias[c];
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(done) : "memory");
}

// ---- Host

template <class T, Along kAlong, bool kGate>
const char* launch_bwd(const ScanBwd& p, const BwdPlan& plan, cudaStream_t stream) {
  const ScanDims& dims = p.fwd.dims;
  const BwdCut& cut = plan.cut;
  const auto blocks = [](int64_t count) { return unsigned((count + kSumThreads - 1) / kSumThreads); };
  if (cut.segments > 1) {
    const dim3 grid(unsigned((dims.d + kBwdChannels - 1) / kBwdChannels), unsigned(dims.b),
                    unsigned(cut.segments - 1));
    scan_gradient_ends<T, kAlong, kGate><<<grid, kBwdWarps * kWarp, 0, stream>>>(p, cut, plan.work);
  }
  scan_combine_gradients<<<blocks(dims.b * dims.d * kTunedState), kSumThreads, 0, stream>>>(p, cut,
                                                                                            plan.work);
  const auto kernel = scan_bwd_tuned<T, kAlong, kGate>;
  const auto bytes = [](const View& v, int axis) { return uint32_t(group_bytes(v, axis)); };
  const BwdStrides strides{.u = bytes(p.fwd.u, 2),
                           .delta = bytes(p.fwd.delta, 2),
                           .z = bytes(p.fwd.z, 2),
                           .dy = bytes(p.dy, 2),
                           .du = bytes(p.du, 2),
                           .ddelta = bytes(p.ddelta, 2),
                           .dz = bytes(p.dz, 2),
                           .B = bytes(p.fwd.B, 3),
                           .C = bytes(p.fwd.C, 3)};
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(BwdBlock<T>)));
  for (int launch = 0; launch < plan.launches; ++launch) {
    const int end = cut.pieces - launch * cut.portion, first = std::max(end - cut.portion, 0);
    const int64_t taken = dims.b * cut.channel_blocks * cut.segments * (end - first);
    kernel<<<unsigned(taken), kBwdWarps * kWarp, sizeof(BwdBlock<T>), stream>>>(p, cut, plan.work, strides,
                                                                                first, end - first, launch);
    const int64_t groups = cut.segments * (end - first) * (cut.piece_tokens / kGroup);
    const dim3 grid(blocks(groups * kGroupSums / 4), unsigned(dims.b));
    scan_sum_channels<<<grid, kSumThreads, 0, stream>>>(p, cut, plan.work, first, end - first);
  }
  scan_sum_tokens<<<blocks(dims.d * (kTunedState + 2)), kSumThreads, 0, stream>>>(p, cut, plan.work);
  return launch_error();
}

}  // namespace

}  // namespace gpu

bool selective_scan_bwd_tuned_takes(const ScanBwd& p, const Sequences& seqs) {
  return gpu::tuned_axis(p.fwd, seqs, {&p.dy, &p.du, &p.ddelta, &p.dz}).has_value();
}

int64_t selective_scan_bwd_tuned_workspace(const ScanBwd& p) { return gpu::BwdPlan(p, nullptr).bytes; }

const char* selective_scan_bwd_tuned(const ScanBwd& p, const Sequences&, int64_t, void* workspace,
                                     void* cuda_stream) {
  using namespace gpu;
  const Along along = *tuned_axis(p.fwd, {}, {&p.dy, &p.du, &p.ddelta, &p.dz});
  return by_tuned(p.fwd, along, [&]<class T, Along kAlong, bool kGate>() {
    return launch_bwd<T, kAlong, kGate>(p, BwdPlan(p, workspace), static_cast<cudaStream_t>(cuda_stream));
  });
}

}  // namespace mamba_ops

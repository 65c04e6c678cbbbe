// Selective scan, backward, for 16 real states a channel (math: kernels/selective_scan.h; which calls:
// selective_scan_tuned.cuh).
//
//   lambda_t = C_t go_t + m_{t+1};  m_t = a_t lambda_t;  dh_0 = m_0          go = dy silu(z)
//   w_t = m_t h_{t-1};  s_t = sum_i B_t lambda_t                             dA = sum_t delta_t w_t
//   du_t = delta_t s_t + D go_t;  ddelta_t = (u_t s_t + sum_i A w_t) softplus'
//   dB_t = sum_c delta_t u_t lambda_t;  dC_t = sum_c go_t h_t;  dz = dy o silu'(z)
//
// A block takes 48 channels of a row, a chain, a warp 8 of them, and goes through a piece of it from right to
// left in windows of 64 tokens, from checkpoint to checkpoint. Of a window a warp
//   1. runs the recurrence again, as the forward does, and finishes dz. The states before every group of 8
//      tokens stay in shared memory, with what belongs to a token and channel: its step, the slope of the
//      softplus, delta u and go (selective_scan_tuned_bwd.cuh);
//   2. takes the groups from right to left: forth with the decays and states of 8 tokens in registers, then
//      back. Here lane 4 g + q holds the states 2 g and 2 g + 1 of channels 2 q and 2 q + 1, and owns token g
//      of these channels. So sums over channels, dB and dC, run along the columns of an operand: on the
//      tensor cores one multiplication a step by delta u (by go) of 8 tokens, of which this step's column is
//      kept; the outer products with B and C are one more each. In float32 and float16 these are
//      multiply-adds, and sums through shared memory. Sums over states go through shared memory.
// dB and dC of a group take its place in shared memory; after a window they are added up over the warps of
// the block and written as one partial for every block and token. Their memory is bounded: launches take the
// pieces in portions. A second pass (selective_scan_tuned_sums.cuh) adds partials.
//
// Pieces pass on the state gradient, and what dA, dD and ddelta_bias have come to, in the order of the chain:
// bitwise repeatable, whoever takes them. Of many chains, blocks take pieces of 8 windows, in that order from
// a counter, and wait for the state gradient of the one on the right. Of few chains, blocks of the same chain
// take its windows in turn (kTurns). There the first way also finds what a window makes of the state
// gradient: it is passed on before the second way begins. Who waits waits for a block that runs.
//
// Shared memory: 93 KiB of a block, 109 in float32 and float16; two blocks a multiprocessor. Issue slots and
// latency bound it: 950 instructions for a warp and group, in turns 1000. H200, b4 d5120 l4096, all options:
// 2.35 ms in bfloat16, 2.91 in float32; in turns, b1 d2048 l65536, 4.39 and 5.6. ncu (H100): issue slots 59 %
// of their peak, shared memory and L1 66 %, most waits for the instruction before; float32: shared memory
// 89 %.
#include "kernels/cuda/selective_scan_tuned_sums.cuh"

namespace mamba_ops {
namespace gpu {
namespace {

template <class T, Along kAlong, bool kGate, bool kTurns>
__global__ void __launch_bounds__(kBwdWarps* kWarp, kBwdBlocks)
    scan_bwd_tuned(const ScanBwd params, const BwdCut cut, const BwdWork work,
                   const __grid_constant__ BwdStrides strides, int first_piece, int pieces, int launch) {
  extern __shared__ float4 s_memory[];
  BwdBlock<T>& block = *reinterpret_cast<BwdBlock<T>*>(s_memory);
  const ScanDims& dims = params.fwd.dims;
  const View &A_view = params.fwd.A, &B_view = params.fwd.B, &C_view = params.fwd.C, &D_view = params.fwd.D;
  const int chains = cut.chains(dims);
  int* const counter = work.taken + (kTurns ? launch * chains + blockIdx.x % chains : launch);
  if (threadIdx.x == 0) block.taken = atomicAdd(counter, 1);
  __syncthreads();
  const int chain = kTurns ? blockIdx.x % chains : block.taken % chains;
  int piece = first_piece + pieces - 1 - (kTurns ? block.taken : block.taken / chains);
  if (piece < first_piece) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const BwdPlace at(dims, cut, chain, warp);
  BwdWarp<T>& shared = block.warp[warp];
  const int64_t row = at.row;

  // Back through the groups of a window. Lane 4 g + q: states 2 g, 2 g + 1 of channels 2 q, 2 q + 1; value 2
  // c + s is state s of channel c. It owns token g.
  using Lane = LaneTokens<T, kAlong, Along::channels>;
  using Pairs = FactorPairs<T, kAlong>;
  constexpr bool kTensor = kTensorSums<T>;
  constexpr bool kMends = sizeof(T) == 4 && !kTurns;  // the state gradient that leaves a window
  const bool live = 2 * q < at.channels;
  uint32_t moves = Lane::live(at.channels);
  keep(moves);
  const int64_t channel = at.first + (live ? 2 * q : 0);
  float A[4], m[4], dA[4], D[2] = {}, dD[2], dbias[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int64_t of = channel + c;
#pragma unroll
    for (int s = 0; s < 2; ++s)
      A[2 * c + s] = load_one<float>(A_view, of * A_view.stride[0] + (2 * g + s) * A_view.stride[1]);
    if (D_view.data) D[c] = load_one<float>(D_view, of * D_view.stride[0]) * (1 / kOperandScale<T>);
  }
  // `next`: the piece that the block has taken meanwhile, of thread 0.
  const auto back = [&](const BwdWindow& window, float4* sums_to, int next) {
    const auto start = [&](BwdTensor i) {
      return shared.start[i] + (window.groups - 1) * int64_t(strides.bytes[i]);
    };
    const auto lane_of = [&](const View& v, BwdTensor i) { return Lane(v, start(i), at.channels); };
    const auto factor_of = [&](BwdTensor i) {
      __builtin_assume(__isGlobal(start(i)));
      return reinterpret_cast<const T*>(start(i));
    };
    const View& u_view = params.fwd.u;
    Lane u = lane_of(u_view, kU), du = lane_of(params.du, kDu), ddelta = lane_of(params.ddelta, kDdelta);
    Pairs B(B_view, factor_of(kB)), C(C_view, factor_of(kC));
    Pack<T, 2> next_u;
    typename Pairs::Raw next_B, next_C;
    const auto step_loads = [&](int64_t groups) {
      u.step(groups * strides.bytes[kU]);
      B.step(groups * strides.bytes[kB]);
      C.step(groups * strides.bytes[kC]);
    };
    const auto load = [&](int group) {
      step_loads(-1);
      if (window.cut_short(group)) {
        next_u = u.load_some(u_view, window.tail);
        next_B = B.load_some(B_view, window.tail);
        next_C = C.load_some(C_view, window.tail);
      } else {
        next_u = u.load(u_view);
        next_B = B.load(B_view);
        next_C = C.load(C_view);
      }
    };
    step_loads(1);
    du.step(0);
    ddelta.step(0);
    LongMemory memory;
    float2 total{};  // of the steps of the lane's tokens
    if (kMends) memory.begin(m);
    load(window.groups - 1);
    for (int group = window.groups - 1; group >= 0; --group) {
      const bool cut_short = window.cut_short(group);
      BwdGroup& kept = shared.group[group];
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
      const float2 us = u.values(next_u);
      __syncwarp();
      if (group > 0) load(group - 1);

      // Delta u and go: of two tokens of channel g, right operands of the outer products with B and C; and of
      // the lane's own token, right operands of the sums over channels.
      float input_of[2], go_of[2];
      float2 input, go;
      if constexpr (kTensor) {
        input = kept.input.pair(g);
        go = kept.go.pair(g);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          input_of[k] = kept.input.at(2 * q + k, g);
          go_of[k] = kept.go.at(2 * q + k, g);
        }
      }
      float before[kGroup][4], a[kGroup][4], h[4], sums_B[4] = {}, sums_C[4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float2 pair = kept.states.pair(k);
        h[2 * k] = pair.x, h[2 * k + 1] = pair.y;
      }
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        const float2 step = kept.delta.pair(t);
        float x[4] = {};
        if constexpr (kTensor) {
          mma(x, {__float_as_uint(b[t % 2][0]), __float_as_uint(b[t % 2][1])},
              q == t / 2 ? __float_as_uint(input_of[t % 2]) : 0u);
          std::swap(x[1], x[2]);
        } else {
          const float2 in = kept.input.pair(t), of_b = *reinterpret_cast<float2*>(&shared.B[t][2 * g]);
          x[0] = in.x * of_b.x, x[1] = in.x * of_b.y, x[2] = in.y * of_b.x, x[3] = in.y * of_b.y;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          before[t][i] = h[i];
          a[t][i] = exp2_of((i < 2 ? step.x : step.y) * A[i]);
          h[i] = fmaf(a[t][i], h[i], x[i]);
        }
        if (kMends) memory.step(a[t]);
        if constexpr (kTensor) sum_channels(sums_C, t, h, go);
      }
      float2 of_half[2];  // s and sum_i A w of a channel, of a token of each half
#pragma unroll
      for (int half = 1; half >= 0; --half) {
#pragma unroll
        for (int k = kHalf - 1; k >= 0; --k) {
          const int t = half * kHalf + k;
          const float2 step = kept.delta.pair(t), of_b = *reinterpret_cast<float2*>(&shared.B[t][2 * g]);
          float lambda[4];
          if constexpr (kTensor) {
            float x[4] = {};
            mma(x, {__float_as_uint(c[t % 2][0]), __float_as_uint(c[t % 2][1])},
                q == t / 2 ? __float_as_uint(go_of[t % 2]) : 0u);
            std::swap(x[1], x[2]);
#pragma unroll
            for (int i = 0; i < 4; ++i) lambda[i] = m[i] + x[i];
            sum_channels(sums_B, t, lambda, input);
          } else {
            const float2 of_go = kept.go.pair(t), in = kept.input.pair(t),
                         of_c = *reinterpret_cast<float2*>(&shared.C[t][2 * g]);
#pragma unroll
            for (int i = 0; i < 4; ++i)
              lambda[i] = fmaf(i < 2 ? of_go.x : of_go.y, i % 2 ? of_c.y : of_c.x, m[i]);
            shared.over_channels[k][lane] =
                make_float4(fmaf(in.x, lambda[0], in.y * lambda[2]), fmaf(in.x, lambda[1], in.y * lambda[3]),
                            fmaf(of_go.x, h[0], of_go.y * h[2]), fmaf(of_go.x, h[1], of_go.y * h[3]));
          }
          float w[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            h[i] = before[t][i];
            m[i] = a[t][i] * lambda[i];
            w[i] = m[i] * h[i];
            dA[i] = fmaf(i < 2 ? step.x : step.y, w[i], dA[i]);
          }
          const int i = k < 2 ? 0 : 2, j = 2 - i;
          shared.over_states[k][lane] = make_float4(
              fmaf(of_b.x, lambda[i], of_b.y * lambda[i + 1]), fmaf(A[i], w[i], A[i + 1] * w[i + 1]),
              fmaf(of_b.x, lambda[j], of_b.y * lambda[j + 1]), fmaf(A[j], w[j], A[j + 1] * w[j + 1]));
        }
        __syncwarp();
        // Token g % 4 of the half, the lane's first channel if g < 4, else its second.
        float2 part[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          part[i] = reinterpret_cast<const float2*>(
              &shared.over_states[g % kHalf][i * 4 + q])[g / kHalf ^ g % kHalf / 2];
#pragma unroll
        for (int left = kGroup / 2; left > 0; left /= 2)
#pragma unroll
          for (int i = 0; i < left; ++i)
            part[i] = {part[i].x + part[i + left].x, part[i].y + part[i + left].y};
        of_half[half] = part[0];
        if constexpr (!kTensor) {  // token q of the half
          float4 sum = shared.over_channels[q][g * 4];
#pragma unroll
          for (int i = 1; i < 4; ++i) {
            const float4 v = shared.over_channels[q][g * 4 + i];
            sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
          }
          sums_B[2 * half] = sum.x, sums_B[2 * half + 1] = sum.y;
          sums_C[2 * half] = sum.z, sums_C[2 * half + 1] = sum.w;
        }
        __syncwarp();
      }
      // The other channel of token g is with lane g + 4 or g - 4, whose token's first it wants in exchange.
      const bool upper = g >= kHalf;
      const float2 mine = upper ? of_half[1] : of_half[0], give = upper ? of_half[0] : of_half[1];
      const float2 got = {__shfl_xor_sync(kAllLanes, give.x, 16), __shfl_xor_sync(kAllLanes, give.y, 16)};
      const float2 one = upper ? got : mine, two = upper ? mine : got;
      const float2 steps = kept.delta.pair(g), slope = kept.slope.pair(g);
      if constexpr (!kTensor) go = kept.go.pair(g);
      total = {total.x + steps.x, total.y + steps.y};
      dD[0] = fmaf(go.x, us.x, dD[0]);
      dD[1] = fmaf(go.y, us.y, dD[1]);
      const float2 dus = {fmaf(steps.x * kFromLog2, one.x, D[0] * go.x),
                          fmaf(steps.y * kFromLog2, two.x, D[1] * go.y)};
      const float2 ddeltas = {fmaf(us.x, one.x, one.y) * slope.x, fmaf(us.y, two.x, two.y) * slope.y};
      if (cut_short) {
        du.store_some(params.du, moves, dus, window.tail);
        ddelta.store_some(params.ddelta, moves, ddeltas, window.tail);
      } else {
        du.store(params.du, moves, dus);
        ddelta.store(params.ddelta, moves, ddeltas);
      }
      dbias[0] += ddeltas.x;
      dbias[1] += ddeltas.y;
      du.step(-int64_t(strides.bytes[kDu]));
      ddelta.step(-int64_t(strides.bytes[kDdelta]));

      __syncwarp();
      if constexpr (kTensor) {
        kept.sums[lane] = make_float4(sums_B[0], sums_B[2], sums_B[1], sums_B[3]);
        kept.sums[kWarp + lane] = make_float4(sums_C[0], sums_C[2], sums_C[1], sums_C[3]);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2* const to = reinterpret_cast<float2*>(&kept.sums[g * 4 + half * 2 + q / 2]) + q % 2;
          to[0] = {sums_B[2 * half], sums_B[2 * half + 1]};
          to[2 * kWarp] = {sums_C[2 * half], sums_C[2 * half + 1]};
        }
      }
    }
    if (kMends) {
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) {
        total.x += __shfl_xor_sync(kAllLanes, total.x, lanes);
        total.y += __shfl_xor_sync(kAllLanes, total.y, lanes);
      }
      memory.mend(m, {total.x * A[0], total.x * A[1], total.y * A[2], total.y * A[3]});
    }
    __syncthreads();
    for (int i = threadIdx.x; i < window.groups * (kGroupSums / 4); i += kBwdWarps * kWarp) {
      float4 sum{};
#pragma unroll
      for (int w = 0; w < kBwdWarps; ++w) {
        const float4 v = block.warp[w].group[i / (kGroupSums / 4)].sums[i % (kGroupSums / 4)];
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
      __stcs(sums_to + i, sum);
    }
    if (kTurns && threadIdx.x == 0) block.taken = next;
    __syncthreads();
  };

  const int64_t warp_of_chain = int64_t(chain) * kBwdWarps + warp;
  Passed* const carry = work.carry + warp_of_chain * kLaneStates * kWarp + lane;
  Passed* const passed_totals = work.totals + warp_of_chain * kTotals * kWarp + lane;
  constexpr int kWindow = int(kScanCheckpointCuda);
  put_channels(params, at, shared,
               (std::min((piece + 1) * cut.piece_tokens, dims.l) - 1) / kWindow * kWindow);
  for (bool more = true; more;) {
    const int before = cut.pieces - 1 - piece;  // pieces of the chain
    const int64_t begin = piece * cut.piece_tokens, end = std::min(begin + cut.piece_tokens, dims.l);
    const int windows = int((end - begin + kWindow - 1) / kWindow);
    for (float* sum : {&dA[0], &dA[1], &dA[2], &dA[3], &dD[0], &dD[1], &dbias[0], &dbias[1]}) *sum = 0;
    int next = 0;
    for (int k = windows - 1; k >= 0; --k) {
      const int tokens = int(std::min<int64_t>(end - begin - int64_t(k) * kWindow, kWindow));
      const int groups = (tokens + kGroup - 1) / kGroup;
      const BwdWindow window{k == 0 && begin == 0, groups, tokens - (groups - 1) * kGroup};
      const WindowGradient left = run_again<T, kAlong, kGate, kTurns>(params, strides, at, shared, window);
      if (kTurns) {
        if (threadIdx.x == 0) next = atomicAdd(counter, 1);
        if (piece >= first_piece + cut.turns) prefetch_left<T, kGate>(strides, dims.d, shared, cut.turns);
        pass_window(m, left, shared, carry, before);
      } else {
        if (k > 0) prefetch_left<T, kGate>(strides, dims.d, shared, 1);
        if (k == windows - 1) await(m, carry, before);
      }
      const int64_t to = work.group_sums(cut, dims.b, at.block, row, piece, k * kWindowGroups);
      back(window, reinterpret_cast<float4*>(work.sums_BC + to), next);
      if (!kTurns) move_left(strides, dims.d, shared, 1);
      __syncwarp();
    }

    if (!kTurns) pass_on(m, carry, before + 1);
    const float mine[kTotals] = {dA[0], dA[1], dA[2], dA[3], dD[0], dD[1], dbias[0], dbias[1]};
    float totals[kTotals];
    await(totals, passed_totals, before);
#pragma unroll
    for (int i = 0; i < kTotals; ++i) totals[i] += mine[i];
    if (piece > 0)
      pass_on(totals, passed_totals, before + 1);
    else
      put_totals<T>(params, work, at, totals, m);
    more = false;
    if (kTurns) {
      const int taken = first_piece + pieces - 1 - block.taken;
      more = taken >= first_piece;
      move_left(strides, dims.d, shared, piece - taken);
      piece = taken;
      __syncwarp();
    }
  }
}

// ---- Host

template <class T, Along kAlong, bool kGate>
const char* launch_bwd(const ScanBwd& p, const BwdPlan& plan, cudaStream_t stream) {
  const ScanDims& dims = p.fwd.dims;
  const BwdCut& cut = plan.cut;
  const auto blocks = [](int64_t count) { return unsigned((count + kSumThreads - 1) / kSumThreads); };
  const auto bytes = [](const View& v, int axis) { return uint32_t(group_bytes(v, axis)); };
  const BwdStrides strides{
      {bytes(p.fwd.u, 2), bytes(p.fwd.delta, 2), bytes(p.fwd.z, 2), bytes(p.dy, 2), bytes(p.du, 2),
       bytes(p.ddelta, 2), bytes(p.dz, 2), bytes(p.fwd.B, 3), bytes(p.fwd.C, 3)},
      softplus_limit(p.fwd.dims.softplus)};
  const int64_t lanes = int64_t(cut.chains(dims)) * kBwdWarps * kWarp;
  scan_begin_gradients<<<blocks(lanes * (kLaneStates + kTotals)), kSumThreads, 0, stream>>>(p, cut,
                                                                                            plan.work);
  const auto kernel =
      cut.turns > 1 ? scan_bwd_tuned<T, kAlong, kGate, true> : scan_bwd_tuned<T, kAlong, kGate, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(BwdBlock<T>)));
  for (int launch = 0; launch < plan.launches; ++launch) {
    const int end = cut.pieces - launch * cut.portion, first = std::max(end - cut.portion, 0);
    const int64_t taken = int64_t(cut.chains(dims)) * (cut.turns > 1 ? cut.turns : end - first);
    kernel<<<unsigned(taken), kBwdWarps * kWarp, sizeof(BwdBlock<T>), stream>>>(p, cut, plan.work, strides,
                                                                                first, end - first, launch);
    const dim3 grid(blocks((end - first) * (cut.piece_tokens / kGroup) * kGroupSums / 4), unsigned(dims.b));
    scan_sum_channels<<<grid, kSumThreads, 0, stream>>>(p, cut, plan.work, first, end - first);
  }
  scan_sum_rows<<<blocks(dims.d * (kTunedState + 2)), kSumThreads, 0, stream>>>(p, plan.work);
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

// Around the tuned backward of the selective scan: the pass that finds the state gradients between segments,
// and the second pass that adds up partial sums.
#pragma once
#include "kernels/cuda/selective_scan_tuned_bwd.cuh"

namespace mamba_ops::gpu {

// The state gradient that leaves a segment on the left if none enters on the right, and the sum of its steps:
//   sum_t 2^(A (delta_begin + .. + delta_t)) C_t go_t
// A warp takes 8 channels of a segment from left to right, as in the forward, and stops where nothing of
// later tokens gets through. Segment 0 is not needed.
template <class T, Along kAlong, bool kGate>
__global__ void __launch_bounds__(kBwdWarps* kWarp, 4)
    scan_gradient_ends(const ScanBwd params, const BwdCut cut, const BwdWork work, const BwdStrides strides) {
  using Lane = LaneTokens<T, kAlong>;
  using Input = InputFactor<T, kAlong>;
  __shared__ float s_C[kBwdWarps][Input::kShared];
  const ScanDims& dims = params.fwd.dims;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, q = lane % 4;
  const int64_t row = blockIdx.y;
  const int segment = blockIdx.z + 1;
  const int64_t first = (int64_t(blockIdx.x) * kBwdWarps + warp) * kWarpChannels;
  if (first >= dims.d) return;
  const int channels = int(std::min<int64_t>(dims.d - first, kWarpChannels));
  const bool live = lane / 4 < channels;
  const int64_t channel = first + (live ? lane / 4 : 0);
  const int64_t begin = segment * cut.segment_tokens(), end = std::min(begin + cut.segment_tokens(), dims.l);
  const View &A_view = params.fwd.A, &bias_view = params.fwd.delta_bias, &C = params.fwd.C;
  const View& gate = kGate ? params.fwd.z : params.dy;

  float A[kLaneStates], m[kLaneStates] = {}, total = 0;
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i)
    A[i] = load_one<float>(A_view, channel * A_view.stride[0] + (4 * q + i) * A_view.stride[1]);
  const float bias = bias_view.data ? load_one<float>(bias_view, channel * bias_view.stride[0]) : 0.f;

  const auto lane_of = [&](const View& v, int64_t token) { return Lane(v, row, first, channels, token); };
  const auto input_of = [&](int64_t token) {
    return Input(C, factor<T>(C, dims.groups_C, dims, row, first, token), s_C[warp]);
  };
  Lane delta = lane_of(params.fwd.delta, begin), z = lane_of(gate, begin), dy = lane_of(params.dy, begin);
  Input input = input_of(begin);
  Pack<T, 2> next_delta, next_z, next_dy;
  typename Input::Raw next_C;
  const auto load = [&] {
    next_delta = delta.load(params.fwd.delta);
    next_dy = dy.load(params.dy);
    if (kGate) next_z = z.load(gate);
    next_C = input.load(C);
    delta.advance(strides.bytes[kDelta]);
    dy.advance(strides.bytes[kDy]);
    if (kGate) z.advance(strides.bytes[kZ]);
    input.advance(strides.bytes[kC]);
  };
  const auto process = [&](int tail, bool more) {
    const float2 raw = delta.values(next_delta);
    float2 go = dy.values(next_dy);
    if (kGate) {
      const float2 zs = z.values(next_z), s = sigmoids(zs.x, zs.y);
      go = {go.x * zs.x * s.x, go.y * zs.y * s.y};
    }
    float steps[2] = {step_log2<T>(raw.x + bias, dims.softplus), step_log2<T>(raw.y + bias, dims.softplus)};
    if (tail < kGroup) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (2 * q + k >= tail) steps[k] = 0;
    }
    input.begin(next_C, {go.x * kOperandScale<T>, go.y * kOperandScale<T>});
    if (more) load();
    // The steps' sums up to the lane's tokens.
    float sum = steps[0] + steps[1];
#pragma unroll
    for (int left = 1; left < 4; left *= 2) {
      const float of = __shfl_up_sync(kAllLanes, sum, left, 4);
      if (q >= left) sum += of;
    }
    const float sums[2] = {total + sum - steps[1], total + sum};
    total = __shfl_sync(kAllLanes, sums[1], 3, 4);
    float a[kGroup][kLaneStates], h[kGroup][kLaneStates];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if (p % 2 == 0) input.inputs(h, p / 2);
      decays(a, sums, A, p);
#pragma unroll
      for (int t = 2 * p; t < 2 * p + 2; ++t)
#pragma unroll
        for (int i = 0; i < kLaneStates; ++i) m[i] = fmaf(a[t][i], h[t][i], m[i]);
    }
    return (a[kGroup - 1][0] + a[kGroup - 1][1]) + (a[kGroup - 1][2] + a[kGroup - 1][3]);
  };
  const int whole = int((end - begin) / kGroup), tail = int((end - begin) % kGroup);
  bool open = true;
  if (whole > 0) load();
  for (int group = 0; group < whole && open; ++group) {
    const float through = process(kGroup, group + 1 < whole);
    open = !dims.softplus || __any_sync(kAllLanes, through != 0);  // steps of any sign may open it again
  }
  if (tail > 0 && open) {
    const int64_t token = begin + int64_t(whole) * kGroup;
    next_delta = lane_of(params.fwd.delta, token).load_some(params.fwd.delta, tail);
    next_dy = lane_of(params.dy, token).load_some(params.dy, tail);
    if (kGate) next_z = lane_of(gate, token).load_some(gate, tail);
    next_C = input_of(token).load_some(C, tail);
    process(tail, false);
  }
  if (!live) return;
  // Where the combination looks for what enters the segment on the left.
  const int64_t at = ((segment - 1) * dims.b + row) * dims.d + channel;
  reinterpret_cast<float4*>(work.carry + at * kTunedState)[q] = make_float4(m[0], m[1], m[2], m[3]);
  if (q == 0) work.steps[(segment * dims.b + row) * dims.d + channel] = total;
}

inline constexpr int kSumThreads = 256;

// Sets the state gradients between segments from those that leave each one alone, and all counters to 0. A
// thread owns a state of a row.
__global__ void __launch_bounds__(kSumThreads)
    scan_combine_gradients(const ScanBwd params, const BwdCut cut, const BwdWork work) {
  const ScanDims& dims = params.fwd.dims;
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, states = dims.b * dims.d * kTunedState;
  for (int64_t k = i; k < work.counters; k += int64_t(gridDim.x) * kSumThreads) work.taken[k] = 0;
  if (i >= states) return;
  const int64_t channel = i / kTunedState % dims.d;
  const View& v = params.fwd.A;
  const float A = load_one<float>(v, channel * v.stride[0] + i % kTunedState * v.stride[1]);
  float m = params.dstates_out ? static_cast<const float*>(params.dstates_out)[i] : 0.f;
  for (int segment = cut.segments - 1; segment > 0; --segment) {
    work.carry[segment * states + i] = m;
    m = fmaf(exp2_of(A * work.steps[(segment * states + i) / kTunedState]), m,
             work.carry[(segment - 1) * states + i]);
  }
  work.carry[i] = m;
}

// dB and dC of the pieces [first, first + portion) of every segment, added up over the channel blocks of a
// group. A thread owns two tokens of two states.
__global__ void __launch_bounds__(kSumThreads)
    scan_sum_channels(const ScanBwd params, const BwdCut cut, const BwdWork work, int first_piece,
                      int pieces) {
  constexpr int kThreads = kGroupSums / 4;  // of a group
  const ScanDims& dims = params.fwd.dims;
  const int64_t groups = cut.piece_tokens / kGroup;
  const int64_t unit = int64_t(blockIdx.x) * (kSumThreads / kThreads) + threadIdx.x / kThreads;
  const int piece = first_piece + int(unit / groups % pieces), group = int(unit % groups);
  const int segment = int(unit / groups / pieces);
  const int64_t token = segment * cut.segment_tokens() + piece * cut.piece_tokens + int64_t(group) * kGroup;
  if (segment >= cut.segments || token >= dims.l) return;
  const int64_t row = blockIdx.y;
  const int which = threadIdx.x % kThreads / kWarp, lane = threadIdx.x % kWarp;
  const View& out = which == 0 ? params.dB : params.dC;
  const int64_t b_groups = which == 0 ? dims.groups_B : dims.groups_C, blocks = cut.channel_blocks / b_groups;
  const int64_t stride = work.group_sums(cut, dims.b, 1, 0, 0, 0, 0) / 4;
  for (int64_t of = 0; of < b_groups; ++of) {
    const float4* from =
        reinterpret_cast<const float4*>(
            work.sums_BC + work.group_sums(cut, dims.b, int(of * blocks), row, segment, piece, group)) +
        threadIdx.x % kThreads;
    float4 sum{};
#pragma unroll 8
    for (int64_t k = 0; k < blocks; ++k) {
      const float4 v = __ldcs(from + k * stride);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    const float of_lane[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t state = lane / 4 * 2 + k % 2, t = token + lane % 4 * 2 + k / 2;
      if (t < dims.l)
        store_one(out, row * out.stride[0] + of * out.stride[1] + state * out.stride[2] + t * out.stride[3],
                  of_lane[k]);
    }
  }
}

// dA, dD and ddelta_bias, added up over pieces and rows. A thread owns a value of a channel.
__global__ void __launch_bounds__(kSumThreads)
    scan_sum_tokens(const ScanBwd params, const BwdCut cut, const BwdWork work) {
  const ScanDims& dims = params.fwd.dims;
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, states = dims.d * kTunedState;
  const int64_t pieces = int64_t(cut.segments) * cut.pieces;
  if (i >= states + 2 * dims.d) return;
  const bool of_A = i < states;
  const float* from = of_A ? work.sums_A + i : work.sums_d + i - states;
  float sum = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    if (piece * cut.piece_tokens >= dims.l) break;
    for (int64_t row = 0; row < dims.b; ++row)
      sum += from[(piece * dims.b + row) * (of_A ? states : 2 * dims.d)];
  }
  if (of_A) {
    store_one(params.dA, i / kTunedState * params.dA.stride[0] + i % kTunedState * params.dA.stride[1], sum);
  } else {
    const View& out = i - states < dims.d ? params.dD : params.ddelta_bias;
    if (out.data) store_one(out, (i - states) % dims.d * out.stride[0], sum);
  }
}

// ---- Host: how a call is cut, and its scratch memory

inline constexpr int64_t kPieceTokens = 512;

struct BwdPlan {
  BwdCut cut{};
  BwdWork work{};
  int64_t bytes = 0;
  int launches = 0;

  BwdPlan(const ScanBwd& p, void* memory) {
    const ScanDims& dims = p.fwd.dims;
    cut.share = int(dims.groups_B == 1 && dims.groups_C == 1 ? dims.d : dims.sharing());
    cut.share_blocks = int((cut.share + kBwdChannels - 1) / kBwdChannels);
    cut.channel_blocks = int(dims.d / cut.share) * cut.share_blocks;
    const int64_t chains = dims.b * cut.channel_blocks, places = multiprocessors() * kBwdBlocks;
    const int64_t windows = (dims.l + kScanCheckpointCuda - 1) / kScanCheckpointCuda;
    cut.segments =
        int(chains * 2 > places ? 1 : std::min(places / chains, std::max<int64_t>(windows / 16, 1)));
    const int64_t segment = (windows + cut.segments - 1) / cut.segments;  // windows
    cut.segments = int((windows + segment - 1) / segment);
    // Chained pieces even out the blocks' turns on the machine; else there is one for each launch.
    const int64_t per_window = chains * cut.segments * kWindowGroups * kGroupSums * int64_t(sizeof(float));
    const int64_t most = std::max<int64_t>(kScanPartialBytes / per_window, 1);
    int64_t piece = chains > places ? kPieceTokens / kScanCheckpointCuda : segment;
    piece = std::min({piece, most, segment});
    cut.pieces = int((segment + piece - 1) / piece);
    piece = (segment + cut.pieces - 1) / cut.pieces;
    launches = int((cut.pieces * piece + most - 1) / most);
    cut.portion = (cut.pieces + launches - 1) / launches;
    launches = (cut.pieces + cut.portion - 1) / cut.portion;
    cut.piece_tokens = piece * kScanCheckpointCuda;

    const auto take = [&](int64_t count) {
      float* at = reinterpret_cast<float*>(static_cast<char*>(memory) + bytes);
      bytes += (count * int64_t(sizeof(float)) + 255) / 256 * 256;
      return at;
    };
    const int64_t rows = cut.segments * dims.b, all = rows * cut.pieces;
    work.carry = take(rows * dims.d * kTunedState);
    work.steps = take(rows * dims.d);
    work.sums_A = take(all * dims.d * kTunedState);
    work.sums_d = take(all * 2 * dims.d);
    work.sums_BC = take(rows * cut.channel_blocks * cut.portion * (cut.piece_tokens / kGroup) * kGroupSums);
    work.counters = launches + int(rows * cut.channel_blocks);
    work.taken = reinterpret_cast<int*>(take(work.counters));
    work.done = work.taken + launches;
  }
};

}  // namespace mamba_ops::gpu

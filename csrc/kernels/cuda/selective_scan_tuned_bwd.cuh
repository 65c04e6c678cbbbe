// The tuned backward of the selective scan: how its work is cut, its scratch and shared memory, and the first
// of its two ways through a window of 64 tokens.
#pragma once
#include "kernels/cuda/selective_scan_tuned_factors.cuh"

namespace mamba_ops::gpu {

inline constexpr int kBwdWarps = 4;
inline constexpr int kBwdChannels = kBwdWarps * kWarpChannels;  // of a block
inline constexpr int kGroupSums = 2 * kGroup * kTunedState;     // dB and dC of a group

// Rows are cut into segments, segments into pieces; a piece is a whole number of windows of 64 tokens.
struct BwdCut {
  int64_t piece_tokens;
  int segments, pieces;              // pieces of a segment
  int portion;                       // pieces of a segment in one launch
  int channel_blocks, share_blocks;  // a share: channels with the same B and C
  int share;                         // channels

  __host__ __device__ int64_t segment_tokens() const { return pieces * piece_tokens; }
};

// Scratch memory.
struct BwdWork {
  float* carry;   // (segments, b, d, n): the state gradient that enters a segment, then a piece, on its right
  float* steps;   // (segments, b, d): sum of the steps of a segment
  float* sums_A;  // (segments, pieces, b, d, n)
  float* sums_d;  // (segments, pieces, b, 2, d): dD, ddelta_bias
  float* sums_BC;  // (channel blocks, b, segments, portion, groups of a piece, kGroupSums)
  int* taken;      // (launches): pieces that blocks have taken
  int* done;       // (segments, b, channel blocks): pieces that are done
  int counters;    // of both

  __device__ int64_t group_sums(const BwdCut& cut, int64_t b, int block, int64_t row, int segment, int piece,
                                int group) const {
    const int64_t groups = cut.piece_tokens / kGroup;
    return ((((block * b + row) * cut.segments + segment) * cut.portion + piece % cut.portion) * groups +
            group) *
           kGroupSums;
  }
};

inline constexpr int kWindowGroups = kScanCheckpointCuda / kGroup;
inline constexpr int kRun = 4;  // tokens that are run again with decays and states in registers
inline constexpr int kFactorRow = kTunedState + 4;  // floats of a token of B or C, against bank conflicts

inline constexpr int kBwdBlocks = 3;  // of a multiprocessor at once

// Shared memory of a warp.
struct BwdShared {
  float4 rates[kWarp];  // A of the states 4 q and up of channel g
  float bias[kWarpChannels], D[kWarpChannels];
  float4 states[kWindowGroups][kGroup / kRun][kWarp];  // that enter each run
  float go[kWindowGroups][kGroup][kWarpChannels];      // times kOperandScale
  union {
    float4 over_states[kRun][kWarp + 4];  // a lane's part of s and sum_i A w, for its two channels
    float4 sums[2][kWarp];                // dB and dC of a group
  };
  float delta[kGroup][kWarpChannels], input[kGroup][kWarpChannels];  // input: delta u kOperandScale
  float B[kGroup][kFactorRow];
};
template <class T>
struct BwdWarp : BwdShared {};
template <>
struct BwdWarp<float> : BwdShared {
  float C[kGroup][kFactorRow];
  union {
    float factors[2 * kGroup * kTunedState];  // of the first run
    struct {
      float2 dB[kGroup][kWarp], dC[kGroup][kWarp];  // a lane's part for its two states
    };
  };
};
template <class T>
struct BwdBlock {
  BwdWarp<T> warp[kBwdWarps];
  int taken;
};

__device__ inline float2& pair_at(float (&values)[kGroup][kWarpChannels], int t) {
  return *reinterpret_cast<float2*>(&values[t][threadIdx.x % 4 * 2]);
}

template <class T>
__device__ inline float* shared_factors(BwdWarp<T>& shared, int which) {
  if constexpr (sizeof(T) == 4)
    return shared.factors + which * kGroup * kTunedState;
  else
    return nullptr;
}

// Bytes from group to group.
struct BwdStrides {
  uint32_t u, delta, z, dy, du, ddelta, dz, B, C;
};

// Which channels a block and its warps have, and which tokens.
struct BwdPlace {
  int segment, piece, block;
  int64_t row, begin, end;  // tokens
  int64_t first;            // channel of the warp
  int channels;             // of the warp, 0 to 8

  __device__ BwdPlace(const ScanDims& dims, const BwdCut& cut, int taken, int first_piece, int pieces) {
    const int warp = threadIdx.x / kWarp;
    const int64_t chains = dims.b * cut.channel_blocks;
    block = int(taken % cut.channel_blocks);
    row = taken % chains / cut.channel_blocks;
    segment = int(taken / chains % cut.segments);
    piece = first_piece + pieces - 1 - int(taken / chains / cut.segments);
    begin = segment * cut.segment_tokens() + piece * cut.piece_tokens;
    end = std::min(begin + cut.piece_tokens, dims.l);
    const int64_t share = int64_t(block / cut.share_blocks) * cut.share;
    first = share + block % cut.share_blocks * kBwdChannels + warp * kWarpChannels;
    channels = int(std::max<int64_t>(std::min<int64_t>(share + cut.share - first, kWarpChannels), 0));
    if (channels == 0) first = share;
  }
  // Pieces of the chain on the right of this one.
  __device__ int before(const ScanDims& dims, const BwdCut& cut) const {
    const int64_t tokens = std::min(cut.segment_tokens(), dims.l - segment * cut.segment_tokens());
    return int((tokens + cut.piece_tokens - 1) / cut.piece_tokens) - 1 - piece;
  }
};

// Up to 64 tokens of a piece, in groups of which the last has `tail` tokens.
struct BwdWindow {
  int64_t begin;
  int groups, tail;
};

// What the first way needs of the warp's channels.
template <class T>
__device__ void put_channels(const ScanFwd& p, const BwdPlace& at, BwdWarp<T>& shared) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int64_t channel = at.first + (g < at.channels ? g : 0);
  float A[kLaneStates];
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i)
    A[i] = load_one<float>(p.A, channel * p.A.stride[0] + (4 * q + i) * p.A.stride[1]);
  shared.rates[lane] = make_float4(A[0], A[1], A[2], A[3]);
  if (q == 0)
    shared.bias[g] =
        p.delta_bias.data ? load_one<float>(p.delta_bias, channel * p.delta_bias.stride[0]) : 0.f;
  if (q == 0) shared.D[g] = p.D.data ? load_one<float>(p.D, channel * p.D.stride[0]) : 0.f;
  __syncwarp();
}

// The recurrence through a window once more: fills states and go, stores dz. B, C: of the row and channels,
// from token 0.
template <class T, Along kAlong, bool kGate>
__device__ void run_again(const ScanBwd& params, const BwdStrides& strides, const BwdPlace& at,
                          BwdWarp<T>& shared, const T* B, const T* C, const BwdWindow& window) {
  const ScanDims& dims = params.fwd.dims;
  const View &u_view = params.fwd.u, &delta_view = params.fwd.delta, &B_view = params.fwd.B,
             &C_view = params.fwd.C;
  const View &z_view = kGate ? params.fwd.z : u_view, &dz_view = kGate ? params.dz : params.du;
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int64_t row = at.row;
  using Lane = LaneTokens<T, kAlong>;
  using Input = InputFactor<T, kAlong>;
  using Output = OutputFactor<T, kAlong>;
  const bool live = g < at.channels, moves = Lane::live(at.channels);
  const int64_t channel = at.first + (live ? g : 0);
  const float4 rates = shared.rates[lane];
  const float A[kLaneStates] = {rates.x, rates.y, rates.z, rates.w}, bias = shared.bias[g], D = shared.D[g];
  float state[kLaneStates] = {};
  const int64_t checkpoint = row * (dims.l / kScanCheckpointCuda) + window.begin / kScanCheckpointCuda - 1;
  const float* from =
      static_cast<const float*>(window.begin == 0 ? params.fwd.states_in : params.fwd.checkpoints);
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i)
    if (from)
      state[i] = window.begin == 0 ? from[(row * dims.d + channel) * kTunedState + 4 * q + i]
                                   : from[(checkpoint * kTunedState + 4 * q + i) * dims.d + channel];

  const auto lane_of = [&](const View& v) { return Lane(v, row, at.first, at.channels, window.begin); };
  Lane u = lane_of(u_view), delta = lane_of(delta_view), z = lane_of(z_view), dy = lane_of(params.dy),
       dz = lane_of(dz_view);
  Input input(B_view, B + window.begin * B_view.stride[3], shared_factors(shared, 0));
  Output output(C_view, C + window.begin * C_view.stride[3], shared_factors(shared, 1));
  Pack<T, 2> next_u, next_delta, next_z, next_dy;
  typename Input::Raw next_B;
  typename Output::Raw next_C;
  const auto load = [&](int group) {
    if (group + 1 == window.groups && window.tail < kGroup) {
      const int64_t token = window.begin + group * kGroup;
      const auto end_of = [&](const View& v) { return Lane(v, row, at.first, at.channels, token); };
      next_u = end_of(u_view).load_some(u_view, window.tail);
      next_delta = end_of(delta_view).load_some(delta_view, window.tail);
      next_dy = end_of(params.dy).load_some(params.dy, window.tail);
      next_B = Input(B_view, B + token * B_view.stride[3], shared_factors(shared, 0))
                   .load_some(B_view, window.tail);
      if (kGate) {
        next_z = end_of(z_view).load_some(z_view, window.tail);
        next_C = Output(C_view, C + token * C_view.stride[3], shared_factors(shared, 1))
                     .load_some(C_view, window.tail);
      }
      return;
    }
    next_u = u.load(u_view);
    next_delta = delta.load(delta_view);
    next_dy = dy.load(params.dy);
    next_B = input.load(B_view);
    u.advance(strides.u);
    delta.advance(strides.delta);
    dy.advance(strides.dy);
    input.advance(strides.B);
    if (kGate) {
      next_z = z.load(z_view);
      next_C = output.load(C_view);
      z.advance(strides.z);
      output.advance(strides.C);
    }
  };
  load(0);
  for (int group = 0; group < window.groups; ++group) {
    const bool last = group + 1 == window.groups;
    const float2 us = u.values(next_u), raw = delta.values(next_delta), dys = dy.values(next_dy);
    float2 zs{}, s{1, 1};
    if (kGate) {
      zs = z.values(next_z);
      s = sigmoids(zs.x, zs.y);
    }
    const float2 go = kGate ? float2{dys.x * zs.x * s.x, dys.y * zs.y * s.y} : dys;
    shared.go[group][2 * q][g] = live ? go.x * kOperandScale<T> : 0.f;
    shared.go[group][2 * q + 1][g] = live ? go.y * kOperandScale<T> : 0.f;
    shared.states[group][0][lane] = make_float4(state[0], state[1], state[2], state[3]);
    const float steps[2] = {step_log2<T>(raw.x + bias, dims.softplus),
                            step_log2<T>(raw.y + bias, dims.softplus)};
    constexpr float kScale = kFromLog2 * kOperandScale<T>;
    input.begin(next_B, {steps[0] * kScale * us.x, steps[1] * kScale * us.y});
    if (kGate) output.begin(next_C);
    if (!last) load(group + 1);
    float a[kGroup][kLaneStates], h[kGroup][kLaneStates];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if (p % 2 == 0) input.inputs(h, p / 2);
      decays(a, steps, A, p);
      advance(h, a, state, p);
      if (kGate) output.outputs(h, p);
      if (p == 1) shared.states[group][1][lane] = make_float4(state[0], state[1], state[2], state[3]);
    }
    if (kGate) {
      const float2 sum = output.result();
      const float2 o = {fmaf(D, us.x, sum.x), fmaf(D, us.y, sum.y)};
      const float2 dzs = {dys.x * o.x * s.x * fmaf(zs.x, 1 - s.x, 1.f),
                          dys.y * o.y * s.y * fmaf(zs.y, 1 - s.y, 1.f)};
      if (last && window.tail < kGroup)
        dz.store_some(dz_view, moves, dzs, window.tail);
      else
        dz.store(dz_view, moves, dzs);
      dz.advance(strides.dz);
    }
  }
  __syncwarp();
}

}  // namespace mamba_ops::gpu

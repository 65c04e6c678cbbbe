// The tuned backward of the selective scan: its shared memory, and the first of its two ways through a window
// of 64 tokens.
#pragma once
#include "kernels/cuda/selective_scan_tuned_chain.cuh"

namespace mamba_ops::gpu {

inline constexpr int kWindowGroups = kScanCheckpointCuda / kGroup;
inline constexpr int kFactorRow = kTunedState + 4;  // floats of a token of B or C, against bank conflicts
inline constexpr int kHalf = kGroup / 2;            // tokens of which sums over states are taken at once

// A value for each token and channel of a group. Tokens 4 and up lie in swapped pairs, against bank
// conflicts.
struct TokenValues {
  float value[kGroup][kWarpChannels];

  __device__ float& at(int token, int channel) { return value[token ^ token / 4][channel]; }
  // Of the lane's channels 2 q and 2 q + 1.
  __device__ float2& pair(int token) { return *reinterpret_cast<float2*>(&at(token, threadIdx.x % 4 * 2)); }
};

// States between the ways: a lane of the first puts those of 4 q and up of channel g, a lane of the second
// takes 2 g and 2 g + 1 of channel 2 q + c. The places of two channels are turned against those of the next
// two, against bank conflicts.
struct StateValues {
  float4 value[kWarp];

  __device__ void put(const float (&v)[kLaneStates]) {
    const int lane = threadIdx.x % kWarp;
    value[lane ^ lane / 8 * 2] = make_float4(v[0], v[1], v[2], v[3]);
  }
  __device__ float2 pair(int c) const {
    const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
    return reinterpret_cast<const float2*>(&value[((2 * q + c) * 4 + g / 2) ^ q * 2])[g % 2];
  }
};

// What the first way through a window leaves for the second one; there it makes room for the group's sums.
union BwdGroup {
  struct {
    StateValues states;  // that enter the group
    // input: delta u; go and input: times kOperandScale; slope: of the softplus.
    TokenValues delta, slope, input, go;
  };
  float4 sums[2 * kWarp];  // dB, then dC: value 2 k + s of a lane is of token 2 q + k and state 2 g + s
};

// Products with B and C, and sums over channels, run on the tensor cores. Not so in float16: they would cut
// the operands to as many bits as the results have.
template <class T>
inline constexpr bool kTensorSums = std::is_same_v<T, bf16>;

enum BwdTensor { kU, kDelta, kZ, kDy, kDu, kDdelta, kDz, kB, kC, kCheckpoints, kTensors };

// Shared memory of a warp.
struct BwdShared {
  BwdGroup group[kWindowGroups];
  float4 rates[kWarp];  // A of the states 4 q and up of channel g
  float bias[kWarpChannels], D[kWarpChannels];
  union {
    // A lane's part of s and sum_i A w, for its two channels; for two of the tokens in the other order,
    // against bank conflicts.
    float4 over_states[kHalf][kWarp + 4];
    StateValues entering;
  };
  char* start[kTensors];  // of the window, at the warp's first channel
};
template <class T, bool = kTensorSums<T>>
struct BwdWarp : BwdShared {
  float B[kGroup][kFactorRow];
};
template <class T>
struct BwdWarp<T, false> : BwdShared {
  union {
    float factors[2 * kGroup * kTunedState];  // of the first way
    struct {
      float B[kGroup][kFactorRow], C[kGroup][kFactorRow];
      float4 over_channels[kHalf][kWarp + 1];  // a lane's part of dB and dC for its two states
    };
  };
};
template <class T>
struct BwdBlock {
  BwdWarp<T> warp[kBwdWarps];
  int taken;
};

template <class T>
__device__ inline float* shared_factors(BwdWarp<T>& shared, int which) {
  if constexpr (sizeof(T) == 4)
    return shared.factors + which * kGroup * kTunedState;
  else
    return nullptr;
}

// Constants of a call.
struct BwdStrides {
  uint32_t bytes[kTensors];  // from group to group, none of the checkpoints
  float softplus_limit;
};

// Up to 64 tokens of a piece, in groups of which the last has `tail` tokens.
struct BwdWindow {
  bool first;  // of the row
  int groups, tail;

  __device__ bool cut_short(int group) const { return tail < kGroup && group + 1 == groups; }
};

// What the first way needs of the warp's channels, and where its last window begins.
template <class T>
__device__ void put_channels(const ScanBwd& params, const BwdPlace& at, BwdWarp<T>& shared, int64_t token) {
  const ScanFwd& p = params.fwd;
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
  if (lane == 0) {
    const auto put = [&](BwdTensor i, const View& v, int64_t group, int64_t along) {
      shared.start[i] = static_cast<char*>(v.data) +
                        (at.row * v.stride[0] + group * v.stride[1] + token * along) * int64_t(sizeof(T));
    };
    put(kU, p.u, at.first, p.u.stride[2]);
    put(kDelta, p.delta, at.first, p.delta.stride[2]);
    put(kZ, p.z, at.first, p.z.stride[2]);
    put(kDy, params.dy, at.first, params.dy.stride[2]);
    put(kDu, params.du, at.first, params.du.stride[2]);
    put(kDdelta, params.ddelta, at.first, params.ddelta.stride[2]);
    put(kDz, params.dz, at.first, params.dz.stride[2]);
    put(kB, p.B, at.first / (p.dims.d / p.dims.groups_B), p.B.stride[3]);
    put(kC, p.C, at.first / (p.dims.d / p.dims.groups_C), p.C.stride[3]);
    const int64_t checkpoint =
        at.row * (p.dims.l / kScanCheckpointCuda) + token / kScanCheckpointCuda - 1;  // before the window
    shared.start[kCheckpoints] = static_cast<char*>(const_cast<void*>(p.checkpoints)) +
                                 (checkpoint * kTunedState * p.dims.d + at.first) * int64_t(sizeof(float));
  }
  __syncwarp();
}

// Moves on to a window on the left.
template <class T>
__device__ void move_left(const BwdStrides& strides, int64_t d, BwdWarp<T>& shared, int windows) {
  const int i = threadIdx.x % kWarp;
  if (i < kTensors)
    shared.start[i] -= windows * (i == kCheckpoints ? kTunedState * d * int64_t(sizeof(float))
                                                    : int64_t(strides.bytes[i]) * kWindowGroups);
}

// Asks for what the first way through a window on the left reads first.
template <class T, bool kGate>
__device__ void prefetch_left(const BwdStrides& strides, int64_t d, BwdWarp<T>& shared, int windows) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (const BwdTensor i : {kU, kDelta, kDy, kZ}) {
    if (i == kZ && !kGate) continue;
    const int64_t token = strides.bytes[i] / kGroup;
    const char* p = shared.start[i] - ((windows - 1) * kScanCheckpointCuda + lane + 1) * token;
    ask_for(p);
    ask_for(p - kWarp * token);
  }
  if (lane < kTunedState)
    ask_for(shared.start[kCheckpoints] - (windows * kTunedState - lane) * d * int64_t(sizeof(float)));
}

// What leaves a window on the left: `alone` if nothing enters on the right, and the part of that which gets
// through.
struct WindowGradient {
  float alone[kLaneStates], through[kLaneStates];
};

// The recurrence through a window once more: fills shared.group, stores dz. With kTurns also, of a group,
//   sum_t 2^(A (delta_begin + .. + delta_t)) C_t go_t
template <class T, Along kAlong, bool kGate, bool kTurns>
__device__ WindowGradient run_again(const ScanBwd& params, const BwdStrides& strides, const BwdPlace& at,
                                    BwdWarp<T>& shared, const BwdWindow& window) {
  const ScanDims& dims = params.fwd.dims;
  const View &u_view = params.fwd.u, &delta_view = params.fwd.delta, &B_view = params.fwd.B,
             &C_view = params.fwd.C;
  const View &z_view = kGate ? params.fwd.z : u_view, &dz_view = kGate ? params.dz : params.du;
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  using Lane = LaneTokens<T, kAlong>;
  using Input = InputFactor<T, kAlong>;
  using Output = OutputFactor<T, kAlong>;
  const bool live = g < at.channels, moves = Lane::live(at.channels);
  const float4 rates = shared.rates[lane];
  const float A[kLaneStates] = {rates.x, rates.y, rates.z, rates.w}, bias = shared.bias[g], D = shared.D[g];
  const float go_scale = live ? kOperandScale<T> : 0.f, input_scale = kFromLog2 * go_scale;
  float state[kLaneStates] = {};
  if (!window.first) {
    const float* from = reinterpret_cast<const float*>(shared.start[kCheckpoints]) + (live ? g : 0);
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) state[i] = from[(4 * q + i) * dims.d];
  } else if (params.fwd.states_in) {
    const float* from = static_cast<const float*>(params.fwd.states_in) +
                        (at.row * dims.d + at.first + (live ? g : 0)) * kTunedState;
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) state[i] = from[4 * q + i];
  }

  const auto lane_of = [&](const View& v, BwdTensor i) { return Lane(v, shared.start[i], at.channels); };
  const auto factor_of = [&](BwdTensor i) {
    __builtin_assume(__isGlobal(shared.start[i]));
    return reinterpret_cast<const T*>(shared.start[i]);
  };
  Lane u = lane_of(u_view, kU), delta = lane_of(delta_view, kDelta), z = lane_of(z_view, kGate ? kZ : kU),
       dy = lane_of(params.dy, kDy), dz = lane_of(dz_view, kGate ? kDz : kDu);
  const OwnTokens own;
  Input input(B_view, factor_of(kB), shared_factors(shared, 0), own);
  Output output(C_view, factor_of(kC), shared_factors(shared, 1), own);
  Input gradient(C_view, factor_of(kC), shared_factors(shared, 1), own);  // takes what `output` has loaded
  WindowGradient left{};
  float total = 0;  // of the steps
  Pack<T, 2> next_u, next_delta, next_z, next_dy;
  typename Input::Raw next_B, next_C;
  // Before the loads: a step after one waits until that has read its address.
  const auto step_loads = [&](int64_t groups) {
    u.step(groups * strides.bytes[kU]);
    delta.step(groups * strides.bytes[kDelta]);
    dy.step(groups * strides.bytes[kDy]);
    input.step(groups * strides.bytes[kB]);
    if (kGate) z.step(groups * strides.bytes[kZ]);
    if (kGate || kTurns) output.step(groups * strides.bytes[kC]);
  };
  const auto load = [&](int group) {
    step_loads(1);
    if (window.cut_short(group)) {
      next_u = u.load_some(u_view, window.tail);
      next_delta = delta.load_some(delta_view, window.tail);
      next_dy = dy.load_some(params.dy, window.tail);
      next_B = input.load_some(B_view, window.tail);
      if (kGate) next_z = z.load_some(z_view, window.tail);
      if (kGate || kTurns) next_C = output.load_some(C_view, window.tail);
      return;
    }
    next_u = u.load(u_view);
    next_delta = delta.load(delta_view);
    next_dy = dy.load(params.dy);
    next_B = input.load(B_view);
    if (kGate) next_z = z.load(z_view);
    if (kGate || kTurns) next_C = output.load(C_view);
  };
  step_loads(-1);
  dz.step(0);
  load(0);
  for (int group = 0; group < window.groups; ++group) {
    const bool cut_short = window.cut_short(group);
    const float2 us = u.values(next_u), raw = delta.values(next_delta), dys = dy.values(next_dy);
    float2 zs{}, s{1, 1}, go = dys;
    if (kGate) {
      zs = z.values(next_z);
      s = sigmoids(zs.x, zs.y);
      go = {dys.x * zs.x * s.x, dys.y * zs.y * s.y};
    }
    BwdGroup& kept = shared.group[group];
    kept.states.put(state);
    float steps[2], inputs[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int t = 2 * q + k;
      float slope;
      steps[k] = step_log2<T>((k ? raw.y : raw.x) + bias, strides.softplus_limit, slope);
      if (cut_short && t >= window.tail) steps[k] = slope = 0;
      inputs[k] = steps[k] * input_scale * (k ? us.y : us.x);
      kept.delta.at(t, g) = steps[k];
      kept.slope.at(t, g) = slope;
      kept.input.at(t, g) = inputs[k];
      kept.go.at(t, g) = (k ? go.y : go.x) * go_scale;
    }
    input.begin(next_B);
    input.scale(inputs[0], inputs[1]);
    if (kGate) output.begin(next_C);
    if (kTurns) {
      gradient.begin(next_C);
      gradient.scale(go.x * go_scale, go.y * go_scale);
    }
    if (group + 1 < window.groups) load(group + 1);
    float a[kGroup][kLaneStates], h[kGroup][kLaneStates];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if (p % 2 == 0) input.inputs(h, p / 2);
      decays(a, steps, A, p);
      advance(h, a, state, p);
      if (kGate) output.outputs(h, p);
    }
    if (kTurns) {
      float x[kGroup][kLaneStates], steps_sum = steps[0] + steps[1];
#pragma unroll
      for (int j = 0; j < 2; ++j) gradient.inputs(x, j);
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) steps_sum += __shfl_xor_sync(kAllLanes, steps_sum, lanes);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        float sum = x[kGroup - 1][i];
#pragma unroll
        for (int t = kGroup - 2; t >= 0; --t) sum = fmaf(a[t + 1][i], sum, x[t][i]);
        left.alone[i] = fmaf(decay_over<T>(total * A[i]) * a[0][i], sum, left.alone[i]);
      }
      total += steps_sum;
    }
    if (kGate) {
      const float2 sum = output.result();
      const float2 o = {fmaf(D, us.x, sum.x), fmaf(D, us.y, sum.y)};
      const float2 dzs = {dys.x * o.x * s.x * fmaf(zs.x, 1 - s.x, 1.f),
                          dys.y * o.y * s.y * fmaf(zs.y, 1 - s.y, 1.f)};
      if (cut_short)
        dz.store_some(dz_view, moves, dzs, window.tail);
      else
        dz.store(dz_view, moves, dzs);
      dz.step(strides.bytes[kDz]);
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i) left.through[i] = decay_over<T>(total * A[i]);
  __syncwarp();
  return left;
}

// Turns: m, the state gradient that enters a window on its right. What leaves it is passed on at once.
inline __device__ void pass_window(float (&m)[4], const WindowGradient& left, BwdShared& shared,
                                   Passed* carry, int before) {
  float enters[kLaneStates], leaves[kLaneStates];
  await(enters, carry, before);
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i) leaves[i] = fmaf(left.through[i], enters[i], left.alone[i]);
  pass_on(leaves, carry, before + 1);
  shared.entering.put(enters);
  __syncwarp();
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float2 v = shared.entering.pair(c);
    m[2 * c] = v.x, m[2 * c + 1] = v.y;
  }
}

}  // namespace mamba_ops::gpu

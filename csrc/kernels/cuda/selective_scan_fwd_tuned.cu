// Selective scan, forward, for 16 real states a channel (math: kernels/selective_scan.h; which calls:
// selective_scan_tuned.cuh; a warp's way through a group: selective_scan_tuned_factors.cuh).
//
//   h_t = 2^(delta_t A log2 e) h_{t-1} + delta_t u_t B_t;  y_t = (C_t h_t + D u_t) silu(z_t)
//
// A warp takes 8 channels of a row through all tokens, in groups of 8; no barrier, and in 16 bits no shared
// memory. While it computes a group the next one is on its way to registers, and a later one to L2. Few
// channels leave most of the machine idle: there the `kTurns` warps of a block share 8 channels and take a
// round of groups at once. Each makes decays and inputs of its group and what they make of the state, and
// leaves that in shared memory; between two barriers one warp, another in each round, takes the state through
// the groups; then each makes its outputs. No value is summed by two threads: bitwise repeatable. Tail tokens
// are a group with steps of zero.
//
// Special-function units and issue slots bound it: 39 of some 260 instructions of a warp and group are
// special functions, at 8 cycles each. On an H100 with b4 d5120 l4096 and all options, 0.62 ms in bfloat16
// (ncu, of 317 instructions in 0.67 ms: special-function units 65 % busy, issue slots 66 %, device memory
// 32 %), 0.82 ms in float32. Turns: some 370 instructions of a warp and group, 43 of them special functions,
// and the barriers.
#include <algorithm>
#include <climits>

#include "kernels/cuda/selective_scan_tuned_factors.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kEnoughChains = 6;  // of a multiprocessor, for one warp each
constexpr int kAheadGroups = 8;   // of the prefetch to L2
constexpr int kCheckpointGroups = kScanCheckpointCuda / kGroup;

template <int kTurns>
constexpr int kFwdWarps = kTurns < 4 ? 4 : kTurns;

// The state between the groups of a round, one of each warp of the block.
template <int kTurns>
struct Round {
  struct {
    float4 through[kWarp], alone[kWarp];  // what a group makes of the state, h -> through h + alone
  } group[kTurns];
  float4 state[kWarp];  // that enters the round

  // Of all warps of the block, wherever they are.
  __device__ static void meet() { asm volatile("bar.sync 0;" ::: "memory"); }

  // The state that enters the warp's group. One warp, `mine`, takes it through the round.
  __device__ float4 pass(int turn, bool mine, const float (&through)[kLaneStates],
                         const float (&alone)[kLaneStates]) {
    const int lane = threadIdx.x % kWarp;
    group[turn].through[lane] = make_float4(through[0], through[1], through[2], through[3]);
    group[turn].alone[lane] = make_float4(alone[0], alone[1], alone[2], alone[3]);
    meet();
    if (mine) {
      float4 h = state[lane];
#pragma unroll
      for (int k = 0; k < kTurns; ++k) {
        const float4 a = group[k].through[lane], x = group[k].alone[lane];
        group[k].alone[lane] = h;
        h = make_float4(fmaf(a.x, h.x, x.x), fmaf(a.y, h.y, x.y), fmaf(a.z, h.z, x.z), fmaf(a.w, h.w, x.w));
      }
      state[lane] = h;
    }
    meet();
    return group[turn].alone[lane];
  }
};
template <>
struct Round<1> {};

// Bytes by which a warp moves on after a group.
struct Strides {
  uint32_t u, delta, z, y, B, C;
};

// Asks for the rows of a later group of u, delta and z: 8 rows of 32 channels of the block in 16 bits. The
// block has 4 warps.
template <class T>
struct Prefetch {
  const T* p = nullptr;
  uint32_t bytes;

  __device__ Prefetch(const ScanFwd& params, const Strides& strides, int64_t row, int64_t channel) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const View& v = warp == 0 ? params.u : warp == 1 ? params.delta : params.z;
    bytes = warp == 0 ? strides.u : warp == 1 ? strides.delta : strides.z;
    channel += (lane % 2 * 2 - warp) * kWarpChannels;
    if (warp == 3 || lane / 2 >= kGroup || !v.data || channel >= params.dims.d) return;
    p = static_cast<const T*>(v.data) + row * v.stride[0] + channel * v.stride[1] +
        (lane / 2 + kAheadGroups * kGroup) * v.stride[2];
  }
  __device__ void operator()() {
    if (!p) return;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
    move(p, bytes);
  }
};

template <class T, Along kAlong, bool kGate, int kTurns>
__global__ void __launch_bounds__(kFwdWarps<kTurns>* kWarp, kTurns == 1 ? 5 : 16 / kFwdWarps<kTurns>)
    scan_fwd_tuned(const ScanFwd params, const Strides strides) {
  constexpr int kWarps = kFwdWarps<kTurns>;
  using Lane = LaneTokens<T, kAlong>;
  __shared__ Round<kTurns> round;
  using Input = InputFactor<T, kAlong>;
  using Output = OutputFactor<T, kAlong>;
  __shared__ float s_B[kWarps][Input::kShared], s_C[kWarps][Output::kShared];
  const ScanDims& dims = params.dims;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, q = lane % 4;
  const int turn = warp % kTurns;
  const int64_t row = blockIdx.y;
  const int64_t first = (int64_t(blockIdx.x) * (kWarps / kTurns) + warp / kTurns) * kWarpChannels;
  if (first >= dims.d) return;
  const int channels = int(std::min<int64_t>(dims.d - first, kWarpChannels));
  const bool live = lane / 4 < channels;
  uint32_t stores = Lane::live(channels);
  keep(stores);
  const int64_t channel = first + (live ? lane / 4 : 0);
  const int whole = int(dims.l / kGroup), tail = int(dims.l % kGroup), groups = whole + (tail > 0);

  float A[kLaneStates], state[kLaneStates] = {};
#pragma unroll
  for (int i = 0; i < kLaneStates; ++i)
    A[i] = load_one<float>(params.A, channel * params.A.stride[0] + (4 * q + i) * params.A.stride[1]);
  const float D = params.D.data ? load_one<float>(params.D, channel * params.D.stride[0]) : 0.f;
  const float bias = params.delta_bias.data
                         ? load_one<float>(params.delta_bias, channel * params.delta_bias.stride[0])
                         : 0.f;
  const auto state_at = [&](void* states) {
    return reinterpret_cast<float4*>(static_cast<float*>(states) + (row * dims.d + channel) * kTunedState) +
           q;
  };
  const auto take = [&](const float4& v) { state[0] = v.x, state[1] = v.y, state[2] = v.z, state[3] = v.w; };
  if (params.states_in) take(*state_at(const_cast<void*>(params.states_in)));

  const View& gate = kGate ? params.z : params.u;
  const auto lane_of = [&](const View& v, int group) {
    return Lane(v, row, first, channels, int64_t(group) * kGroup);
  };
  const auto input_of = [&](int group) {
    return Input(params.B, factor<T>(params.B, dims.groups_B, dims, row, first, int64_t(group) * kGroup),
                 s_B[warp]);
  };
  const auto output_of = [&](int group) {
    return Output(params.C, factor<T>(params.C, dims.groups_C, dims, row, first, int64_t(group) * kGroup),
                  s_C[warp]);
  };
  Lane u = lane_of(params.u, turn), delta = lane_of(params.delta, turn), z = lane_of(gate, turn),
       y = lane_of(params.y, turn);
  Input input = input_of(turn);
  Output output = output_of(turn);
  constexpr bool kPrefetches = kTurns == 1 && kAlong == Along::channels && sizeof(T) == 2;
  Prefetch<T> prefetch(params, strides, row, first);
  Pack<T, 2> next_u, next_delta, next_z;
  typename Input::Raw next_B;
  typename Output::Raw next_C;
  const auto load = [&] {
    next_u = u.load(params.u);
    next_delta = delta.load(params.delta);
    if (kGate) next_z = z.load(gate);
    next_B = input.load(params.B);
    next_C = output.load(params.C);
    u.advance(strides.u);
    delta.advance(strides.delta);
    if (kGate) z.advance(strides.z);
    input.advance(strides.B);
    output.advance(strides.C);
  };

  // In float32 the state of one warp for a chain is mended after every window.
  constexpr bool kMends = sizeof(T) == 4 && kTurns == 1;
  uint32_t until_window =
      kMends || (params.checkpoints && turn == kTurns - 1) ? kCheckpointGroups / kTurns : 0;
  LongMemory memory;
  memory.begin(state);
  float total = 0;  // of the lane's steps in the window
  const auto process = [&]<bool kWhole>(int group) {
    const float2 us = u.values(next_u), raw = delta.values(next_delta);
    float2 zs{};
    if (kGate) zs = z.values(next_z);
    float steps[2] = {step_log2<T>(raw.x + bias, dims.softplus), step_log2<T>(raw.y + bias, dims.softplus)};
    if (!kWhole) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (2 * q + k >= tail) steps[k] = 0;
    }
    constexpr float kScale = kFromLog2 * kOperandScale<T>;
    input.begin(next_B, {steps[0] * kScale * us.x, steps[1] * kScale * us.y});
    output.begin(next_C);
    if (kWhole && group + kTurns < whole) {
      load();
      if (kPrefetches && group + kAheadGroups < whole) prefetch();
    }

    float a[kGroup][kLaneStates], h[kGroup][kLaneStates];
    if constexpr (kTurns == 1) {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        if (p % 2 == 0) input.inputs(h, p / 2);
        decays(a, steps, A, p);
        advance(h, a, state, p);
        output.outputs(h, p);
        if (kMends) memory.step(a[2 * p]), memory.step(a[2 * p + 1]);
      }
      total += steps[0] + steps[1];
    } else {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        if (p % 2 == 0) input.inputs(h, p / 2);
        decays(a, steps, A, p);
      }
      float alone[kLaneStates], through[kLaneStates], sum = steps[0] + steps[1];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) {
        through[i] = decay_over<T>(sum * A[i]);
        alone[i] = h[0][i];
#pragma unroll
        for (int t = 1; t < kGroup; ++t) alone[i] = fmaf(a[t][i], alone[i], h[t][i]);
      }
      take(round.pass(turn, group / kTurns % kTurns == turn, through, alone));
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        advance(h, a, state, p);
        output.outputs(h, p);
      }
    }

    const float2 sums = output.result();
    float2 o = {fmaf(D, us.x, sums.x), fmaf(D, us.y, sums.y)};
    if (kGate) {
      const float2 s = sigmoids(zs.x, zs.y);
      o = {o.x * (zs.x * s.x), o.y * (zs.y * s.y)};
    }
    if (kWhole)
      y.store(params.y, stores, o);
    else
      y.store_some(params.y, stores, o, tail);
    y.advance(strides.y);
    if (kWhole && --until_window == 0) {
      until_window = kCheckpointGroups / kTurns;
      if (kMends) {
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        memory.mend(state, {total * A[0], total * A[1], total * A[2], total * A[3]});
        memory.begin(state);
        total = 0;
        if (!params.checkpoints) return;
      }
      const int64_t at = row * (dims.l / kScanCheckpointCuda) + group / kCheckpointGroups;
      float* to = static_cast<float*>(params.checkpoints) + (at * kTunedState + 4 * q) * dims.d + channel;
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i)
        if (live) to[i * dims.d] = state[i];
    }
  };

  if constexpr (kTurns > 1) {
    if (turn == 0) round.state[lane] = make_float4(state[0], state[1], state[2], state[3]);
  }
  if (turn < whole) load();
  for (int group = turn; group < whole; group += kTurns) process.template operator()<true>(group);
  if (tail > 0 && whole % kTurns == turn) {
    next_u = lane_of(params.u, whole).load_some(params.u, tail);
    next_delta = lane_of(params.delta, whole).load_some(params.delta, tail);
    if (kGate) next_z = lane_of(gate, whole).load_some(gate, tail);
    next_B = input_of(whole).load_some(params.B, tail);
    next_C = output_of(whole).load_some(params.C, tail);
    y = lane_of(params.y, whole);
    process.template operator()<false>(whole);
  }
  if constexpr (kTurns > 1) {  // a last round without a group for this warp
    const int last = (groups - 1) / kTurns;
    if (last * kTurns + turn >= groups) round.pass(turn, last % kTurns == turn, {1, 1, 1, 1}, {});
  }
  if (params.states_out && live && (groups - 1) % kTurns == turn)
    *state_at(params.states_out) = make_float4(state[0], state[1], state[2], state[3]);
}

Strides strides_of(const ScanFwd& p, int turns) {
  return {.u = uint32_t(group_bytes(p.u, 2) * turns),
          .delta = uint32_t(group_bytes(p.delta, 2) * turns),
          .z = uint32_t(group_bytes(p.z, 2) * turns),
          .y = uint32_t(group_bytes(p.y, 2) * turns),
          .B = uint32_t(group_bytes(p.B, 3) * turns),
          .C = uint32_t(group_bytes(p.C, 3) * turns)};
}

}  // namespace

}  // namespace gpu

bool selective_scan_fwd_tuned_takes(const ScanFwd& p, const Sequences& seqs) {
  return gpu::tuned_axis(p, seqs, {&p.y}).has_value();
}

int64_t selective_scan_fwd_tuned_workspace(const ScanFwd&) { return 0; }

const char* selective_scan_fwd_tuned(const ScanFwd& p, const Sequences&, int64_t, void*, void* cuda_stream) {
  using namespace gpu;
  return by_tuned(p, *tuned_axis(p, {}, {&p.y}), [&]<class T, Along kAlong, bool kGate>() -> const char* {
    const auto launch = [&]<int kTurns>() -> const char* {
      constexpr int64_t kChannels = kFwdWarps<kTurns> / kTurns * kWarpChannels;
      const dim3 grid(unsigned((p.dims.d + kChannels - 1) / kChannels), unsigned(p.dims.b));
      scan_fwd_tuned<T, kAlong, kGate, kTurns>
          <<<grid, kFwdWarps<kTurns> * kWarp, 0, static_cast<cudaStream_t>(cuda_stream)>>>(
              p, strides_of(p, kTurns));
      return launch_error();
    };
    const int64_t chains = p.dims.b * ((p.dims.d + kWarpChannels - 1) / kWarpChannels);
    return chains >= multiprocessors() * kEnoughChains ? launch.template operator()<1>()
                                                       : launch.template operator()<8>();
  });
}

}  // namespace mamba_ops

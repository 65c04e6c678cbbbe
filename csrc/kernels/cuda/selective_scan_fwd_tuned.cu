// Selective scan, forward, for 16 real states a channel (math: kernels/selective_scan.h; which calls:
// selective_scan_tuned.cuh; a warp's way through a group: selective_scan_tuned_factors.cuh).
//
//   h_t = 2^(delta_t A log2 e) h_{t-1} + delta_t u_t B_t;  y_t = (C_t h_t + D u_t) silu(z_t)
//
// A warp takes 8 channels of a row through all tokens, in groups of 8; no barrier, and in 16 bits no shared
// memory. While it computes a group the next one is on its way to registers, and a later one to L2. Few
// channels leave most of the machine idle: there the `kTurns` warps of a block share 8 channels and take the
// groups in turn. A warp waits for the state that the one before passes on through shared memory (Relay),
// takes it through its group and passes it on; then it makes the outputs, and decays and inputs of its next
// group before it waits again. No value is summed by two threads: bitwise repeatable. Tail tokens are a group
// with steps of zero.
//
// Special-function units and issue slots bound it: 39 of some 235 instructions of a warp and group are
// special functions, at 8 cycles each; beside them a tf32 product takes some 4 cycles from the others. On an
// H100 with b4 d5120 l4096 and all options, 0.585 ms in bfloat16, 0.77 in float32; b8 d1536 l2048, 0.189 ms.
// In turns on an H200, b1 d2048 l65536, 1.09 ms and 1.84. ncu, the first of them: special functions 69 % of
// their peak, issue slots 53 %, L2 63 %, a quarter of the waits for the queue that special functions and
// shared memory have in common; in float32, whose outputs go through shared memory, that 90 %. Prefetches to
// L2 in turns as well: 1.5 ms instead of 1.08 (H100).
#include <algorithm>
#include <climits>

#include "kernels/cuda/selective_scan_tuned_factors.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

template <class T>
constexpr int kEnoughChains = sizeof(T) == 2 ? 10 : 6;  // of a multiprocessor, for one warp each
constexpr int kAheadGroups = 8;                         // of the prefetch to L2
constexpr int kCheckpointGroups = kScanCheckpointCuda / kGroup;

template <int kTurns>
constexpr int kFwdWarps = kTurns < 4 ? 4 : kTurns;

// Where a warp leaves the state for the next one. It has taken the state since the last time, which had gone
// through all the others: nobody reads the place any more.
struct Turn {
  float4 state[kWarp];
  uint64_t passed;  // barrier, on which all lanes arrive
};

// A warp's places in shared memory: its own, and that of the warp before.
struct Relay {
  uint32_t from, from_passed, to, to_passed;
  uint32_t odd = 0;  // whether the state is awaited for the second time, the fourth, ..

  __device__ void begin(Turn* turns, int turn, int count) {
    const int lane = threadIdx.x % kWarp;
    const auto address = [](void* p) { return uint32_t(__cvta_generic_to_shared(p)); };
    Turn &mine = turns[turn], &before = turns[(turn + count - 1) % count];
    from = address(&before.state[lane]);
    from_passed = address(&before.passed);
    to = address(&mine.state[lane]);
    to_passed = address(&mine.passed);
    if (lane == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(to_passed), "n"(kWarp) : "memory");
    __syncthreads();
  }
  __device__ void pass(const float (&v)[kLaneStates]) const {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]),
                 "f"(v[3])
                 : "memory");
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(to_passed) : "memory");
  }
  __device__ void take(float (&v)[kLaneStates]) {
    for (uint32_t there = 0; !there;)
      asm volatile(
          "{.reg .pred p;"
#if __CUDA_ARCH__ >= 900
          "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;"
#else
          "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
#endif
          "selp.b32 %0, 1, 0, p;}"
          : "=r"(there)
          : "r"(from_passed), "r"(odd)
          : "memory");
    odd ^= 1;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                 : "r"(from)
                 : "memory");
  }
};

// Constants of a call.
struct Strides {
  uint32_t u, delta, z, y, B, C;  // bytes by which a warp moves on after a group
  float softplus_limit, softplus_limit_log2;
};

// Asks for a later group of u, delta and z, 8 rows of 32 channels of the block in 16 bits, and of B and C.
// The block has 4 warps; a warp takes a tensor, the last one B and C.
template <class T>
struct Prefetch {
  const T* p = nullptr;
  uint32_t bytes;

  __device__ Prefetch(const ScanFwd& params, const Strides& strides, int64_t row, int64_t channel) {
    const ScanDims& dims = params.dims;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = lane % 2;
    const int64_t token = lane / 2 + kAheadGroups * kGroup;
    if (lane / 2 >= kGroup) return;
    if (warp == 3) {
      p = factor<T>(part ? params.C : params.B, part ? dims.groups_C : dims.groups_B, dims, row, channel,
                    token);
      bytes = part ? strides.C : strides.B;
      return;
    }
    const View& v = warp == 0 ? params.u : warp == 1 ? params.delta : params.z;
    bytes = warp == 0 ? strides.u : warp == 1 ? strides.delta : strides.z;
    channel += (part * 2 - warp) * kWarpChannels;
    if (!v.data || channel >= dims.d) return;
    p = static_cast<const T*>(v.data) + row * v.stride[0] + channel * v.stride[1] + token * v.stride[2];
  }
  __device__ void operator()(bool there) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %1, 0; @p prefetch.global.L2 [%0];}" ::"l"(p),
                 "r"(int(there)));
    move(p, bytes);
  }
};

template <class T, Along kAlong, bool kGate, int kTurns>
__global__ void __launch_bounds__(kFwdWarps<kTurns>* kWarp, kTurns == 1 ? 5 : 16 / kFwdWarps<kTurns>)
    scan_fwd_tuned(const ScanFwd params, const Strides strides) {
  constexpr int kWarps = kFwdWarps<kTurns>;
  using Lane = LaneTokens<T, kAlong>;
  using Input = InputFactor<T, kAlong>;
  using Output = OutputFactor<T, kAlong>;
  __shared__ Turn s_turns[kTurns];
  __shared__ float s_B[kWarps][Input::kShared], s_C[kWarps][Output::kShared];
  const ScanDims& dims = params.dims;
  const int warp = int(__reduce_max_sync(kAllLanes, threadIdx.x / kWarp));  // in a uniform register
  const int lane = threadIdx.x % kWarp, q = lane % 4, turn = warp % kTurns;
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
  if (params.states_in) {
    const float4 v = *state_at(const_cast<void*>(params.states_in));
    state[0] = v.x, state[1] = v.y, state[2] = v.z, state[3] = v.w;
  }

  const View& gate = kGate ? params.z : params.u;
  const auto lane_of = [&](const View& v, int group) {
    return Lane(v, row, first, channels, int64_t(group) * kGroup);
  };
  const OwnTokens own;
  const auto input_of = [&](int group) {
    return Input(params.B, factor<T>(params.B, dims.groups_B, dims, row, first, int64_t(group) * kGroup),
                 s_B[warp], own);
  };
  const auto output_of = [&](int group) {
    return Output(params.C, factor<T>(params.C, dims.groups_C, dims, row, first, int64_t(group) * kGroup),
                  s_C[warp], own);
  };
  Lane u = lane_of(params.u, turn), delta = lane_of(params.delta, turn), z = lane_of(gate, turn),
       y = lane_of(params.y, turn);
  Input input = input_of(turn);
  Output output = output_of(turn);
  constexpr bool kPrefetches = kTurns == 1 && kAlong == Along::channels && sizeof(T) == 2;
  Prefetch<T> prefetch(params, strides, row, first);
  // One comparison a group each: up to which group to prefetch, and the next that ends with a checkpoint.
  int prefetch_end = kPrefetches && prefetch.p ? whole - kAheadGroups + 1 : 0;
  int checkpoint = params.checkpoints ? kCheckpointGroups - 1 : INT_MAX;
  if (kPrefetches) keep(prefetch_end);
  if (kTurns == 1) keep(checkpoint);
  Pack<T, 2> next_u, next_delta, next_z;
  typename Input::Raw next_B;
  typename Output::Raw next_C;
  // Before the loads: a step after one waits until that has read its address.
  const auto step = [&](int64_t turns) {
    u.step(turns * strides.u);
    delta.step(turns * strides.delta);
    if (kGate) z.step(turns * strides.z);
    input.step(turns * strides.B);
    output.step(turns * strides.C);
  };
  const auto load = [&] {
    step(1);
    next_u = u.load(params.u);
    next_delta = delta.load(params.delta);
    if (kGate) next_z = z.load(gate);
    next_B = input.load(params.B);
    next_C = output.load(params.C);
  };
  step(-1);

  float steps[2], a[kGroup][kLaneStates], h[kGroup][kLaneStates];
  float2 us, zs{};
  const auto decays_and_inputs = [&](int p) {
    if (p % 2 == 0) input.inputs(h, p / 2);
    decays(a, steps, A, p);
  };
  // The begin of a group, which needs no state, from what is loaded of it; loads a later one.
  const auto begin = [&]<bool kWhole>(int later) {
    us = u.values(next_u);
    if (kGate) zs = z.values(next_z);
    const float2 raw = delta.values(next_delta);
    input.begin(next_B);
    output.begin(next_C);
    if (kWhole && later < whole) {
      load();
      if (kPrefetches) prefetch(later < prefetch_end);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float x = k ? raw.y : raw.x;
      float slope;
      if constexpr (kTurns == 1 && sizeof(T) == 2) {  // one instruction less, exact to 2^-24 of the bias
        const float scaled = fmaf(x, kToLog2, bias * kToLog2);
        steps[k] = step_log2<T>(scaled, !(scaled <= strides.softplus_limit_log2), slope);
      } else {
        steps[k] = step_log2<T>(x + bias, strides.softplus_limit, slope);
      }
      if (!kWhole && 2 * q + k >= tail) steps[k] = 0;
    }
    constexpr float kScale = kFromLog2 * kOperandScale<T>;
    input.scale(steps[0] * kScale * us.x, steps[1] * kScale * us.y);
    if constexpr (kTurns > 1) {
#pragma unroll
      for (int p = 0; p < 4; ++p) decays_and_inputs(p);
    }
  };

  // In float32 the state is mended: by the one warp of a chain after a window, in turns after a group.
  constexpr bool kMends = sizeof(T) == 4;
  LongMemory memory;
  float total = 0;  // of the lane's steps since then
  if (kTurns == 1) memory.begin(state);
  Relay relay;
  if constexpr (kTurns > 1) {
    relay.begin(s_turns, turn, kTurns);
    if (turn == kTurns - 1) relay.pass(state);
  }
  const auto put_checkpoint = [&](int group) {
    const int64_t at = row * (dims.l / kScanCheckpointCuda) + group / kCheckpointGroups;
    float* to = static_cast<float*>(params.checkpoints) + (at * kTunedState + 4 * q) * dims.d + channel;
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i)
      if (live) to[i * dims.d] = state[i];
  };
  const auto process = [&]<bool kWhole>(int group) {
    const bool window_ends = kWhole && (group + 1) % kCheckpointGroups == 0;
    if (kTurns == 1) begin.template operator()<kWhole>(group + 1);
    if constexpr (kTurns > 1) {
      relay.take(state);
      memory.begin(state);
    }
    total += steps[0] + steps[1];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if (kTurns == 1) decays_and_inputs(p);
      advance(h, a, state, p);
      if (kMends) memory.step(a[2 * p]), memory.step(a[2 * p + 1]);
      if (kTurns == 1) output.outputs(h, p);
    }
    if (kMends && (kTurns > 1 || window_ends)) {
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      memory.mend(state, {total * A[0], total * A[1], total * A[2], total * A[3]});
      memory.begin(state);
      total = 0;
    }
    if constexpr (kTurns > 1) {
      relay.pass(state);
      if (window_ends && params.checkpoints) put_checkpoint(group);
    }
    if (kTurns > 1) {
#pragma unroll
      for (int p = 0; p < 4; ++p) output.outputs(h, p);
    }

    const float2 sums = output.result();
    float2 o = {fmaf(D, us.x, sums.x), fmaf(D, us.y, sums.y)};
    if (kGate) {
      const float2 s = sigmoids(zs.x, zs.y);
      o = {o.x * (zs.x * s.x), o.y * (zs.y * s.y)};
    }
    // After the last group once more, to no effect.
    if (kTurns > 1 && kWhole) begin.template operator()<true>(group + 2 * kTurns);
    if (kWhole)
      y.store(params.y, stores, o);
    else
      y.store_some(params.y, stores, o, tail);
    y.step(strides.y);
    // Last: a branch parts the instructions around it.
    if (kTurns == 1 && kWhole && group == checkpoint) {
      put_checkpoint(group);
      checkpoint += kCheckpointGroups;
    }
  };

  if (turn < whole) {
    load();
    if (kTurns > 1) begin.template operator()<true>(turn + kTurns);
  }
  for (int group = turn; group < whole; group += kTurns) process.template operator()<true>(group);
  if (tail > 0 && whole % kTurns == turn) {
    next_u = lane_of(params.u, whole).load_some(params.u, tail);
    next_delta = lane_of(params.delta, whole).load_some(params.delta, tail);
    if (kGate) next_z = lane_of(gate, whole).load_some(gate, tail);
    next_B = input_of(whole).load_some(params.B, tail);
    next_C = output_of(whole).load_some(params.C, tail);
    y = lane_of(params.y, whole);
    if (kTurns > 1) begin.template operator()<false>(whole);
    process.template operator()<false>(whole);
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
          .C = uint32_t(group_bytes(p.C, 3) * turns),
          .softplus_limit = softplus_limit(p.dims.softplus),
          .softplus_limit_log2 = softplus_limit(p.dims.softplus) * kToLog2};
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
    return chains >= multiprocessors() * kEnoughChains<T> ? launch.template operator()<1>()
                                                          : launch.template operator()<8>();
  });
}

}  // namespace mamba_ops

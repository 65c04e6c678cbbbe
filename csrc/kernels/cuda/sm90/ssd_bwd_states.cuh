// The states at the edges of all chunks, as 16-bit factors: H_c that enter (by the forward recurrence) and
// their gradients G_c that come from the right (by the reversed one).
//
//   H <- e^T H + sum_j delta_j e^{T - s_j} x_j B_j^T        G <- e^T G + sum_i e^{s_i} dy_i C_i^T
//
// tile by tile, s and T counted from the tile's first token. A block takes two heads of one group in one
// direction along a row, a warpgroup one of them: the state (p x n) in float32 registers, the weighted tokens
// from shared memory through ldmatrix as the left factor (p x 64 tokens), the tile of B or C (64 x n) as the
// right one. The state is rounded and stored where a chunk begins (H) or ends (G). Each warp makes the
// weights for itself: no barrier but those of the stages. The first thread loads the next tile before it
// takes one. Where runs begin in a tile, what lies on their other side has no weight, and the state ends.
//
// Shared memory (n = 128; twice on an SM): 2 stages of B or C 16 KiB, two tiles of tokens 16 KiB and their
// steps 2 KiB; the stored images 2 x 16 KiB, weights 2 KiB.
#pragma once
#include "kernels/cuda/sm90/ssd_bwd.cuh"

namespace mamba_ops::gpu::sm90 {

constexpr int kStateHeads = 2, kStateStages = 2;
constexpr int kStateThreads = kStateHeads * kWarpgroup;

template <int kN>
struct StatesShared {
  static constexpr int kTokens = kFactorBytes<kN>, kSteps = kTokens + kStateHeads * kTileBytes;
  static constexpr int kStage = kSteps + kStateHeads * kStepBytes;
  static constexpr int kImages = kStateStages * kStage;
  static constexpr int kWeights = kImages + kStateHeads * kFactorBytes<kN>;
  static constexpr int kBarriers = kWeights + kStateHeads * 4 * kTile * int(sizeof(float));
  static constexpr int kBytes = kBarriers + 2 * kStateStages * 8 + 1024;
};

// The blocks: direction fastest, then pairs of heads, groups, rows.
struct Chain {
  bool reverse;
  int row, head, heads;

  __device__ Chain(const SsdBwdArgs& a, int64_t block) {
    const int pairs = (a.sharing + kStateHeads - 1) / kStateHeads;
    reverse = block % 2;
    const int pair = int(block / 2 % pairs), group = int(block / 2 / pairs % a.groups);
    row = int(block / 2 / pairs / a.groups);
    head = group * a.sharing + pair * kStateHeads;
    heads = min(kStateHeads, a.sharing - pair * kStateHeads);
  }
  __device__ int tile(const SsdBwdArgs& a, int i) const { return reverse ? a.tiles - 1 - i : i; }
};

// Tile number i of the walk, once all warps are done with the last one in its stage.
template <int kN>
__device__ inline void load_tile(const SsdBwdMaps& maps, const SsdBwdArgs& a, const Chain& chain, int i,
                                 uint32_t base) {
  using Shared = StatesShared<kN>;
  const CUtensorMap &factor = chain.reverse ? maps.C : maps.B, &tokens = chain.reverse ? maps.dy : maps.x;
  const int stage = i % kStateStages, t = chain.tile(a, i) * kTile;
  const uint32_t to = base + stage * Shared::kStage, ready = base + Shared::kBarriers + 8 * stage;
  wait_for(ready + 8 * kStateStages, i / kStateStages % 2 ^ 1);
  arrive_and_expect(ready, kFactorBytes<kN> + chain.heads * (kTileBytes + kStepBytes));
  for (int slab = 0; slab < kN / 64; ++slab)
    tma_load(to + slab * kTileBytes, factor, ready, slab * 64, t, chain.head / a.sharing, chain.row);
  for (int k = 0; k < chain.heads; ++k) {
    tma_load(to + Shared::kTokens + k * kTileBytes, tokens, ready, 0, t, chain.head + k, chain.row);
    const int64_t chunk = a.row_head(chain.row, chain.head + k) * a.chunks + t / kChunk;
    bulk_load(to + Shared::kSteps + k * kStepBytes, a.steps + chunk * 2 * kChunk, kStepBytes, ready);
  }
}

template <int kN>
__device__ inline void load_state(float (&state)[kN / 2], const float* from, int w, int lane) {
  from += (16 * w + lane / 4) * kN + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {  // i = 2 c + r
    const float2 v = *reinterpret_cast<const float2*>(from + i % 2 * 8 * kN + i / 2 * 8);
    state[2 * i] = v.x;
    state[2 * i + 1] = v.y;
  }
}
template <int kN>
__device__ inline void store_state(float* to, const float (&state)[kN / 2], int w, int lane) {
  to += (16 * w + lane / 4) * kN + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < kN / 4; ++i)
    *reinterpret_cast<float2*>(to + i % 2 * 8 * kN + i / 2 * 8) = {state[2 * i], state[2 * i + 1]};
}

template <class T, int kN>
__device__ void walk_states(const SsdBwdMaps& maps, const SsdBwdArgs& a, const Chain& chain, uint8_t* shared,
                            uint32_t base) {
  using Shared = StatesShared<kN>;
  const int lane = threadIdx.x % 32, local = threadIdx.x / kWarpgroup;
  const int w = __shfl_sync(kAllLanes, threadIdx.x / 32 % 4, 0);
  const bool reverse = chain.reverse;
  const int64_t row_head = a.row_head(chain.row, chain.head + local);
  const uint32_t full = base + Shared::kBarriers, empty = full + 8 * kStateStages;
  const uint32_t image = base + Shared::kImages + local * kFactorBytes<kN>;
  float* weights = reinterpret_cast<float*>(shared + Shared::kWeights) + threadIdx.x / 32 * kTile;
  uint8_t* images = a.states + (row_head * a.chunks * 2 + reverse) * kFactorBytes<kN>;
  // Turned fragments of the tokens: matrices (tokens + 0, p + 0), (+ 0, + 8), (+ 8, + 0), (+ 8, + 8).
  const int turned = (lane / 16 * 8 + lane % 8) * 128 + ((2 * w + lane / 8 % 2 ^ lane % 8) << 4);

  float state[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) state[i] = 0;
  if (const void* first = reverse ? a.p.dstates_out : a.p.fwd.states_in)
    load_state<kN>(state, static_cast<const float*>(first) + row_head * kTile * kN, w, lane);
  if (threadIdx.x == 0) load_tile<kN>(maps, a, chain, 0, base);
  uint64_t next_starts = a.starts_of(chain.row, chain.tile(a, 0));
  for (int i = 0; i < a.tiles; ++i) {
    if (threadIdx.x == 0 && i + 1 < a.tiles) load_tile<kN>(maps, a, chain, i + 1, base);
    __syncwarp();
    const int tile = chain.tile(a, i), stage = i % kStateStages;
    if (reverse ? tile % 2 == 1 || i == 0 : tile % 2 == 0) {
      if (lane == 0) wait_stores_read<0>();
      __syncwarp();
#pragma unroll
      for (int slab = 0; slab < kN / 64; ++slab)
        store_tile<T>(image + slab * kTileBytes, w, state + 32 * slab);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        uint8_t* to = images + int64_t(tile / 2) * 2 * kFactorBytes<kN>;
#pragma unroll
        for (int slab = 0; slab < kN / 64; ++slab) {
          const int at = slab * kTileBytes + w * 16 * 128;
          bulk_store(to + at, image + at, 16 * 128);
        }
        commit_stores();
      }
    }

    const uint64_t starts = next_starts;
    if (i + 1 < a.tiles) next_starts = a.starts_of(chain.row, chain.tile(a, i + 1));
    const uint32_t factor = base + stage * Shared::kStage;
    const uint32_t tokens = factor + Shared::kTokens + local * kTileBytes + turned;
    const float* delta = reinterpret_cast<const float*>(shared + stage * Shared::kStage + Shared::kSteps +
                                                        local * kStepBytes) +
                         tile % 2 * kTile;
    const float* s = delta + kChunk;
    wait_for(full + 8 * stage, i / kStateStages % 2);
    const float first = tile % 2 ? s[-1] : 0.f, last = s[kTile - 1];
    const float2 s2 = *reinterpret_cast<const float2*>(s + 2 * lane);
    const float2 delta2 = *reinterpret_cast<const float2*>(delta + 2 * lane);
    float2 weight = reverse ? make_float2(exp2_of(s2.x - first), exp2_of(s2.y - first))
                            : make_float2(exp2_of(last - s2.x) * delta2.x, exp2_of(last - s2.y) * delta2.y);
    float decay = exp2_of(last - first);
    if (starts) {
      const auto counts = [&](int j) { return reverse ? j < first_start(starts) : j >= last_start(starts); };
      if (!counts(2 * lane)) weight.x = 0;
      if (!counts(2 * lane + 1)) weight.y = 0;
      decay = 0;
    }
    *reinterpret_cast<float2*>(weights + 2 * lane) = weight;
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) state[k] *= decay;
    __syncwarp();
    Fragments left;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ldmatrix<true>(left[k], tokens + k * 2048);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float2 by = *reinterpret_cast<const float2*>(weights + 16 * k + 8 * c + 2 * (lane % 4));
#pragma unroll
        for (int r = 0; r < 2; ++r) left[k][2 * c + r] = scale<T>(left[k][2 * c + r], by.x, by.y);
      }
    }
    const uint64_t right = mn_major(factor, kTileBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, true>(state, left[k], mn_major_step(right, k), true);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) arrive(empty + 8 * stage);
  }
  if (reverse && a.p.dstates_in)
    store_state<kN>(static_cast<float*>(a.p.dstates_in) + row_head * kTile * kN, state, w, lane);
  if (lane == 0) wait_stores<0>();
}

template <class T, int kN>
__global__ void __launch_bounds__(kStateThreads, 2)
    ssd_bwd_states(const __grid_constant__ SsdBwdMaps maps, const __grid_constant__ SsdBwdArgs a) {
  using Shared = StatesShared<kN>;
  extern __shared__ uint8_t raw_shared[];
  uint8_t* shared = raw_shared + (-shared_address(raw_shared) & 1023);
  const uint32_t base = shared_address(shared);
  const uint32_t full = base + Shared::kBarriers, empty = full + 8 * kStateStages;
  const Chain chain(a, blockIdx.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStateStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4 * chain.heads);
    }
    barriers_ready();
  }
  __syncthreads();
  if (__shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0) < chain.heads)
    walk_states<T, kN>(maps, a, chain, shared, base);
}

}  // namespace mamba_ops::gpu::sm90

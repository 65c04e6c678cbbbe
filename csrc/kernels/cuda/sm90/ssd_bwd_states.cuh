// The states at the edges of all chunks, as 16-bit factors: H_c that enter (by the forward recurrence) and
// their gradients G_c that come from the right (by the reversed one).
//
//   H <- e^T H + sum_j delta_j e^{T - s_j} x_j B_j^T        G <- e^T G + sum_i e^{s_i} dy_i C_i^T
//
// tile by tile, s and T counted from the tile's first token. A chain is two heads that share B and C, in one
// direction along a row. A block takes pieces of chains (hand_over.cuh: 264 blocks, two on an SM, have the
// same number of tiles), a warpgroup one of the heads: the state (p x n) in float32 registers, the weighted
// tokens from shared memory through ldmatrix as the left factor (p x 64 tokens), the tile of B or C (64 x n)
// as the right one. The state is rounded and stored where a chunk begins (H) or ends (G). Each warp makes the
// weights for itself: no barrier but those of the stages. The first thread loads the next tile before it
// takes one. Where runs begin in a tile, what lies on their other side has no weight, and the state ends. A
// state that another block goes on with is handed over in float32: no sum depends on how chains are cut.
//
// Few chains over long rows are cut into segments, a block each: it walks its segment from nothing, hands
// over what comes out and the decay, then adds up what the segments before handed over and walks again.
//
// Shared memory (n = 128; twice on an SM): 2 stages of B or C 16 KiB, two tiles of tokens 16 KiB and their
// steps 2 KiB; the stored images 2 x 16 KiB, weights 2 KiB.
#pragma once
#include <new>

#include "kernels/cuda/sm90/hand_over.cuh"
#include "kernels/cuda/sm90/ssd_bwd.cuh"

namespace mamba_ops::gpu::sm90 {

constexpr int kStateStages = 2;
constexpr int kStateThreads = kStateHeads * kWarpgroup;

// Two heads in one direction. The chains: direction fastest, then blocks of heads, shares, rows.
struct Chain {
  bool reverse;
  int row, head, heads, group;  // group: of B or C

  Chain() = default;
  __device__ Chain(const SsdBwdArgs& a, int number) {
    const int blocks = (a.sharing + kStateHeads - 1) / kStateHeads;
    reverse = number % 2;
    const int block = number / 2 % blocks, share = number / 2 / blocks % a.shares;
    row = number / 2 / blocks / a.shares;
    head = share * a.sharing + block * kStateHeads;
    heads = min(kStateHeads, a.sharing - block * kStateHeads);
    group = head / (reverse ? a.heads_per_C : a.heads_per_B);
  }
  // Number `at` of the walk.
  __device__ int tile(const SsdBwdArgs& a, int at) const { return reverse ? a.tiles - 1 - at : at; }
};

// The pieces of a block and how far its loads are, which are one thread's. In shared memory: registers are
// short.
struct StateLoads {
  BlockPieces pieces;
  Chain chain;
  int piece = -1, at = 0, end = 0;
  uint32_t i = 0;  // tiles so far

  __device__ StateLoads(const SsdBwdArgs& a, int index, int again) : pieces(a.cut, index, again) {}
};

template <int kN>
struct StatesShared {
  static constexpr int kTokens = kFactorBytes<kN>, kSteps = kTokens + kStateHeads * kTileBytes;
  static constexpr int kStage = kSteps + kStateHeads * kStepBytes;
  static constexpr int kImages = kStateStages * kStage;
  static constexpr int kWeights = kImages + kStateHeads * kFactorBytes<kN>;
  static constexpr int kBarriers = kWeights + kStateHeads * 4 * kTile * int(sizeof(float));
  static constexpr int kLoads = kBarriers + 2 * kStateStages * 8,
                       kBytes = kLoads + int(sizeof(StateLoads)) + 1024;
};

// The next tile, if there is one, once all warps are done with the last one in its stage.
template <int kN>
__device__ inline void load_tile(const SsdBwdMaps& maps, const SsdBwdArgs& a, StateLoads& loads,
                                 uint32_t base) {
  using Shared = StatesShared<kN>;
  if (loads.at == loads.end) {
    if (loads.piece + 1 == loads.pieces.count) return;
    const ChainPiece piece = loads.pieces[++loads.piece];
    loads.chain = Chain(a, piece.chain);
    loads.at = piece.begin;
    loads.end = piece.end;
  }
  const Chain chain = loads.chain;
  const CUtensorMap &factor = chain.reverse ? maps.C : maps.B, &tokens = chain.reverse ? maps.dy : maps.x;
  const uint32_t i = loads.i++, stage = i % kStateStages;
  const int t = chain.tile(a, loads.at++) * kTile;
  const uint32_t to = base + stage * Shared::kStage, ready = base + Shared::kBarriers + 8 * stage;
  wait_for(ready + 8 * kStateStages, i / kStateStages % 2 ^ 1);
  arrive_and_expect(ready, kFactorBytes<kN> + chain.heads * (kTileBytes + kStepBytes));
  for (int slab = 0; slab < kN / 64; ++slab)
    tma_load(to + slab * kTileBytes, factor, ready, slab * 64, t, chain.group, chain.row);
#pragma unroll
  for (int k = 0; k < kStateHeads; ++k) {
    if (k == chain.heads) break;
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

// What enters a piece. Into a segment: what enters the row, through all segments before.
template <int kN>
__device__ inline void enter(float (&state)[kN / 2], const SsdBwdArgs& a, const Chain& chain,
                             const ChainPiece& piece, int64_t row_head, int index, int local) {
  const int w = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const void* first = chain.reverse ? a.p.dstates_out : a.p.fwd.states_in;
  if (first && (piece.begin == 0 || a.segments > 1))
    load_state<kN>(state, static_cast<const float*>(first) + row_head * kTile * kN, w, lane);
  if (piece.begin == 0) return;
  for (int before = a.segments > 1 ? index / a.segments * a.segments : index - 1; before < index; ++before) {
    const int64_t at = int64_t(before) * kStateHeads + local;
    wait_for_flag(a.flags + at, 1 + local);
    add_fragment(state, a.segments > 1 ? __ldcg(a.decays + at) : 0.f, a.handed + at * kTile * kN);
  }
}

template <class T, int kN>
__device__ void walk_states(const SsdBwdMaps& maps, const SsdBwdArgs& a, uint8_t* shared, uint32_t base) {
  using Shared = StatesShared<kN>;
  StateLoads& loads = *reinterpret_cast<StateLoads*>(shared + Shared::kLoads);
  const BlockPieces& pieces = loads.pieces;
  const int lane = threadIdx.x % 32, local = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
  const int w = __shfl_sync(kAllLanes, threadIdx.x / 32 % 4, 0);
  const uint32_t full = base + Shared::kBarriers, empty = full + 8 * kStateStages;
  const uint32_t image = base + Shared::kImages + local * kFactorBytes<kN>;
  float* weights = reinterpret_cast<float*>(shared + Shared::kWeights) + threadIdx.x / 32 * kTile;
  // Turned fragments of the tokens: matrices (tokens + 0, p + 0), (+ 0, + 8), (+ 8, + 0), (+ 8, + 8).
  const int turned = (lane / 16 * 8 + lane % 8) * 128 + ((2 * w + lane / 8 % 2 ^ lane % 8) << 4);

  if (threadIdx.x == 0)
    for (int i = 0; i + 1 < kStateStages; ++i) load_tile<kN>(maps, a, loads, base);
  uint32_t i = 0;
  for (int number = 0; number < pieces.count; ++number) {
    const ChainPiece piece = pieces[number];
    const Chain chain(a, piece.chain);
    const bool reverse = chain.reverse, active = local < chain.heads, from_nothing = number < pieces.again;
    const int64_t row_head = a.row_head(chain.row, chain.head + local);
    float state[kN / 2], through = 1;  // through: the decay of the piece
#pragma unroll
    for (float& v : state) v = 0;
    if (active && !from_nothing) enter<kN>(state, a, chain, piece, row_head, pieces.index, local);
    uint64_t next_starts = a.starts_of(chain.row, chain.tile(a, piece.begin));
    for (int at = piece.begin; at < piece.end; ++at, ++i) {
      if (threadIdx.x == 0) load_tile<kN>(maps, a, loads, base);
      __syncwarp();
      const int tile = chain.tile(a, at);
      const uint32_t stage = i % kStateStages;
      if (!active) {
        wait_for(full + 8 * stage, i / kStateStages % 2);
        arrive(empty + 8 * stage);
        continue;
      }
      if (!from_nothing && (reverse ? tile % 2 == 1 || tile == a.tiles - 1 : tile % 2 == 0)) {
        if (lane == 0) wait_stores_read<0>();
        __syncwarp();
#pragma unroll
        for (int slab = 0; slab < kN / 64; ++slab)
          store_tile<T>(image + slab * kTileBytes, w, state + 32 * slab);
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
          uint8_t* to = a.states + ((row_head * a.chunks + tile / 2) * 2 + reverse) * kFactorBytes<kN>;
#pragma unroll
          for (int slab = 0; slab < kN / 64; ++slab) {
            const int at = slab * kTileBytes + w * 16 * 128;
            bulk_store(to + at, image + at, 16 * 128);
          }
          commit_stores();
        }
      }

      const uint64_t starts = next_starts;
      if (at + 1 < piece.end) next_starts = a.starts_of(chain.row, chain.tile(a, at + 1));
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
        const auto counts = [&](int j) {
          return reverse ? j < first_start(starts) : j >= last_start(starts);
        };
        if (!counts(2 * lane)) weight.x = 0;
        if (!counts(2 * lane + 1)) weight.y = 0;
        decay = 0;
      }
      *reinterpret_cast<float2*>(weights + 2 * lane) = weight;
      through *= decay;
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
      arrive(empty + 8 * stage);
    }
    if (!active) continue;
    if (piece.end == a.tiles) {
      if (reverse && a.p.dstates_in)
        store_state<kN>(static_cast<float*>(a.p.dstates_in) + row_head * kTile * kN, state, w, lane);
    } else if (a.segments == 1 || from_nothing) {
      const int64_t at = int64_t(pieces.index) * kStateHeads + local;
      store_fragment(a.handed + at * kTile * kN, state);
      if (threadIdx.x % kWarpgroup == 0) a.decays[at] = through;
      raise_flag(a.flags + at, 1 + local);
    }
  }
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
  if (threadIdx.x == 0) {
    const int index = a.handed_count() ? atomicAdd(a.ticket, 1) : int(blockIdx.x);
    // A segment that another follows is walked twice.
    new (shared + Shared::kLoads) StateLoads(a, index, a.segments > 1 && (index + 1) % a.segments != 0);
    for (int i = 0; i < kStateStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kStateThreads);
    }
    barriers_ready();
  }
  __syncthreads();
  walk_states<T, kN>(maps, a, shared, base);
}

}  // namespace mamba_ops::gpu::sm90

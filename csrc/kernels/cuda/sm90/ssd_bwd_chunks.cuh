// Everything else, chunk by chunk and head by head, given H, G and the steps.
//
// A block takes tiles of 64 tokens, half 0 or half 1 of a chunk, each for a block of heads that share B and
// C, in turn. What the heads add up to stays in registers: dB and dC of the tile, and dCB of its two squares
// of pairs (j <= i): the tile with itself, and the tile with the other half of its chunk (half 0: own j,
// other i; half 1: own i, other j). C B^T of both squares is computed once, and kept in shared memory. Per
// head, s counted from the chunk's first token, T its end, D_ij = dy_i . x_j, by three warpgroups and a warp
// that loads:
//
//   pairs   P = CB o L;  dCB += delta_j D o L;  W = delta_j D o P and its row and column sums
//           kPairs = sum_j W_ij - sum_m W_mi;  skips = sum_i D_ii
//   inputs  gX_j = e^{T - s_j} G B_j + sum_i P_ij dy_i;  dx_j = delta_j gX_j + skip dy_j
//           kInput = x_j . gX_j;  kLeaving = delta_j x_j . e^{T - s_j} G B_j;  skips of D per channel
//   edges   dB_j += delta_j e^{T - s_j} G^T x_j;  dC_i += e^{s_i} H^T dy_i, the weighted tokens as sums of
//           two factors; after the last head what dCB adds
//           kEntering = e^{s_i} dy_i . H C_i;  v = e^T <G, H> (half 0)
//
// The squares have rows j (the square of half 1 with half 0: rows i), and the sums over rows and columns come
// from the same float32 W: in form R of the gradient of the decay the pairs cancel exactly.
//
// Shared memory (n = 128): B, C of the tile and the other half's factor 48 KiB; CB of both squares in
// float32, each thread's own values, later dCB as 16-bit tiles, 32 KiB; P 16 KiB; 2 stages of x, dy, the
// other half's dy or x, H, G, steps, D 58 KiB each; dx 8 KiB; sums 2.5 KiB.
#pragma once
#include "kernels/cuda/sm90/ssd_bwd.cuh"

namespace mamba_ops::gpu::sm90 {

constexpr int kChunkThreads = 4 * kWarpgroup;

template <int kN>
struct ChunksShared {
  static constexpr int kFactor = kFactorBytes<kN>;
  static constexpr int kB = 0, kC = kFactor, kOther = 2 * kFactor;
  static constexpr int kCB = 3 * kFactor, kSquare = kTile * kTile * int(sizeof(float));
  static constexpr int kP = kCB + 2 * kSquare;
  // A stage: x, dy, other, H, G, steps, D.
  static constexpr int kStages = kN == 64 ? 3 : 2;
  static constexpr int kFirstStage = kP + 2 * kTileBytes;
  static constexpr int kX = 0, kDy = kTileBytes, kOtherTokens = 2 * kTileBytes, kH = 3 * kTileBytes;
  static constexpr int kG = kH + kFactor, kSteps = kG + kFactor, kD = kSteps + kStepBytes;
  static constexpr int kDBytes = kTile * int(sizeof(float)), kStage = kD + 1024;
  static constexpr int kDx = kFirstStage + kStages * kStage;
  // Two buffers each: column sums of W of each warp, its row sums.
  static constexpr int kColumns = kDx + kTileBytes, kRows = kColumns + 2 * 4 * kTile * int(sizeof(float));
  // Barriers: stages full, stages empty, factors, P of both squares, P free.
  static constexpr int kFull = kRows + 2 * kTile * int(sizeof(float)), kEmpty = kFull + 8 * kStages;
  static constexpr int kFactorsReady = kEmpty + 8 * kStages, kPReady = kFactorsReady + 8,
                       kPFree = kPReady + 16;
  static constexpr int kBytes = kPFree + 8 + 1024;
  static_assert(kStage % 1024 == 0 && kBytes <= 227 * 1024);
};
// Barriers among threads: of the pairs, dCB is written, the tile is done.
enum { kPairsOnly = 1, kDcbWritten, kTileDone };

// One tile for one block of heads. Tiles fastest: blocks that run together share rows of memory and states.
struct ChunkItem {
  int row, tile, half, share, block, head, heads;

  __device__ ChunkItem(const SsdBwdArgs& a, int item) {
    tile = item % a.tiles;
    half = tile % 2;
    item /= a.tiles;
    row = item % a.b;
    item /= a.b;
    block = item % a.blocks;
    share = item / a.blocks;
    head = share * a.sharing + block * a.heads;
    heads = min(a.heads, a.sharing - block * a.heads);
  }
  __device__ int first() const { return tile * kTile; }
  __device__ int other() const { return first() + (half ? -kTile : kTile); }
};
__device__ inline int chunk_items(const SsdBwdArgs& a) { return a.tiles * a.b * a.blocks * a.shares; }

// Counts the uses of a ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Where runs begin in the chunk of a tile, and so what its decays reach. Unpacked: nowhere, everything.
template <bool kPacked>
struct ChunkRuns {
  uint64_t own = 0;                         // starts of the tile itself
  int first = kChunk, last = -1;            // starts of the chunk
  int first_right = kTile, last_left = -1;  // the first start of half 1, the last of half 0, in tokens of it

  __device__ ChunkRuns(const SsdBwdArgs& a, const ChunkItem& item) {
    if constexpr (kPacked) {
      const uint64_t left = a.starts_of(item.row, item.tile / 2 * 2);
      const uint64_t right = a.starts_of(item.row, item.tile / 2 * 2 + 1);
      own = item.half ? right : left;
      first_right = first_start(right);
      last_left = last_start(left);
      first = left ? first_start(left) : kTile + first_right;
      last = right ? kTile + last_start(right) : last_left;
    }
  }
  __device__ bool any() const { return kPacked && last >= 0; }
  // From the left edge of the chunk to token i, from token j to its right edge.
  __device__ bool enters(int i) const { return !kPacked || i < first; }
  __device__ bool leaves(int j) const { return !kPacked || j >= last; }
  // From the edge between the halves to token i of half 1, from token j of half 0 to that edge.
  __device__ bool enters_right(int i) const { return !kPacked || i < first_right; }
  __device__ bool leaves_left(int j) const { return !kPacked || j >= last_left; }
  // Tokens from j of the tile to the end of its run or of the tile.
  __device__ int length(int j) const { return first_start(own & (~1ull << j)) - j; }
};

// Steps of the chunk, in a stage.
struct ChunkSteps {
  const float *delta, *s;
  __device__ ChunkSteps(const uint8_t* at) : delta(reinterpret_cast<const float*>(at)), s(delta + kChunk) {}
  __device__ float edge() const { return s[kTile - 1]; }
  __device__ float end() const { return s[kChunk - 1]; }
};

// 64 x 64 of a product over kSteps x 16 values of K-major factors; the sum starts at zero.
template <class T, int kSteps>
__device__ inline void multiply(float (&d)[32], uint32_t left, uint32_t right) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
    wgmma<T, false, false>(d, k_major_step(k_major(left), k, kTileBytes),
                           k_major_step(k_major(right), k, kTileBytes), k > 0);
}
// d += left right over 64 values of k: a K-major left factor, an MN-major right one.
template <class T, int kSize>
__device__ inline void add_product(float (&d)[kSize], uint32_t left, uint32_t right) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma<T, false, true>(d, k_major_step(k_major(left), k, 0), mn_major_step(mn_major(right, kTileBytes), k),
                          true);
}
template <class T, int kSize>
__device__ inline void add_product(float (&d)[kSize], const Fragments& left, uint32_t right) {
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma<T, true>(d, left[k], mn_major_step(mn_major(right, kTileBytes), k), true);
}

template <int kN>
__device__ void load_factors(const SsdBwdMaps& maps, const SsdBwdArgs& a, const ChunkItem& item,
                             uint32_t base) {
  using Shared = ChunksShared<kN>;
  const uint32_t ready = base + Shared::kFactorsReady;
  const int group_B = item.head / a.heads_per_B, group_C = item.head / a.heads_per_C;
  arrive_and_expect(ready, 3 * Shared::kFactor);
  for (int slab = 0; slab < kN / 64; ++slab) {
    const uint32_t to = base + slab * kTileBytes;
    const int n = slab * 64;
    tma_load(to + Shared::kB, maps.B, ready, n, item.first(), group_B, item.row);
    tma_load(to + Shared::kC, maps.C, ready, n, item.first(), group_C, item.row);
    tma_load(to + Shared::kOther, item.half ? maps.B : maps.C, ready, n, item.other(),
             item.half ? group_B : group_C, item.row);
  }
}

template <int kN>
__device__ void load_heads(const SsdBwdMaps& maps, const SsdBwdArgs& a, uint32_t base) {
  using Shared = ChunksShared<kN>;
  Ring<Shared::kStages> ring;
  const int items = chunk_items(a);
  for (int n = blockIdx.x; n < items; n += gridDim.x) {
    const ChunkItem item(a, n);
    for (int head = item.head; head < item.head + item.heads; ++head, ring.next()) {
      const uint32_t ready = base + Shared::kFull + 8 * ring.stage;
      const uint32_t to = base + Shared::kFirstStage + ring.stage * Shared::kStage;
      const int64_t chunk = a.row_head(item.row, head) * a.chunks + item.tile / 2;
      wait_for(base + Shared::kEmpty + 8 * ring.stage, ring.parity ^ 1);
      arrive_and_expect(ready, Shared::kD + (a.D ? Shared::kDBytes : 0));
      tma_load(to + Shared::kX, maps.x, ready, 0, item.first(), head, item.row);
      tma_load(to + Shared::kDy, maps.dy, ready, 0, item.first(), head, item.row);
      bulk_load(to + Shared::kSteps, a.steps + chunk * 2 * kChunk, kStepBytes, ready);
      tma_load(to + Shared::kOtherTokens, item.half ? maps.x : maps.dy, ready, 0, item.other(), head,
               item.row);
      if (a.D) bulk_load(to + Shared::kD, a.D + head * kTile, Shared::kDBytes, ready);
      bulk_load(to + Shared::kH, a.states + chunk * 2 * Shared::kFactor, 2 * Shared::kFactor, ready);
    }
  }
}

}  // namespace mamba_ops::gpu::sm90

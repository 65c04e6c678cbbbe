// What the launches of the Hopper SSD backward share: parameters, workspace, work on fragments. See
// ssd_bwd.cu.
#pragma once
#include "kernels/cuda/halves.cuh"
#include "kernels/cuda/sequences.cuh"
#include "kernels/cuda/sm90/hand_over.cuh"
#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/ssd_steps.cuh"

namespace mamba_ops::gpu::sm90 {

constexpr int kTile = 64;  // tokens of a tile; also p, so that a tile of x is one slab of 64 rows
constexpr int kTileBytes = kTile * 128;
constexpr int kChunk = 2 * kTile;
constexpr int kStepBytes = 2 * kChunk * int(sizeof(float));  // delta and s of a chunk
constexpr int kWarpgroup = 128;
constexpr int kStateHeads = 2;  // of a block that makes states
template <int kN>
constexpr int kFactorBytes = kN / 64 * kTileBytes;  // of a tile of B or C, and of a state

// What the reduction reads of a head and a tile: rows of 64 values, see ssd_bwd_chunks.cuh.
enum Sums { kPairs, kInput, kLeaving, kEntering, kSums };

struct SsdBwdMaps {
  CUtensorMap x, dy;  // (p, l, h, b), boxes of 64 tokens
  CUtensorMap dx;     // boxes of 16
  CUtensorMap B, C;   // (n, l, g, b), boxes of 64 x 64
};

struct SsdBwdArgs {
  SsdBwd p;  // without a gate
  Sequences seqs;
  int b, l, h;
  int tiles, chunks;             // of a row
  int heads_per_B, heads_per_C;  // heads that read one group
  int sharing, shares;           // neighbouring heads that read the same B and C; such runs of heads
  int heads, blocks;             // of a block of heads; blocks of a share
  int blocks_B, blocks_C;        // that add to one group of dB, of dC
  int parts;                     // of the last launch's sums over the tokens of a head
  bool makes_skips;              // with D, unless the gradient of the gate has made them
  Cut cut;                       // of the states' chains, in tiles
  int segments;                  // of a chain; 1: blocks own pieces of chains
  // Workspace; (b h): row * h + head.
  uint64_t* starts;   // (b, 2 chunks) of 64 tokens: the tokens at which runs begin; null: rows are one run
  uint8_t* states;    // (b h, chunks, H and G, n / 64, 64, 64) as wgmma reads them
  float* steps;       // (b h, chunks, delta and s, 128): s as in ssd_steps.cuh, over the chunk
  float* sums;        // (b h, tiles, kSums, 64)
  float* anchors;     // (b h, chunks, 4): v of each warp
  float* D;           // (h, 64); null without D
  float* skips;       // sums of dy o x: (b h, tiles, 4), of D per channel (b h, tiles, skip_rows(), 64)
  float* partial_BC;  // (blocks of shares, b, tiles * 64, dB and dC, n); unused where a group is one block
  double* partial_h;  // (parts, h, 2 + 64): dA, ddt_bias, dD per channel
  int* arrived;       // (h): parts that are done
  int* ticket;        // blocks of the states that run; then flags
  int* flags;         // (blocks of the states, kStateHeads): the state is handed over
  float* handed;      // (blocks of the states, kStateHeads, 64 n)
  float* decays;      // (blocks of the states, kStateHeads): of segments

  __host__ __device__ int skip_rows() const { return makes_skips ? 4 : 1; }
  __host__ __device__ bool sums_blocks() const { return blocks_B > 1 || blocks_C > 1; }
  __device__ int64_t row_head(int row, int head) const { return int64_t(row) * h + head; }
  __host__ __device__ int handed_count() const {
    return segments > 1 || cut.cuts_chains() ? cut.blocks * kStateHeads : 0;
  }
  __device__ uint64_t starts_of(int row, int tile) const {
    return starts ? starts[int64_t(row) * 2 * chunks + tile] : 0;
  }
};

// Of the starts of a tile: the first token, or 64; the last, or -1.
__device__ inline int first_start(uint64_t starts) { return starts ? __ffsll(starts) - 1 : kTile; }
__device__ inline int last_start(uint64_t starts) { return kTile - 1 - __clzll(starts); }

__device__ inline float parameter(const View& v, int head) {
  return v.data ? load_one<float>(v, head * v.stride[0]) : 0.f;
}
__device__ inline float load_dt(const SsdBwdArgs& a, int row, int head, int64_t t) {
  const View& dt = a.p.fwd.dt;
  return load_one<float>(dt, row * dt.stride[0] + t * dt.stride[1] + head * dt.stride[2]);
}

// ---- Pairs of 16-bit values in a word

template <class T>
__device__ inline uint32_t scale(uint32_t pair, float low, float high) {
  const float2 v = unpack<T>(pair);
  return pack<T>(v.x * low, v.y * high);
}

// ---- Fragments of a 64 x 64 tile (ptx.cuh): a thread holds rows 16 w + g + 8 r of columns 8 c + 2 t + e, in
// accumulators d[4 c + 2 r + e], in a left factor a[c / 2][c % 2 * 2 + r], a pair over e.

using Fragments = uint32_t[4][4];

// The address, in a tile, of this lane's row of the first of four 8 x 8 matrices: (rows + 0, columns + 0),
// (+ 8, + 0), (+ 0, + 8), (+ 8, + 8), from row 16 w; those of columns + 16 k lie at `^ 32 k`.
__device__ inline uint32_t fragment_address(uint32_t tile, int w) {
  const int lane = kept(threadIdx.x % 32), row = 16 * w + lane % 16;
  return tile + row * 128 + ((lane / 16 ^ row % 8) << 4);
}
__device__ inline void load_fragments(Fragments& a, uint32_t tile, int w) {
  const uint32_t address = fragment_address(tile, w);
#pragma unroll
  for (int k = 0; k < 4; ++k) ldmatrix<false>(a[k], address ^ k * 32);
}
__device__ inline void store_fragments(uint32_t tile, int w, const Fragments& a) {
  const uint32_t address = fragment_address(tile, w);
#pragma unroll
  for (int k = 0; k < 4; ++k) stmatrix<false>(address ^ k * 32, a[k][0], a[k][1], a[k][2], a[k][3]);
}
template <class T>
__device__ inline void store_tile(uint32_t tile, int w, const float* d) {
  Fragments a;
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = pack<T>(d[2 * i], d[2 * i + 1]);
  store_fragments(tile, w, a);
}
// Rows of a times w, rounded.
template <class T>
__device__ inline void scale_rows(Fragments& a, const SplitPair (&w)[2]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = multiply_halves<T>(a[i / 4][i % 4], w[i % 2].high);
}
// What `scaled` lacks of the rows of a times w.
template <class T>
__device__ inline void keep_rest(Fragments& a, const SplitPair (&w)[2], const Fragments& scaled) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t minus = scaled[i / 4][i % 4] ^ 0x80008000u;
    uint32_t& v = a[i / 4][i % 4];
    v = multiply_add_halves<T>(v, w[i % 2].low, multiply_add_halves<T>(v, w[i % 2].high, minus));
  }
}

// Over the four lanes that share rows.
__device__ inline void sum_rows(float (&v)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    v[r] += __shfl_xor_sync(kAllLanes, v[r], 1);
    v[r] += __shfl_xor_sync(kAllLanes, v[r], 2);
  }
}
// Rows of a o d, summed.
template <class T>
__device__ inline void row_dots(float (&sums)[2], const Fragments& a, const float (&d)[32]) {
  sums[0] = sums[1] = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 v = unpack<T>(a[i / 4][i % 4]);
    sums[i % 2] += v.x * d[2 * i] + v.y * d[2 * i + 1];
  }
  sum_rows(sums);
}

// Halves what each lane holds: the lanes with bit 2 kHalf keep the upper half, the others the lower.
template <int kHalf>
__device__ inline void fold(float (&v)[16], int lane) {
  const bool upper = lane & 2 * kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float keep = upper ? v[kHalf + i] : v[i], send = upper ? v[i] : v[kHalf + i];
    v[i] = keep + __shfl_xor_sync(kAllLanes, send, 2 * kHalf);
  }
}
// v: sums over the thread's two rows of its columns 8 c + 2 t + e at 2 c + e. Returns those over the warp's
// 16 rows of columns 2 lane, + 1.
__device__ inline float2 sum_columns(float (&v)[16], int lane) {
  fold<8>(v, lane);
  fold<4>(v, lane);
  fold<2>(v, lane);
  return {v[0], v[1]};
}

}  // namespace mamba_ops::gpu::sm90

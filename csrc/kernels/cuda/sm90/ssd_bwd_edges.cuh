// The edges of ssd_bwd_chunks.cuh: one warpgroup, a thread rows 16 w + g and + 8 of dB and dC of the tile. It
// also loads the factors of the next tile.
#pragma once
#include "kernels/cuda/sm90/ssd_bwd_chunks.cuh"

namespace mamba_ops::gpu::sm90 {

// <G, H> over the 16-byte pieces of this thread. Not unrolled further: the warps of an SM wait for
// instructions.
template <class T, int kN>
__device__ inline float dot_states(const uint8_t* H, const uint8_t* G, int tid) {
  float sum = 0;
#pragma unroll 2
  for (int i = 0; i < kFactorBytes<kN> / 16 / kWarpgroup; ++i) {
    const int at = (i * kWarpgroup + tid) * 16;
    const uint4 h = *reinterpret_cast<const uint4*>(H + at), g = *reinterpret_cast<const uint4*>(G + at);
    const uint32_t hs[4] = {h.x, h.y, h.z, h.w}, gs[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 u = unpack<T>(hs[k]), v = unpack<T>(gs[k]);
      sum += u.x * v.x + u.y * v.y;
    }
  }
  return sum;
}

// Rows of dB or dC of a tile, as they lie in the accumulators: to the partial sums, or where a group is one
// block of heads to their place.
template <class T, int kN>
__device__ void store_factor(const SsdBwdArgs& a, const ChunkItem& item, const View& to, int group, int which,
                             const float (&d)[kN / 2], int w, int lane) {
  const int r0 = item.first() + 16 * w + lane / 4, n0 = 2 * (lane % 4);
  if (a.sums_blocks()) {
    const int64_t tile = (int64_t(item.share * a.blocks + item.block) * a.b + item.row) * a.tiles;
    float* out = a.partial_BC + (tile * kTile + r0) * 2 * kN + which * kN + n0;
#pragma unroll
    for (int i = 0; i < kN / 4; ++i)
      *reinterpret_cast<float2*>(out + i % 2 * 8 * 2 * kN + i / 2 * 8) = {d[2 * i], d[2 * i + 1]};
    return;
  }
  T* out = static_cast<T*>(to.data) + item.row * to.stride[0] + group * to.stride[2] + n0;
#pragma unroll
  for (int i = 0; i < kN / 4; ++i)
    if (const int row = r0 + i % 2 * 8; row < a.l)
      *reinterpret_cast<uint32_t*>(out + row * to.stride[1] + i / 2 * 8) = pack<T>(d[2 * i], d[2 * i + 1]);
}

template <class T, int kN, bool kPacked>
__device__ void walk_edges(const SsdBwdMaps& maps, const SsdBwdArgs& a, uint8_t* shared, uint32_t base) {
  using Shared = ChunksShared<kN>;
  const int tid = threadIdx.x % kWarpgroup, lane = tid % 32;
  const int w = __shfl_sync(kAllLanes, tid / 32, 0), r0 = 16 * w + lane / 4;
  Ring<Shared::kStages> ring;
  Ring<1> factors;
  if (tid == 0) load_factors<kN>(maps, a, ChunkItem(a, blockIdx.x), base);
  const int items = chunk_items(a);
  for (int n = blockIdx.x; n < items; n += gridDim.x, factors.next()) {
    const ChunkItem item(a, n);
    const ChunkRuns<kPacked> runs(a, item);
    float dB[kN / 2], dC[kN / 2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) dB[i] = dC[i] = 0;
    wait_for(base + Shared::kFactorsReady, factors.parity);
    for (int head = item.head; head < item.head + item.heads; ++head, ring.next()) {
      const int stage = Shared::kFirstStage + ring.stage * Shared::kStage;
      const uint32_t H = base + stage + Shared::kH, G = base + stage + Shared::kG;
      const int64_t row_head = a.row_head(item.row, head);
      float HC[32];
      wait_for(base + Shared::kFull + 8 * ring.stage, ring.parity);
      wgmma_fence();
      multiply<T, kN / 16>(HC, base + Shared::kC, H);
      wgmma_commit();

      const ChunkSteps steps(shared + stage + Shared::kSteps);
      const int mine = item.half * kTile + r0;
      const float s_row[2] = {steps.s[mine], steps.s[mine + 8]}, end = steps.end();
      if (item.half == 0) {
        const float v =
            warp_sum(dot_states<T, kN>(shared + stage + Shared::kH, shared + stage + Shared::kG, tid));
        if (lane == 0)
          a.anchors[(row_head * a.chunks + item.tile / 2) * 4 + w] = runs.any() ? 0.f : exp2_of(end) * v;
      }
      Fragments left, rest;
      SplitPair weight[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float v = runs.enters(mine + 8 * r) ? exp2_of(s_row[r]) : 0.f;
        weight[r] = split<T>(v, v);
      }
      load_fragments(left, base + stage + Shared::kDy, w);
      scale_rows<T>(left, weight);
      wgmma_wait<0>();
      float entering[2];
      row_dots<T>(entering, left, HC);
      if (lane % 4 == 0) {
        float* sums = a.sums + ((row_head * a.tiles + item.tile) * kSums + kEntering) * kTile;
        sums[r0] = entering[0];
        sums[r0 + 8] = entering[1];
      }
      load_fragments(rest, base + stage + Shared::kDy, w);
      keep_rest<T>(rest, weight, left);
      wgmma_fence();
      add_product<T>(dC, left, H);
      add_product<T>(dC, rest, H);
      wgmma_commit();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float v = runs.leaves(mine + 8 * r) ? exp2_of(end - s_row[r]) * steps.delta[mine + 8 * r] : 0.f;
        weight[r] = split<T>(v, v);
      }
      wgmma_wait<0>();
      load_fragments(left, base + stage + Shared::kX, w);
      load_fragments(rest, base + stage + Shared::kX, w);
      scale_rows<T>(left, weight);
      keep_rest<T>(rest, weight, left);
      wgmma_fence();
      add_product<T>(dB, left, G);
      add_product<T>(dB, rest, G);
      wgmma_commit();
      wgmma_wait<0>();
      arrive(base + Shared::kEmpty + 8 * ring.stage);
    }

    // What the pairs add: dB += dCB^T C, dC += dCB B. Rows of the first square are j.
    const uint32_t dcb = base + Shared::kCB, other = base + Shared::kOther;
    sync_threads<2 * kWarpgroup>(kDcbWritten);
    wgmma_fence();
    add_product<T>(dB, dcb, base + Shared::kC);
    add_product<T>(dB, dcb + kTileBytes, item.half ? base + Shared::kC : other);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<T, true, true>(dC, mn_major_step(mn_major(dcb, kTileBytes), k),
                           mn_major_step(mn_major(base + Shared::kB, kTileBytes), k), true);
    add_product<T>(dC, dcb + 2 * kTileBytes, item.half ? other : base + Shared::kB);
    wgmma_commit();
    wgmma_wait<0>();
    sync_threads<3 * kWarpgroup>(kTileDone);
    if (tid == 0 && n + gridDim.x < items) load_factors<kN>(maps, a, ChunkItem(a, n + gridDim.x), base);
    store_factor<T, kN>(a, item, a.p.dB, item.head / a.heads_per_B, 0, dB, w, lane);
    store_factor<T, kN>(a, item, a.p.dC, item.head / a.heads_per_C, 1, dC, w, lane);
  }
}

}  // namespace mamba_ops::gpu::sm90

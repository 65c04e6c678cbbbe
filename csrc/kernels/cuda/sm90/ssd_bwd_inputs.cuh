// The inputs' gradients of ssd_bwd_chunks.cuh: one warpgroup, a thread rows 16 w + g and + 8 of gX.
#pragma once
#include "kernels/cuda/sm90/ssd_bwd_chunks.cuh"

namespace mamba_ops::gpu::sm90 {

template <class T, int kN, bool kPacked>
__device__ void walk_inputs(const SsdBwdMaps& maps, const SsdBwdArgs& a, uint8_t* shared, uint32_t base) {
  using Shared = ChunksShared<kN>;
  const int tid = threadIdx.x % kWarpgroup, lane = tid % 32, t = lane % 4;
  const int w = __shfl_sync(kAllLanes, tid / 32, 0), r0 = 16 * w + lane / 4;
  const uint32_t p_own = base + Shared::kP, p_other = p_own + kTileBytes, p_ready = base + Shared::kPReady;
  Ring<Shared::kStages> ring;
  Ring<1> factors, p_ring;
  const int items = chunk_items(a);
  for (int n = blockIdx.x; n < items; n += gridDim.x, factors.next()) {
    const ChunkItem item(a, n);
    const ChunkRuns<kPacked> runs(a, item);
    wait_for(base + Shared::kFactorsReady, factors.parity);
    for (int head = item.head; head < item.head + item.heads; ++head, ring.next(), p_ring.next()) {
      const int stage = Shared::kFirstStage + ring.stage * Shared::kStage;
      const uint32_t x = base + stage + Shared::kX, dy = base + stage + Shared::kDy;
      const uint32_t other = base + stage + Shared::kOtherTokens;
      const int64_t tile = a.row_head(item.row, head) * a.tiles + item.tile;
      float* sums = a.sums + tile * kSums * kTile;
      float gX[32];
      wait_for(base + Shared::kFull + 8 * ring.stage, ring.parity);
      wgmma_fence();
      multiply<T, kN / 16>(gX, base + Shared::kB, base + stage + Shared::kG);
      wgmma_commit();

      const ChunkSteps steps(shared + stage + Shared::kSteps);
      const int mine = item.half * kTile + r0;
      const float delta[2] = {steps.delta[mine], steps.delta[mine + 8]};
      float to_end[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        to_end[r] = runs.leaves(mine + 8 * r) ? exp2_of(steps.end() - steps.s[mine + 8 * r]) : 0.f;
      Fragments left;
      float dots[2];
      load_fragments(left, x, w);
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < 32; ++i) gX[i] *= to_end[i / 2 % 2];
      row_dots<T>(dots, left, gX);
      if (t == 0) {
        sums[kLeaving * kTile + r0] = delta[0] * dots[0];
        sums[kLeaving * kTile + r0 + 8] = delta[1] * dots[1];
      }
      wait_for(p_ready, p_ring.parity);
      wgmma_fence();
      add_product<T>(gX, p_own, dy);
      wgmma_commit();
      wait_for(p_ready + 8, p_ring.parity);
      wgmma_fence();
      // Half 1 adds zeros: products in a branch would run one by one.
      add_product<T>(gX, p_other, item.half ? dy : other);
      wgmma_commit();
      Fragments grads;
      load_fragments(grads, dy, w);
      if (a.makes_skips && a.p.fwd.dims.D_per_channel) {
        float products[16];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const uint32_t *x2 = left[c / 2] + c % 2 * 2, *dy2 = grads[c / 2] + c % 2 * 2;
          const float2 x0 = unpack<T>(x2[0]), x1 = unpack<T>(x2[1]), dy0 = unpack<T>(dy2[0]),
                       dy1 = unpack<T>(dy2[1]);
          products[2 * c] = x0.x * dy0.x + x1.x * dy1.x;
          products[2 * c + 1] = x0.y * dy0.y + x1.y * dy1.y;
        }
        *reinterpret_cast<float2*>(a.skips + (tile * 4 + w) * kTile + 2 * lane) = sum_columns(products, lane);
      }
      wgmma_wait<0>();
      if (lane == 0) arrive(base + Shared::kPFree);
      row_dots<T>(dots, left, gX);
      if (t == 0) {
        sums[kInput * kTile + r0] = dots[0];
        sums[kInput * kTile + r0 + 8] = dots[1];
      }
      const float* D = reinterpret_cast<const float*>(shared + stage + Shared::kD) + 2 * t;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float2 D2 = a.D ? *reinterpret_cast<const float2*>(D + 8 * c) : float2{};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t& pair = grads[c / 2][c % 2 * 2 + r];
          const float2 dy2 = unpack<T>(pair);
          pair = pack<T>(delta[r] * gX[4 * c + 2 * r] + D2.x * dy2.x,
                         delta[r] * gX[4 * c + 2 * r + 1] + D2.y * dy2.y);
        }
      }
      arrive(base + Shared::kEmpty + 8 * ring.stage);
      if (lane == 0) wait_stores_read<0>();
      __syncwarp();
      store_fragments(base + Shared::kDx, w, grads);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        tma_store(maps.dx, base + Shared::kDx + w * 16 * 128, 0, item.first() + 16 * w, head, item.row);
        commit_stores();
      }
    }
    sync_threads<3 * kWarpgroup>(kTileDone);
  }
  if (lane == 0) wait_stores<0>();
}

}  // namespace mamba_ops::gpu::sm90

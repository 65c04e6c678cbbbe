// The pairs of ssd_bwd_chunks.cuh: one warpgroup, a thread rows 16 w + g and + 8 of both squares.
#pragma once
#include "kernels/cuda/sm90/ssd_bwd_chunks.cuh"

namespace mamba_ops::gpu::sm90 {

enum class Square { own, other_i, other_j };

// One square of one head, from D, whose rows are the own tokens. cb: CB, this thread's; s_row, delta_row: of
// the thread's rows, length: of their runs from there on; s, delta: of the columns. Adds delta D o L to dcb,
// W to the sums of rows and, for the own pairs, of columns, their D_ii to skip; p: P.
template <class T, Square kSquare, bool kPacked>
__device__ inline void add_pairs(const float (&d)[32], const float4* cb, float (&dcb)[32], const float* s,
                                 const float* delta, float edge, const float (&s_row)[2],
                                 const float (&delta_row)[2], const ChunkRuns<kPacked>& runs,
                                 const int (&length)[2], int w, int lane, float (&row_sums)[2],
                                 float (&column_sums)[16], float& skip, Fragments& p) {
  const int g = lane / 4, t = lane % 4;
  float row_factor[2];
  if constexpr (kSquare != Square::own) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * w + g + 8 * r;
      row_factor[r] = exp2_of(kSquare == Square::other_i ? edge - s_row[r] : s_row[r] - edge);
      if (!(kSquare == Square::other_i ? runs.leaves_left(row) : runs.enters_right(row))) row_factor[r] = 0;
    }
  }
  // Read one step ahead: shared memory answers late.
  float4 next_cb = cb[0];
  float2 next_s = *reinterpret_cast<const float2*>(s + 2 * t);
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const float4 cb4 = next_cb;
    const float2 s2 = next_s;
    if (c < 7) {
      next_cb = cb[(c + 1) * kWarpgroup];
      next_s = *reinterpret_cast<const float2*>(s + 8 * (c + 1) + 2 * t);
    }
    uint32_t (&p_pairs)[4] = p[c / 2];
    if constexpr (kSquare == Square::own)
      if (c < 2 * w) {  // i < j for the whole warp
        p_pairs[c % 2 * 2] = p_pairs[c % 2 * 2 + 1] = 0;
        continue;
      }
    const float CB[4] = {cb4.x, cb4.y, cb4.z, cb4.w};
    const float s_column[2] = {s2.x, s2.y};
    float column_factor[2];
    if constexpr (kSquare == Square::other_i) {
      column_factor[0] = exp2_of(s_column[0] - edge);
      column_factor[1] = exp2_of(s_column[1] - edge);
    }
    if constexpr (kSquare == Square::other_j) {
      const float2 delta2 = *reinterpret_cast<const float2*>(delta + 8 * c + 2 * t);
      column_factor[0] = exp2_of(edge - s_column[0]) * delta2.x;
      column_factor[1] = exp2_of(edge - s_column[1]) * delta2.y;
    }
    if constexpr (kSquare != Square::own) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * c + 2 * t + e;
        if (!(kSquare == Square::other_i ? runs.enters_right(column) : runs.leaves_left(column)))
          column_factor[e] = 0;
      }
    }
    float L[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        L[r][e] = kSquare == Square::own ? s_column[e] - s_row[r] : column_factor[e] * row_factor[r];
    if constexpr (kSquare == Square::own) {
      if (kPacked || c < 2 * w + 2)  // the warp's part of the diagonal
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int ahead = 8 * c + 2 * t + e - (16 * w + g + 8 * r);  // i - j
            if (kPacked ? unsigned(ahead) >= unsigned(length[r]) : ahead < 0) L[r][e] = -INFINITY;
            if (ahead == 0) skip += d[4 * c + 2 * r + e];
          }
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int e = 0; e < 2; ++e) L[r][e] = exp2_of(L[r][e]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float P[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = 4 * c + 2 * r + e;
        if constexpr (kSquare == Square::other_j) {
          const float dCB = d[at] * L[r][e];
          dcb[at] += dCB;
          row_sums[r] += dCB * CB[2 * r + e];
        } else {
          const float dM = d[at] * delta_row[r];
          P[e] = CB[2 * r + e] * L[r][e];
          dcb[at] += dM * L[r][e];
          row_sums[r] += dM * P[e];
          if constexpr (kSquare == Square::own) column_sums[2 * c + e] += dM * P[e];
        }
      }
      if constexpr (kSquare != Square::other_j) p_pairs[c % 2 * 2 + r] = pack<T>(P[0], P[1]);
    }
  }
}

template <class T, int kN, bool kPacked>
__device__ void walk_pairs(const SsdBwdArgs& a, uint8_t* shared, uint32_t base) {
  using Shared = ChunksShared<kN>;
  const int tid = threadIdx.x, lane = tid % 32, w = __shfl_sync(kAllLanes, tid / 32, 0),
            r0 = 16 * w + lane / 4;
  float4* cb = reinterpret_cast<float4*>(shared + Shared::kCB) + tid;
  float4* other_cb = cb + Shared::kSquare / 16;
  const uint32_t p_own = base + Shared::kP, p_other = p_own + kTileBytes;
  const uint32_t p_ready = base + Shared::kPReady, p_free = base + Shared::kPFree;
  Ring<Shared::kStages> ring;
  Ring<1> factors, p_ring;
  int buffer = 0;
  const int items = chunk_items(a);
  for (int n = blockIdx.x; n < items; n += gridDim.x, factors.next()) {
    const ChunkItem item(a, n);
    const ChunkRuns<kPacked> runs(a, item);
    const int length[2] = {runs.length(r0), runs.length(r0 + 8)};
    float own[32], other[32], dcb_own[32], dcb_other[32];
    wait_for(base + Shared::kFactorsReady, factors.parity);
    wgmma_fence();
    multiply<T, kN / 16>(own, base + Shared::kB, base + Shared::kC);
    multiply<T, kN / 16>(other, base + (item.half ? Shared::kC : Shared::kB), base + Shared::kOther);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      cb[c * kWarpgroup] = {own[4 * c], own[4 * c + 1], own[4 * c + 2], own[4 * c + 3]};
      other_cb[c * kWarpgroup] = {other[4 * c], other[4 * c + 1], other[4 * c + 2], other[4 * c + 3]};
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) dcb_own[i] = dcb_other[i] = 0;
    store_tile<T>(p_other, w, dcb_other);  // what half 1 leaves there

    for (int head = item.head; head < item.head + item.heads;
         ++head, ring.next(), p_ring.next(), buffer ^= 1) {
      const int stage = Shared::kFirstStage + ring.stage * Shared::kStage;
      const uint32_t x = base + stage + Shared::kX, dy = base + stage + Shared::kDy;
      float* columns = reinterpret_cast<float*>(shared + Shared::kColumns) + buffer * 4 * kTile;
      float* rows = reinterpret_cast<float*>(shared + Shared::kRows) + buffer * kTile;
      wait_for(base + Shared::kFull + 8 * ring.stage, ring.parity);
      wgmma_fence();
      multiply<T, 4>(own, x, dy);
      wgmma_commit();
      multiply<T, 4>(other, item.half ? dy : x, base + stage + Shared::kOtherTokens);
      wgmma_commit();

      const ChunkSteps steps(shared + stage + Shared::kSteps);
      const int mine = item.half * kTile + r0;
      const float edge = steps.edge(), s_row[2] = {steps.s[mine], steps.s[mine + 8]};
      const float delta_row[2] = {steps.delta[mine], steps.delta[mine + 8]};
      float sums[2] = {}, others[2] = {}, column_sums[16] = {}, skip = 0;
      Fragments p;
      wgmma_wait<1>();
      add_pairs<T, Square::own>(own, cb, dcb_own, steps.s + item.half * kTile, nullptr, edge, s_row,
                                delta_row, runs, length, w, lane, sums, column_sums, skip, p);
      wait_for(p_free, p_ring.parity ^ 1);
      store_fragments(p_own, w, p);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) arrive(p_ready);
      *reinterpret_cast<float2*>(columns + w * kTile + 2 * lane) = sum_columns(column_sums, lane);
      wgmma_wait<0>();
      if (item.half == 0) {
        add_pairs<T, Square::other_i>(other, other_cb, dcb_other, steps.s + kTile, nullptr, edge, s_row,
                                      delta_row, runs, length, w, lane, others, column_sums, skip, p);
        store_fragments(p_other, w, p);
        fence_async_proxy();
      } else {
        add_pairs<T, Square::other_j>(other, other_cb, dcb_other, steps.s, steps.delta, edge, s_row,
                                      delta_row, runs, length, w, lane, others, column_sums, skip, p);
      }
      __syncwarp();
      if (lane == 0) arrive(p_ready + 8);
      arrive(base + Shared::kEmpty + 8 * ring.stage);
#pragma unroll
      for (int r = 0; r < 2; ++r) sums[r] = (item.half ? others[r] : -others[r]) - sums[r];
      sum_rows(sums);
      if (lane % 4 == 0) {
        rows[r0] = sums[0];
        rows[r0 + 8] = sums[1];
      }
      const int64_t tile = a.row_head(item.row, head) * a.tiles + item.tile;
      if (a.makes_skips && !a.p.fwd.dims.D_per_channel) {
        skip = warp_sum(skip);
        if (lane == 0) a.skips[tile * 4 + w] = skip;
      }
      sync_threads<kWarpgroup>(kPairsOnly);
      if (tid < kTile) {
        const float* c = columns + tid;
        a.sums[(tile * kSums + kPairs) * kTile + tid] =
            rows[tid] + ((c[0] + c[kTile]) + (c[2 * kTile] + c[3 * kTile]));
      }
    }

    // Own pairs, then those with the other half: for dB, for dC; one of the two is zero.
    const uint32_t dcb = base + Shared::kCB;
    sync_threads<kWarpgroup>(kPairsOnly);  // CB is read
    store_tile<T>(dcb, w, dcb_own);
    store_tile<T>(dcb + (1 + item.half) * kTileBytes, w, dcb_other);
#pragma unroll
    for (int i = 0; i < 32; ++i) dcb_other[i] = 0;
    store_tile<T>(dcb + (2 - item.half) * kTileBytes, w, dcb_other);
    fence_async_proxy();
    sync_threads<2 * kWarpgroup>(kDcbWritten);
    sync_threads<3 * kWarpgroup>(kTileDone);
  }
}

}  // namespace mamba_ops::gpu::sm90

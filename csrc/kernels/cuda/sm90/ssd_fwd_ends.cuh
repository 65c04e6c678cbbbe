// The Hopper forward of the SSD where a sequence is cut into segments: their ends, from nothing.
//
//   E = sum_j e^{T - s_j} dt_j X_j B_j^T and e^T over a part of a chain
//
// Chunk by chunk from the end of the part: then the weights alone decay and E is one long product. A block
// owns a part and a pair of slabs; warpgroups 0, 1 a slab each, warps 0, 1 of warpgroup 2 make its weights,
// warp 2 loads. Shared memory: 6 stages (n = 64: 8) of B, the pair's X and the weights. The steps lie far
// apart in memory: they are asked for as many chunks ahead, without which each chunk would wait for them (b1
// l65536 h128, the whole forward on an H100: 1.12 ms instead of 1.05).
#pragma once
#include "kernels/cuda/sm90/ssd_fwd.cuh"

namespace mamba_ops::gpu::sm90::forward {

template <int kN>
struct EndsShared {
  static constexpr int kStages = kN == 128 ? 6 : 8;
  static constexpr int kFactor = kN / 64 * kTile, kStage = kFactor + 2 * kTile;
  static constexpr int kWeights = kStages * kStage,
                       kBarriers = kWeights + kStages * 2 * 48 * int(sizeof(SplitPair));
  static constexpr int kBytes = kBarriers + kStages * 16 + 1024;

  uint8_t* bytes;
  uint32_t address;

  __device__ explicit EndsShared(uint8_t* memory) {
    const uint32_t start = shared_address(memory);
    address = (start + 1023) / 1024 * 1024;
    bytes = memory + (address - start);
    asm volatile("" : "+r"(address));  // to be kept, not worked out again and again
  }
  __device__ uint32_t B(uint32_t stage) const { return address + stage * kStage; }
  __device__ uint32_t X(uint32_t stage, int slab) const { return B(stage) + kFactor + slab * kTile; }
  __device__ SplitPair* weights(uint32_t stage, int slab) const {
    return reinterpret_cast<SplitPair*>(bytes + kWeights) + (stage * 2 + slab) * 48;
  }
  __device__ uint32_t full(uint32_t stage) const { return address + kBarriers + stage * 16; }
  __device__ uint32_t free(uint32_t stage) const { return full(stage) + 8; }
};

// Part `number` of a chain.
template <class T, class Dt, int kN, bool kPacked>
__device__ void make_end(const Maps& maps, const FwdArgs& args, uint8_t* memory, int chain, int number) {
  using Memory = EndsShared<kN>;
  const Memory shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Memory::kStages; ++i) {
      barrier_init(shared.full(i), 1 + 64);  // the loads, and the weights of two slabs
      barrier_init(shared.free(i), 256);
    }
    barriers_ready();
  }
  __syncthreads();
  const bool invalid = kPacked && is_invalid_pack(args.seqs, args.l);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);
  const int begin = args.plan.part_begin(number), end = args.plan.part_begin(number + 1), count = end - begin;
  const int64_t to = int64_t(chain) * args.plan.ends() + number;
  const Pair pair(args, chain);
  constexpr int kStages = Memory::kStages;
  if (warpgroup == 2 && warp < 2) {
    const int head = pair.head_of(args, warp);
    const HeadRates rates(args, head, invalid);
    StepReader<Dt> reader{lane};
    reader.aim(args, pair.row, head, end - 1);
    reader.read(args, end - 1);
    for (int k = 1; k < kStages && k < count; ++k) reader.ask(args, end - 1 - k, -k);
    float later = 1;  // decay from the end of the chunk to that of the part
    for (uint32_t i = 0; i < count; ++i) {
      const int chunk = end - 1 - int(i), stage = int(i % kStages);
      const LaneSteps<kPacked> steps(args, reader, rates, chain, chunk);
      reader.skip(args, -1);
      if (chunk > begin) reader.read(args, chunk - 1);
      if (chunk - kStages >= begin) reader.ask(args, chunk - kStages, 1 - kStages);
      wait_for(shared.free(stage), parity(i, kStages) ^ 1);
      shared.weights(stage, warp)[pair_at(lane)] = steps.template weights<T>(later);
      arrive(shared.full(stage));
      later *= steps.decay();
    }
    if (lane == 0) args.decays[to * 2 + warp] = later;
  } else if (warpgroup == 2 && warp == 2 && lane == 0) {
    for (uint32_t i = 0; i < count; ++i) {
      const int chunk = end - 1 - int(i), stage = int(i % kStages);
      const uint32_t full = shared.full(stage);
      wait_for(shared.free(stage), parity(i, kStages) ^ 1);
      arrive_and_expect(full, Memory::kStage);
      for (int k = 0; k < kN / 64; ++k)
        tma_load(shared.B(stage) + k * kTile, maps.B, full, k * 64, chunk * kQ, pair.group_B, pair.row);
      tma_load(shared.X(stage, 0), maps.x, full, 0, chunk * kQ, pair.part, pair.head, pair.row);
    }
  } else if (warpgroup < 2) {
    const uint32_t row = turned_row();
    float E[kN / 2];
#pragma unroll
    for (float& v : E) v = 0;
    for (uint32_t i = 0; i < count; ++i) {
      const int stage = int(i % kStages);
      uint32_t x[4][4];
      wait_for(shared.full(stage), parity(i, kStages));
      turn(x, shared.X(stage, warpgroup) + row);
      weigh<T>(x, shared.weights(stage, warpgroup), lane % 4);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma<T, true>(E, x[k], mn_major_step(mn_major(shared.B(stage), kTile), k), true);
      wgmma_commit();
      wgmma_wait<0>();
      arrive(shared.free(stage));
    }
    store_fragment(args.ends + (to * 2 + warpgroup) * (64 * kN), E);
  }
}

template <class T, class Dt, int kN, bool kPacked>
__global__ void __launch_bounds__(384, 1)
    ssd_fwd_ends(const __grid_constant__ Maps maps, const __grid_constant__ FwdArgs args) {
  extern __shared__ uint8_t memory[];
  const int ends = args.plan.ends();
  make_end<T, Dt, kN, kPacked>(maps, args, memory, blockIdx.x / ends, blockIdx.x % ends);
}

}  // namespace mamba_ops::gpu::sm90::forward

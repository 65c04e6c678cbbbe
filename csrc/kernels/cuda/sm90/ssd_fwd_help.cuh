// The Hopper forward of the SSD: shared memory, and the warpgroups that load and prepare a chunk
// (ssd_fwd.cu).
#pragma once
#include "kernels/cuda/sm90/ssd_fwd.cuh"

namespace mamba_ops::gpu::sm90::forward {

// The factors of a slab and chunk. s in powers of two.
struct alignas(16) Steps {
  float s[kQ], dt[kQ];
  int start[kQ];         // of LaneSteps
  float row[kQ];         // e^{s_i - r}, r = s at the end of the 16 tokens before those of i
  float column[96];      // e^{r - s_j} dt_j for the j before those 16: for rows from 16, 32, 48 on
  float from_start[96];  // e^{s_i}, a pair at pair_at of its lane
  SplitPair weight[48];  // pairs of w_j, likewise
  float decay, D;        // e^T; of the head, 0 if per channel
};

template <int kN>
struct Shared {
  static constexpr int kStages = kN == 128 ? 3 : 4;
  static constexpr int kFactor = kN / 64 * kTile;  // of B or C
  static constexpr int kStage = 2 * kFactor + 2 * kTile;
  static constexpr int kP = kStages * kStage, kY = kP + 4 * kTile, kSteps = kY + 4 * kTile;
  static constexpr int kBarriers = kSteps + 8 * sizeof(Steps);
  static constexpr int kHeads = kBarriers + (2 * kStages + 24) * 8;
  static constexpr int kPairs = kHeads + 4 * sizeof(HeadRates);
  static constexpr int kBytes = kPairs + 2 * sizeof(Pair) + 1024;  // 1024: to align

  uint8_t* bytes;
  uint32_t address;

  __device__ explicit Shared(uint8_t* memory) {
    const uint32_t start = shared_address(memory);
    address = (start + 1023) / 1024 * 1024;
    asm volatile("" : "+r"(address));  // to be kept, not worked out again and again
    bytes = memory + (address - start);
  }
  __device__ uint32_t B(uint32_t stage) const { return address + stage * kStage; }
  __device__ uint32_t C(uint32_t stage) const { return B(stage) + kFactor; }
  __device__ uint32_t X(uint32_t stage, int slab) const { return C(stage) + kFactor + slab * kTile; }
  __device__ uint32_t P(uint32_t chunk, int slab) const {
    return address + kP + (chunk % 2 * 2 + slab) * kTile;
  }
  __device__ uint32_t Y(uint32_t chunk, int slab) const {
    return address + kY + (chunk % 2 * 2 + slab) * kTile;
  }
  __device__ Steps& steps(uint32_t chunk, int slab) const {
    return reinterpret_cast<Steps*>(bytes + kSteps)[chunk % 4 * 2 + slab];
  }
  __device__ HeadRates& head(int helpers, int slab) const {
    return reinterpret_cast<HeadRates*>(bytes + kHeads)[helpers * 2 + slab];
  }
  __device__ Pair& pair(int helpers) const { return reinterpret_cast<Pair*>(bytes + kPairs)[helpers]; }
  // Barriers of stages: B and C are there, X is there.
  __device__ uint32_t has_BC(uint32_t stage) const { return barrier(stage); }
  __device__ uint32_t has_X(uint32_t stage) const { return barrier(kStages + stage); }
  // Barriers of chunks, of phase chunk / 4 % 2: steps, P are there; the slab's warpgroup is done, and so are
  // the helpers, whose P it used: stage, steps and P are free.
  __device__ uint32_t has_steps(uint32_t chunk) const { return barrier(2 * kStages + chunk % 4); }
  __device__ uint32_t has_P(uint32_t chunk, int slab) const {
    return barrier(2 * kStages + 4 + chunk % 4 * 2 + slab);
  }
  __device__ uint32_t done(uint32_t chunk, int slab) const {
    return barrier(2 * kStages + 12 + chunk % 4 * 2 + slab);
  }
  __device__ void wait_done(uint32_t chunk) const {
    for (int slab = 0; slab < 2; ++slab) wait_for(done(chunk, slab), parity(chunk, 4));
  }
  // Whether it is, where chunk - 4 is.
  __device__ bool is_done(uint32_t chunk) const {
    return has_ended(done(chunk, 0), parity(chunk, 4)) && has_ended(done(chunk, 1), parity(chunk, 4));
  }
  // z is there: of phase chunk / 2 % 2.
  __device__ uint32_t has_z(uint32_t chunk, int slab) const {
    return barrier(2 * kStages + 20 + chunk % 2 * 2 + slab);
  }
  __device__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(has_BC(i), 1);
      barrier_init(has_X(i), 1);
    }
    for (int i = 0; i < 4; ++i) {
      barrier_init(has_steps(i), 64);
      for (int slab = 0; slab < 2; ++slab) {
        barrier_init(has_P(i, slab), 4);
        barrier_init(done(i, slab), 128);
      }
    }
    for (int i = 0; i < 4; ++i) barrier_init(has_z(i / 2, i % 2), 1);
    barriers_ready();
  }

 private:
  __device__ uint32_t barrier(int i) const { return address + kBarriers + i * 8; }
};

template <bool kPacked>
__device__ inline void write_steps(Steps& to, const LaneSteps<kPacked>& from, SplitPair weights, float D) {
  const int lane = from.lane, block = lane / 8, first = 2 * lane;
  const auto pair = [](float* table, float low, float high) {
    *reinterpret_cast<float2*>(table) = make_float2(low, high);
  };
  float end[4];  // s at the end of the 16 tokens before those of block 1, 2, 3
#pragma unroll
  for (int k = 1; k < 4; ++k) end[k] = __shfl_sync(kAllLanes, from.s[1], 8 * k - 1);
  const float own_end = block == 0 ? 0.f : block == 1 ? end[1] : block == 2 ? end[2] : end[3];
  float row[2], column[4][2], from_start[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    row[k] = exp2_of(from.s[k] - own_end);
    from_start[k] = exp2_of(from.s[k]);
#pragma unroll
    for (int rows = 1; rows < 4; ++rows) column[rows][k] = exp2_of(end[rows] - from.s[k]) * from.dt[k];
  }
  if constexpr (kPacked) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (from.start[k] >= 16 * block) row[k] = 0.f;
      if (from.start[k] >= 0) from_start[k] = 0.f;
#pragma unroll
      for (int rows = 1; rows < 4; ++rows)
        if (__shfl_sync(kAllLanes, from.start[1], 8 * rows - 1) > first + k) column[rows][k] = 0.f;
    }
    *reinterpret_cast<int2*>(to.start + first) = make_int2(from.start[0], from.start[1]);
  }
  pair(to.s + first, from.s[0], from.s[1]);
  pair(to.dt + first, from.dt[0], from.dt[1]);
  pair(to.row + first, row[0], row[1]);
  const uint32_t own = pair_at(kept(lane));  // worked out here: no register is left to keep it in
  pair(to.from_start + 2 * own, from_start[0], from_start[1]);
  to.weight[own] = weights;
#pragma unroll
  for (int rows = 1; rows < 4; ++rows)
    if (block < rows) pair(to.column + 8 * rows * (rows - 1) + first, column[rows][0], column[rows][1]);
  if (lane == 0) {
    to.decay = from.decay();
    to.D = D;
  }
}

// Rows 16 kRow to 16 kRow + 15 of P from those of S = C B^T, up to the diagonal; what lies beyond stays zero.
template <class T, bool kPacked, int kRow>
__device__ inline void make_P(uint32_t P, const float (&S)[32], const Steps& steps, int lane) {
  const uint32_t here = kept(lane), g = here / 4, t = here % 4;
  // Every factor first: a load from shared memory takes long beside the products.
  float2 column[2 * kRow + 1], s[2], dt[2];
  float row[2], s_row[2];
#pragma unroll
  for (int c = 0; c < 2 * kRow; ++c)
    column[c] = *reinterpret_cast<const float2*>(steps.column + 8 * kRow * (kRow - 1) + 8 * c + 2 * t);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    row[k] = steps.row[16 * kRow + 8 * k + g];
    s_row[k] = steps.s[16 * kRow + 8 * k + g];
    s[k] = *reinterpret_cast<const float2*>(steps.s + 16 * kRow + 8 * k + 2 * t);
    dt[k] = *reinterpret_cast<const float2*>(steps.dt + 16 * kRow + 8 * k + 2 * t);
  }
  const float D = steps.D;
  const uint32_t lane_row = P + (16 * kRow + here % 16) * 128;
#pragma unroll
  for (int block = 0; block <= kRow; ++block) {
    uint32_t word[4];
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* two = S + 8 * block + 4 * c + 2 * r;
        float low, high;
        if (block < kRow) {
          low = two[0] * (column[2 * block + c].x * row[r]);
          high = two[1] * (column[2 * block + c].y * row[r]);
        } else {
          const int i = int(8 * r + g), j = int(8 * c + 2 * t);
          low = two[0] * (exp2_of(s_row[r] - s[c].x) * dt[c].x);
          high = two[1] * (exp2_of(s_row[r] - s[c].y) * dt[c].y);
          const int start = kPacked ? steps.start[16 * kRow + i] - 16 * kRow : 0;
          low = j <= i && j >= start ? low : 0.f;
          high = j < i && j + 1 >= start ? high : 0.f;
          low = j == i ? low + D : low;
          high = j + 1 == i ? high + D : high;
        }
        word[2 * c + r] = pack<T>(low, high);
      }
    stmatrix<false>(lane_row + ((2 * block + here / 16) ^ here % 8) * 16, word[0], word[1], word[2], word[3]);
  }
}

// What a warp of helpers does with its rows of S; `meanwhile` after each slab's.
template <class T, bool kPacked, int kRow, int kN, class F>
__device__ inline void write_P(const Shared<kN>& shared, const float (&S)[32], uint32_t i, int lane,
                               F meanwhile) {
#pragma unroll 1
  for (int slab = 0; slab < 2; ++slab) {
    if (i >= 2) wait_for(shared.done(i - 2, slab), parity(i - 2, 4));
    make_P<T, kPacked, kRow>(shared.P(i, slab), S, shared.steps(i, slab), lane);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) arrive(shared.has_P(i, slab));
    meanwhile();
  }
}

// Loads chunk number i of the block, whose stage is free. By one thread.
template <int kN>
__device__ inline void load(const Maps& maps, const Shared<kN>& shared, uint32_t i, const Pair& pair,
                            int token) {
  const uint32_t stage = i % Shared<kN>::kStages, has_BC = shared.has_BC(stage), has_X = shared.has_X(stage);
  arrive_and_expect(has_BC, 2 * Shared<kN>::kFactor);
#pragma unroll
  for (int k = 0; k < kN / 64; ++k) {
    tma_load(shared.C(stage) + k * kTile, maps.C, has_BC, k * 64, token, pair.group_C, pair.row);
    tma_load(shared.B(stage) + k * kTile, maps.B, has_BC, k * 64, token, pair.group_B, pair.row);
  }
  arrive_and_expect(has_X, 2 * kTile);
  tma_load(shared.X(stage, 0), maps.x, has_X, 0, token, pair.part, pair.head, pair.row);
}

// The chunks of one parity: loads, steps, P. Within a piece the next chunk is loaded as soon as its stage is
// free, beside the work on this one: S waits for nothing else, and memory answers late.
template <class T, class Dt, int kN, bool kPacked>
__device__ void help(const Maps& maps, const FwdArgs& args, const BlockPieces& pieces,
                     const Shared<kN>& shared, int which, bool invalid) {
  constexpr int kStages = Shared<kN>::kStages;
  const int lane = int(threadIdx.x % 32), warp = __shfl_sync(kAllLanes, threadIdx.x / 32 % 4, 0);
  Pair& pair = shared.pair(which);    // warp 2: of the loads
  bool loaded = false;                // this chunk already
  StepReader<Dt> reader{kept(lane)};  // warps 0, 1
  const auto aim = [&](const Walk& chunk) {
    if (!chunk.valid()) return;
    const Pair pair(args, chunk.chain);
    reader.aim(args, pair.row, pair.head_of(args, warp), chunk.chunk);
    reader.read(args, chunk.chunk);
  };
  Walk at(pieces, which);
  if (warp < 2) aim(at);
  int piece = -1;
  for (uint32_t i = which; at.valid(); at.skip(2), i += 2) {
    const bool goes_on = at.chunk + 2 < at.end;
    if (warp < 2) {
      HeadRates& head = shared.head(which, warp);
      if (at.piece != piece) [[unlikely]] {
        if (lane == 0) head = HeadRates(args, Pair(args, at.chain).head_of(args, warp), invalid);
        __syncwarp();
      }
      const LaneSteps<kPacked> steps(args, reader, head, at.chain, at.chunk);
      if (goes_on) [[likely]] {
        reader.skip(args, 2);
        reader.read(args, at.chunk + 2);
      } else {
        Walk next = at;
        next.skip(2);
        aim(next);
      }
      write_steps(shared.steps(i, warp), steps, steps.template weights<T>(1.f), head.D);
      arrive(shared.has_steps(i));
    } else if (warp == 2) {
      if (lane == 0 && !loaded) {
        if (at.piece != piece) [[unlikely]]
          pair = Pair(args, at.chain);
        if (i >= kStages) shared.wait_done(i - kStages);
        load(maps, shared, i, pair, at.chunk * kQ);
      }
      __syncwarp();
    }
    loaded = false;
    piece = at.piece;
    sync_threads<128>(3 + which);  // all have read the steps of the chunk before
    const uint32_t stage = i % kStages;
    float S[32];
    wait_for(shared.has_BC(stage), parity(i, kStages));
    wgmma_fence();
    const uint64_t C = k_major(shared.C(stage)), B = k_major(shared.B(stage));
#pragma unroll
    for (int k = 0; k < kN / 16; ++k)
      wgmma<T, false, false>(S, k_major_step(C, k, kTile), k_major_step(B, k, kTile), k > 0);
    wgmma_commit();
    const auto load_next = [&] {
      if (lane == 0 && !loaded && goes_on && (i + 2 < kStages || shared.is_done(i + 2 - kStages))) {
        load(maps, shared, i + 2, pair, (at.chunk + 2) * kQ);
        loaded = true;
      }
      __syncwarp();
    };
    if (warp == 2) load_next();
    wait_for(shared.has_steps(i), parity(i, 4));
    wgmma_wait<0>();
    const auto nothing = [] {};
    if (warp == 0)
      write_P<T, kPacked, 0>(shared, S, i, lane, nothing);
    else if (warp == 1)
      write_P<T, kPacked, 1>(shared, S, i, lane, nothing);
    else if (warp == 2)
      write_P<T, kPacked, 2>(shared, S, i, lane, load_next);
    else
      write_P<T, kPacked, 3>(shared, S, i, lane, nothing);
  }
}

}  // namespace mamba_ops::gpu::sm90::forward

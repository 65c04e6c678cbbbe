// The Hopper forward of the SSD: a warpgroup that owns a slab, its states between blocks (ssd_fwd.cu).
#pragma once
#include "kernels/cuda/sm90/ssd_bwd_gate.cuh"
#include "kernels/cuda/sm90/ssd_fwd_help.cuh"

namespace mamba_ops::gpu::sm90::forward {

__device__ inline int* flag_of(const FwdArgs& args, int index, int slab) {
  return args.ticket + 1 + 2 * index + slab;
}

// The state that enters a piece.
template <int kN>
__device__ inline void enter(float (&H)[kN / 2], const FwdArgs& args, const ChainPiece& piece, int row,
                             int slab, int index, int which) {
#pragma unroll
  for (float& v : H) v = 0;
  const Plan& plan = args.plan;
  const bool from_row = piece.begin == 0 || plan.segments > 1;
  if (from_row && args.states_in && slab < args.h * args.slabs)
    each_state_pair(args, slab % args.slabs, H, [&](int64_t at, float& low, float& high) {
      const int64_t state = int64_t(row) * args.h + slab / args.slabs;
      const float2 v = *reinterpret_cast<const float2*>(args.states_in + state * args.p * args.n + at);
      low = v.x;
      high = v.y;
    });
  if (piece.begin == 0) return;
  if (plan.segments == 1) {
    wait_for_flag(flag_of(args, index - 1, which), 1 + which);
    add_fragment(H, 0.f, args.handed + ((index - 1) * 2 + which) * int64_t(64 * kN));
    return;
  }
  const int segment = index % plan.segments;
  for (int part = 0; part < segment * plan.parts; ++part) {
    if (plan.makes_ends) wait_for_flag(flag_of(args, index - segment + part, which), 1 + which);
    const int64_t at = (int64_t(piece.chain) * plan.ends() + part) * 2 + which;
    add_fragment(H, args.decays[at], args.ends + at * (64 * kN));
  }
}

// The state that leaves a piece.
template <int kN>
__device__ inline void leave(float (&H)[kN / 2], const FwdArgs& args, const ChainPiece& piece, int row,
                             int slab, int index, int which, bool active) {
  if (piece.end == args.plan.chunks) {
    if (args.states_out && active)
      each_state_pair(args, slab % args.slabs, H, [&](int64_t at, float low, float high) {
        const int64_t state = int64_t(row) * args.h + slab / args.slabs;
        *reinterpret_cast<float2*>(args.states_out + state * args.p * args.n + at) = make_float2(low, high);
      });
  } else if (args.plan.segments == 1) {
    store_fragment(args.handed + (index * 2 + which) * int64_t(64 * kN), H);
    raise_flag(flag_of(args, index, which), 1 + which);
  }
}

// Y^T += D o X^T.
template <class T>
__device__ inline void add_skip(float (&Y)[32], uint32_t X_row, const float (&D)[2]) {
  uint32_t x[4][4];
  turn(x, X_row);
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    const float2 two = unpack<T>(x[k / 4][k % 4]);
    Y[2 * k] += D[k % 2] * two.x;
    Y[2 * k + 1] += D[k % 2] * two.y;
  }
}

// Y^T o silu(z)^T.
template <class T>
__device__ inline void apply_gate(float (&Y)[32], uint32_t z_row) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t z[4];
    ldmatrix<true>(z, z_row + 2048 * k);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 gate = unpack<T>(z[r]);
      Y[8 * k + 2 * r] *= silu(gate.x);
      Y[8 * k + 2 * r + 1] *= silu(gate.y);
    }
  }
}
template <class T>
__device__ inline void write_y(const float (&Y)[32], uint32_t y_row) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t word[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) word[r] = pack<T>(Y[8 * k + 2 * r], Y[8 * k + 2 * r + 1]);
    stmatrix<true>(y_row + 2048 * k, word[0], word[1], word[2], word[3]);
  }
}

// All pieces of a block, for its slab number `which`. With GateMaps the gradients of z and o instead of y.
template <class T, int kN, class MapsOf>
__device__ void scan_slab(const MapsOf& maps, const FwdArgs& args, const BlockPieces& pieces,
                          const Shared<kN>& shared, int index, int which) {
  constexpr bool kGradient = std::is_same_v<MapsOf, GateMaps>;
  constexpr int kStages = Shared<kN>::kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = kept(lane % 4);
  const bool first_thread = threadIdx.x % 128 == 0;
  const uint32_t row = kept(turned_row());
  uint32_t i = 0;
  for (int number = 0; number < pieces.count; ++number) {
    const ChainPiece piece = pieces[number];
    const Pair pair(args, piece.chain);
    const bool active = which < pair.count;
    const int slab = pair.slab + which, head = pair.head_of(args, which), part = slab % args.slabs;
    const auto load = [&](const CUtensorMap& map, uint32_t tile, uint32_t there, int chunk) {
      tma_load(tile, map, there, 0, chunk * kQ, part, head, pair.row);
    };
    const auto load_z = [&](int chunk, uint32_t i) {  // by one thread
      const uint32_t there = shared.has_z(i, which);
      if (!active) return arrive(there);  // the phases count all chunks of the block
      arrive_and_expect(there, (kGradient ? 2 : 1) * kTile);
      load(maps.z, shared.Y(i, which), there, chunk);
      if constexpr (kGradient) {
        load(maps.dy, shared.Y(i + 1, which), there, chunk);
        if (chunk + 1 == piece.end) return;
        for (const CUtensorMap* map : {&maps.z, &maps.dy})
          tma_prefetch(*map, 0, (chunk + 1) * kQ, part, head, pair.row);
      }
    };
    const auto store_y = [&](int chunk, uint32_t i) {
      const auto store = [&](const CUtensorMap& map, uint32_t tile) {
        tma_store(map, tile, 0, chunk * kQ, part, head, pair.row);
      };
      fence_async_proxy();
      sync_threads<128>(1 + which);
      if (!first_thread || !active) return;
      store(maps.y, shared.Y(i, which));
      if constexpr (kGradient) store(maps.grad_o, shared.Y(i + 1, which));
      commit_stores();
    };
    const bool gated = args.z && active;
    if (!kGradient && args.z && first_thread) load_z(piece.begin, i);
    float D[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) D[r] = channel_D(args, head, part * 64 + 16 * warp + g + 8 * r);
    float H[kN / 2];
    enter<kN>(H, args, piece, pair.row, slab, index, which);

    for (int chunk = piece.begin; chunk < piece.end; ++chunk, ++i) {
      const Steps& steps = shared.steps(i, which);
      const uint32_t stage = i % kStages;
      float Y[32];
      uint32_t h[kN / 4], x[4][4];
      wait_for(shared.has_steps(i), parity(i, 4));
      const float decay = steps.decay;
#pragma unroll
      for (int k = 0; k < kN / 4; ++k) {
        h[k] = pack<T>(H[2 * k], H[2 * k + 1]);
        H[2 * k] *= decay;
        H[2 * k + 1] *= decay;
      }
      wait_for(shared.has_BC(stage), parity(i, kStages));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kN / 16; ++k)
        wgmma<T, false>(Y, h + 4 * k, k_major_step(k_major(shared.C(stage)), k, kTile), k > 0);
      wgmma_commit();
      if (!kGradient && chunk > piece.begin) store_y(chunk - 1, i - 1);
      wait_for(shared.has_X(stage), parity(i, kStages));
      turn(x, shared.X(stage, which) + row);
      weigh<T>(x, steps.weight, t);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma<T, true>(H, x[k], mn_major_step(mn_major(shared.B(stage), kTile), k), true);
      wgmma_commit();
      if (kGradient && first_thread) {
        wait_stores_read<0>();
        load_z(chunk, i);
      }
      float from_start[16];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        reinterpret_cast<float4*>(from_start)[k] =
            reinterpret_cast<const float4*>(steps.from_start)[6 * t + k];
      wait_for(shared.has_P(i, which), parity(i, 4));
      wgmma_wait<1>();
#pragma unroll
      for (int k = 0; k < 32; ++k) Y[k] *= from_start[k / 4 * 2 + k % 2];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma<T, true, false>(Y, mn_major_step(mn_major(shared.X(stage, which), 0), k),
                              k_major_step(k_major(shared.P(i, which)), k, 0), true);
      wgmma_commit();
      if (!kGradient && first_thread) {
        wait_stores_read<0>();
        if (args.z && chunk + 1 < piece.end) load_z(chunk + 1, i + 1);
      }
      wgmma_wait<0>();
      if (args.D_per_channel) [[unlikely]]
        add_skip<T>(Y, shared.X(stage, which) + row, D);
      if constexpr (kGradient) turn(x, shared.X(stage, which) + row);
      arrive(shared.done(i, which));
      const uint32_t y = shared.Y(i, which) + row;
      if (gated) wait_for(shared.has_z(i, which), parity(i, 2));
      if constexpr (kGradient) {
        if (active) {
          float dD[2];
          pass_gate<T>(Y, x, y, shared.Y(i + 1, which) + row, dD);
          const int64_t chunks_before = (int64_t(pair.row) * args.h + head) * args.plan.chunks;
          if (args.skips) store_skips(args, chunks_before + chunk, dD, warp, lane);
        }
        store_y(chunk, i);
      } else {
        if (gated) apply_gate<T>(Y, y);
        write_y<T>(Y, y);
      }
    }
    if (!kGradient) store_y(piece.end - 1, i - 1);
    if (first_thread) wait_stores_read<0>();
    leave<kN>(H, args, piece, pair.row, slab, index, which, active);
  }
}

// A block; `number`: set by thread 0, what others wait for it by. Each half has a copy of `shared`: an
// address in common would be spilled.
template <class T, class Dt, int kN, bool kPacked, class MapsOf>
__device__ void run_block(const MapsOf& maps, const FwdArgs& args, uint8_t* memory, const int& number) {
  const Shared<kN> shared(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  uint4* P = reinterpret_cast<uint4*>(shared.bytes + Shared<kN>::kP);
  for (int k = threadIdx.x; k < 4 * kTile / 16; k += 512) P[k] = make_uint4(0, 0, 0, 0);
  fence_async_proxy();
  __syncthreads();
  const bool invalid = kPacked && is_invalid_pack(args.seqs, args.l);
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / 128, 0), index = number;
  const BlockPieces pieces(args.plan, index);
  if (warpgroup >= 2) {
    give_registers<kN == 64 ? 104 : 80>();
    help<T, Dt, kN, kPacked>(maps, args, pieces, Shared<kN>(memory), warpgroup - 2, invalid);
  } else {
    take_registers<kN == 64 ? 152 : 176>();
    scan_slab<T, kN>(maps, args, pieces, Shared<kN>(memory), index, warpgroup);
  }
}

}  // namespace mamba_ops::gpu::sm90::forward

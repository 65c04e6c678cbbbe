// Chains of the tuned backward of the selective scan: how its work is cut, its scratch memory, and how blocks
// pass on what goes from piece to piece.
#pragma once
#include "kernels/cuda/selective_scan_tuned_factors.cuh"

namespace mamba_ops::gpu {

inline constexpr int kBwdWarps = 6, kBwdBlocks = 2;             // of a block; blocks of a multiprocessor
inline constexpr int kBwdChannels = kBwdWarps * kWarpChannels;  // of a block
inline constexpr int kGroupSums = 2 * kGroup * kTunedState;     // dB and dC of a group

// A chain is a row of a block's channels. It is cut into pieces, whole numbers of windows of 64 tokens.
struct BwdCut {
  int64_t piece_tokens;
  int pieces;                        // of a chain
  int portion;                       // pieces of a chain in one launch
  int turns;                         // blocks that take a chain's pieces, of one window then, in turn; or 1
  int channel_blocks, share_blocks;  // a share: channels with the same B and C
  int share;                         // channels

  __host__ __device__ int chains(const ScanDims& dims) const { return int(dims.b) * channel_blocks; }
};

// A float, and how many pieces of its chain have passed it on: one word, so that it needs no fence.
using Passed = uint64_t;
inline constexpr int kTotals = 8;  // of a lane: dA of its four states, dD and ddelta_bias of its two channels

// Scratch memory.
struct BwdWork {
  Passed* carry;   // (chains, warps, 4, lanes): the state gradient that enters a piece on its right
  Passed* totals;  // (chains, warps, kTotals, lanes): what the pieces on the right add up to
  float* sums_A;   // (b, d, n)
  float* sums_d;   // (b, 2, d): dD, ddelta_bias
  float* sums_BC;  // (channel blocks, b, portion, groups of a piece, kGroupSums)
  int* taken;      // (launches, chains or 1): pieces that blocks have taken
  int counters;    // of them

  __device__ int64_t group_sums(const BwdCut& cut, int64_t b, int block, int64_t row, int piece,
                                int group) const {
    const int64_t groups = cut.piece_tokens / kGroup;
    return (((block * b + row) * cut.portion + piece % cut.portion) * groups + group) * kGroupSums;
  }
};

// Which channels a block and its warps have.
struct BwdPlace {
  int block;
  int64_t row;
  int64_t first;  // channel of the warp
  int channels;   // of the warp, 0 to 8

  __device__ BwdPlace(const ScanDims& dims, const BwdCut& cut, int chain, int warp) {
    block = chain % cut.channel_blocks;
    row = chain / cut.channel_blocks;
    const int64_t share = int64_t(block / cut.share_blocks) * cut.share;
    first = share + block % cut.share_blocks * kBwdChannels + warp * kWarpChannels;
    channels = int(std::max<int64_t>(std::min<int64_t>(share + cut.share - first, kWarpChannels), 0));
    if (channels == 0) first = share;
  }
};

// A lane's values, as `count` pieces have passed them on: waits for that.
template <int N>
__device__ void await(float (&values)[N], const Passed* from, int count) {
  for (bool there = false; !there;) {
    there = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Passed v;
      asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(from + i * kWarp) : "memory");
      values[i] = __uint_as_float(uint32_t(v));
      there &= int(v >> 32) == count;
    }
    there = __all_sync(kAllLanes, there);
    if (!there) __nanosleep(50);
  }
}
template <int N>
__device__ void pass_on(const float (&values)[N], Passed* to, int count) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to + i * kWarp),
                 "l"(Passed(count) << 32 | __float_as_uint(values[i]))
                 : "memory");
}

// The end of a chain: m is its state gradient.
template <class T>
__device__ void put_totals(const ScanBwd& params, const BwdWork& work, const BwdPlace& at,
                           float (&totals)[kTotals], const float (&m)[4]) {
  const int64_t d = params.fwd.dims.d;
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const bool live = 2 * q < at.channels;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int i = 4 + c; i < kTotals; i += 2)
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2)
        totals[i] += __shfl_xor_sync(kAllLanes, totals[i], lanes);
    if (!live) continue;
    const int64_t channel = at.row * d + at.first + 2 * q + c;
    const auto put = [&](void* states, float2 v) {
      reinterpret_cast<float2*>(static_cast<float*>(states) + channel * kTunedState)[g] = v;
    };
    put(work.sums_A, {kFromLog2 * totals[2 * c], kFromLog2 * totals[2 * c + 1]});
    if (params.dstates_in) put(params.dstates_in, {m[2 * c], m[2 * c + 1]});
    if (g != 0) continue;
    float* const to = work.sums_d + at.row * d + channel;
    to[0] = totals[4 + c] * (1 / kOperandScale<T>);
    to[d] = totals[6 + c];
  }
}

}  // namespace mamba_ops::gpu

// How the Hopper forward of the SSD is cut and what its kernels share: parameters, the pieces of a block, the
// steps of a chunk.
//
// A slab is 64 channels of a head (p < 64: the rest is zero); two slabs that share B and C are a pair, a pair
// in one batch row is a chain of chunks of kQ tokens. A pair of one slab computes the other for nothing.
#pragma once
#include "kernels/cuda/halves.cuh"
#include "kernels/cuda/sm90/hand_over.cuh"
#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/ssd_steps.cuh"
#include "kernels/ssd.h"

namespace mamba_ops::gpu::sm90::forward {

constexpr int kQ = 64;
constexpr int kTile = kQ * 128;  // bytes of 64 x 64 values
constexpr float kLog2E = float(kLog2e), kLn2 = float(1 / kLog2e);

// How chains are dealt to blocks.
//   segments = 1  blocks <= chains: no chain is cut more than once. The block before hands the state over.
//   segments > 1  blocks = segments * chains: a block owns one segment of one chain. What enters it follows
//                 from the ends of `parts` parts of every segment before, made by a pass of their own, or
//                 (makes_ends) by the blocks themselves, of whole segments, before they begin.
struct Plan : Cut {
  int segments, parts;
  bool makes_ends;

  __host__ __device__ bool hands_over() const { return segments == 1 && cuts_chains(); }
  // Whether blocks wait for others: then they have a ticket and a flag for each block and slab.
  __host__ __device__ bool waits() const { return makes_ends || hands_over(); }
  __host__ __device__ int64_t flag_bytes() const { return (1 + 2 * int64_t(blocks)) * int64_t(sizeof(int)); }
  __host__ __device__ int ends() const { return (segments - 1) * parts; }  // of a chain
  __host__ __device__ int segment_begin(int segment) const {
    return int(int64_t(chunks) * segment / segments);
  }
  __host__ __device__ int part_begin(int part) const {
    const int segment = part / parts, begin = segment_begin(segment);
    return begin + int(int64_t(segment_begin(segment + 1) - begin) * (part % parts) / parts);
  }
};

struct FwdArgs {
  int l, h, p, n;
  int slabs;                     // of a head
  int share, pairs_of_share;     // slabs that share B and C; pairs made of them
  int pairs;                     // of a batch row
  int heads_per_B, heads_per_C;  // heads that read one group
  bool softplus, D_per_channel, z;
  float dt_min, dt_max;
  View dt, A, dt_bias, D;
  Sequences seqs;
  const float* states_in;  // (b, h, p, n)
  float* states_out;
  Plan plan;
  int* ticket;    // blocks taken so far; then a flag per block and slab: its state, its end is there
  float* handed;  // (blocks, 2, 64 kN): fragments of states
  float* ends;    // (chains, ends, 2, 64 kN): of parts run from zero
  float* decays;  // (chains, ends, 2)
  float* skips;   // of gradients: (b, h, chunks, 4), of D per channel (b, h, chunks, 64); null without D

  // By one thread of a block.
  __device__ int take_number() const { return plan.waits() ? atomicAdd(ticket, 1) : int(blockIdx.x); }
};

struct Maps {
  CUtensorMap x, B, C, z, y;  // x, z, y: (p, l, slab, h, b); B, C: (n, l, g, b)
};

struct Pair {
  int row, slab, count;  // batch row; first of `count` slabs, numbered over all heads
  int head, part;        // of the first slab
  int group_B, group_C;

  __device__ Pair(const FwdArgs& args, int chain) {
    row = chain / args.pairs;
    const int pair = chain % args.pairs, first = pair % args.pairs_of_share * 2;
    slab = pair / args.pairs_of_share * args.share + first;
    count = min(2, args.share - first);
    head = slab / args.slabs;
    part = slab % args.slabs;
    group_B = head / args.heads_per_B;
    group_C = head / args.heads_per_C;
  }
  // The head of slab number `which`; of the first where there is no second.
  __device__ int head_of(const FwdArgs& args, int which) const {
    return which < count ? (slab + which) / args.slabs : head;
  }
};

// The phase of use number i of a ring of so many barriers.
__device__ inline uint32_t parity(uint32_t i, uint32_t ring) { return i / ring % 2; }

// ---- steps

// To 5e-6 of its value, without branches (volatile: the compiler would make some).
__device__ inline float softplus_fast(float v) {
  float log2;
  const float e = exp2_of(v * kLog2E);
  asm volatile("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(1 + e));
  const float series = e * (1 - e * (0.5f - e * (0.333333333f - e * 0.25f)));
  const float log = e < 0.03f ? series : log2 * kLn2;
  return v > 20 ? v : log;
}

// What a head does to its steps. With invalid offsets they are not numbers, nor is what comes of them.
struct HeadRates {
  float A, bias, D;  // A log2(e); D where it is one per head

  __device__ HeadRates(const FwdArgs& args, int head, bool invalid) {
    const auto load = [&](const View& v) { return v.data ? load_one<float>(v, head * v.stride[0]) : 0.f; };
    A = load(args.A) * kLog2E;
    bias = invalid ? __int_as_float(0x7fc00000) : load(args.dt_bias);
    D = args.D_per_channel ? 0.f : load(args.D);
  }
};

// Two tokens a lane, read one chunk before they are needed; beyond the row nothing is read.
template <class Dt>
struct StepReader {
  int lane;
  const Dt* at;
  Dt raw[2];

  __device__ void aim(const FwdArgs& args, int row, int head, int chunk) {
    const View& dt = args.dt;
    const int64_t token = int64_t(chunk) * kQ + 2 * lane;
    at = static_cast<const Dt*>(dt.data) + row * dt.stride[0] + token * dt.stride[1] + head * dt.stride[2];
  }
  __device__ void skip(const FwdArgs& args, int chunks) { at += args.dt.stride[1] * (kQ * chunks); }
  __device__ void read(const FwdArgs& args, int chunk) {
    const int left = args.l - chunk * kQ - 2 * lane;  // tokens of the row, from `at` on
    if (left > 0) raw[0] = at[0];
    if (left > 1) raw[1] = at[args.dt.stride[1]];
  }
  // Asks for a chunk to be brought to L2, `chunks` on from where the reader stands.
  __device__ void ask(const FwdArgs& args, int chunk, int chunks) const {
    const int left = args.l - chunk * kQ - 2 * lane;
    const Dt* const there = at + args.dt.stride[1] * (kQ * chunks);
    if (left > 0) ask_for(there);
    if (left > 1) ask_for(there + args.dt.stride[1]);
  }
  // What was read, through bias, softplus and limits.
  __device__ void steps(const FwdArgs& args, float bias, float (&v)[2]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) v[k] = to_real(raw[k]) + bias;
    if (args.softplus)
#pragma unroll
      for (int k = 0; k < 2; ++k) v[k] = softplus_fast(v[k]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      v[k] = v[k] < args.dt_min ? args.dt_min : v[k];
      v[k] = v[k] > args.dt_max ? args.dt_max : v[k];
    }
  }
};

// Tokens 2 lane and 2 lane + 1 of a chunk, over a warp. kPacked: runs may begin within the row.
template <bool kPacked>
struct LaneSteps {
  int lane;
  float dt[2];
  float s[2];    // cumsum of dt A in the chunk, in powers of two
  float total;   // s of the last token
  int start[2];  // the last token at or before this one at which a run begins; -1: none in this chunk
  int last_start;

  template <class Dt>
  __device__ LaneSteps(const FwdArgs& args, const StepReader<Dt>& reader, const HeadRates& head, int chain,
                       int chunk) {
    lane = reader.lane;
    const int first = chunk * kQ + 2 * lane;
    reader.steps(args, head.bias, dt);
#pragma unroll
    for (int k = 0; k < 2; ++k) dt[k] = first + k < args.l ? dt[k] : 0.f;
    const float a = dt[0] * head.A, both = a + dt[1] * head.A, sum = inclusive_sum(both, lane);
    s[0] = sum - both + a;
    s[1] = sum;
    total = __shfl_sync(kAllLanes, sum, 31);
    if constexpr (kPacked) find_starts(args, chain / args.pairs, first);
  }
  __device__ float decay() const { return kPacked && last_start >= 0 ? 0.f : exp2_of(total); }
  // Pairs e^{T - s_j} dt_j, where nothing begins after j, times `factor`.
  template <class T>
  __device__ SplitPair weights(float factor) const {
    float w[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      w[k] = exp2_of(total - s[k]) * dt[k] * factor;
      if (kPacked && last_start > 2 * lane + k) w[k] = 0.f;
    }
    return split<T>(w[0], w[1]);
  }

 private:
  __device__ void find_starts(const FwdArgs& args, int row, int first) {
    bool begin[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      begin[k] = first + k > 0 && first + k < args.l && begins(args.seqs, row, first + k);
    const unsigned even = __ballot_sync(kAllLanes, begin[0]), odd = __ballot_sync(kAllLanes, begin[1]);
    const unsigned below = (1u << lane) - 1;
    start[0] = max(2 * last_bit(even & (below | 1u << lane)), 2 * last_bit(odd & below) + 1);
    start[1] = begin[1] ? 2 * lane + 1 : start[0];
    last_start = __shfl_sync(kAllLanes, start[1], 31);
  }
  __device__ static int last_bit(unsigned bits) { return 31 - __clz(bits); }
};

// Where a lane's pair of values lies in a table of a chunk: the 8 pairs that lanes t of a quad need are
// neighbours, from 12 t on.
__device__ inline uint32_t pair_at(uint32_t lane) { return lane % 4 * 12 + lane / 4; }

__device__ inline float channel_D(const FwdArgs& args, int head, int p) {
  if (!args.D_per_channel || p >= args.p) return 0.f;
  return load_one<float>(args.D, head * args.D.stride[0] + p * args.D.stride[1]);
}

// Tiles (64 tokens, 64 channels) of x, z, y and fragments of their transpose: the 16 channels of a warp are
// rows, word r of step k the pair of tokens 16 k + 8 (r / 2) + 2 t, + 1 at row g + 8 (r % 2). Where a lane's
// row for ldmatrix, stmatrix lies from the tile on, before 2048 k.
__device__ inline uint32_t turned_row() {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  return (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
}
__device__ inline void turn(uint32_t (&a)[4][4], uint32_t row) {
#pragma unroll
  for (int k = 0; k < 4; ++k) ldmatrix<true>(a[k], row + 2048 * k);
}
// Makes (X o w)^T of X^T; t = lane % 4. Rounded once: a weight of 16 bits would err as much again.
template <class T>
__device__ inline void weigh(uint32_t (&a)[4][4], const SplitPair* weights, int t) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint4 w = reinterpret_cast<const uint4*>(weights)[6 * t + k];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      a[k][r] = multiply_add_halves<T>(a[k][r], w.x, multiply_halves<T>(a[k][r], w.y));
      a[k][2 + r] = multiply_add_halves<T>(a[k][2 + r], w.z, multiply_halves<T>(a[k][2 + r], w.w));
    }
  }
}

// ---- states in fragments

// f(offset, H[i]) for the neighbours H[i], H[i + 1] at that offset of a slab's states (p, n).
template <int kSize, class F>
__device__ inline void each_state_pair(const FwdArgs& args, int part, float (&H)[kSize], F f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int i = 0; i < kSize; i += 2) {
    const int row = part * 64 + 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
    if (row < args.p && column < args.n) f(int64_t(row) * args.n + column, H[i], H[i + 1]);
  }
}

}  // namespace mamba_ops::gpu::sm90::forward

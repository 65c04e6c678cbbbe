// Chains of chunks, walked with a state, that are cut between blocks; and the state in the accumulators of a
// warpgroup that goes to another block, through device memory: a fragment after the other, a flag beside
// them. Flags are 0 before the kernel starts.
//
// Blocks number themselves by a ticket when they start, so that a block waits for such alone as run already,
// and each raises its flag before it waits for one. So every wait ends, however few blocks fit on the GPU at
// once, and in whatever order they start.
#pragma once
#include "kernels/cuda/sm90/ptx.cuh"

namespace mamba_ops::gpu::sm90 {

// Block i of `blocks` owns chunks [total i / blocks, total (i + 1) / blocks) of all chains in a row.
struct Cut {
  int chunks, chains, blocks;  // chunks of a chain

  __host__ __device__ bool cuts_chains() const { return chains % blocks != 0; }
};

// A stretch of chunks of one chain.
struct ChainPiece {
  int chain, begin, end;
};

// The pieces of block `index`, the last chain first: what another block waits for is made before this one
// waits. The first is there `again` times more.
struct BlockPieces {
  const Cut& cut;
  int index, again, count;

  __device__ BlockPieces(const Cut& cut, int index, int again = 0) : cut(cut), index(index), again(again) {
    count = again + chain_before(index + 1) - int(first_chunk(index) / cut.chunks) + 1;
  }
  __device__ ChainPiece operator[](int i) const {
    const int chain = chain_before(index + 1) - max(i - again, 0);
    const int64_t chunk = int64_t(chain) * cut.chunks;
    return {chain, int(max(first_chunk(index) - chunk, int64_t(0))),
            int(min(first_chunk(index + 1) - chunk, int64_t(cut.chunks)))};
  }

 private:
  __device__ int64_t first_chunk(int block) const {
    return int64_t(cut.chains) * cut.chunks * block / cut.blocks;
  }
  __device__ int chain_before(int block) const { return int((first_chunk(block) - 1) / cut.chunks); }
};

// A walk over the chunks of a block.
struct Walk {
  const BlockPieces& pieces;
  int piece = -1, chain = 0, chunk = 0, end = 0;

  __device__ Walk(const BlockPieces& pieces, int start) : pieces(pieces) { skip(start); }
  __device__ bool valid() const { return piece < pieces.count; }
  __device__ void skip(int count) {
    chunk += count;
    while (chunk >= end && ++piece < pieces.count) {
      const ChainPiece one = pieces[piece];
      chunk += one.begin - end;
      chain = one.chain;
      end = one.end;
    }
  }
};

template <int kSize>
__device__ inline void store_fragment(float* to, const float (&H)[kSize]) {
#pragma unroll
  for (int k = 0; k < kSize / 4; ++k)
    __stcg(reinterpret_cast<float4*>(to) + k * 128 + threadIdx.x % 128,
           make_float4(H[4 * k], H[4 * k + 1], H[4 * k + 2], H[4 * k + 3]));
}
// H = decay H + what was stored.
template <int kSize>
__device__ inline void add_fragment(float (&H)[kSize], float decay, const float* from) {
#pragma unroll
  for (int k = 0; k < kSize / 4; ++k) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(from) + k * 128 + threadIdx.x % 128);
    H[4 * k] = H[4 * k] * decay + v.x;
    H[4 * k + 1] = H[4 * k + 1] * decay + v.y;
    H[4 * k + 2] = H[4 * k + 2] * decay + v.z;
    H[4 * k + 3] = H[4 * k + 3] * decay + v.w;
  }
}

// By the whole warpgroup, with a named barrier of its own: what its threads stored is there.
__device__ inline void raise_flag(int* flag, int barrier) {
  __threadfence();
  sync_threads<128>(barrier);
  if (threadIdx.x % 128 == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ inline void wait_for_flag(const int* flag, int barrier) {
  if (threadIdx.x % 128 == 0) {
    int raised;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    while (!raised);
  }
  sync_threads<128>(barrier);
}

}  // namespace mamba_ops::gpu::sm90

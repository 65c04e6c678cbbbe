// What stands around the products of mamba2_step.cu: values that go from block to block, and the ring through
// which a block's share of the weights comes.
#pragma once
#include "kernels/cuda/halves.cuh"
#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/mamba2_step.h"

namespace mamba_ops::gpu::sm90::step {

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // of the consumers
constexpr int kMaxSlots = 64;
constexpr int kInFlight = 40 << 10;
constexpr int kPack = 8;  // values of 16 bytes
constexpr int kChunk = 32 * kPack;
constexpr int kMaxWidth = 2560;
constexpr int kPairs = kMaxWidth / 2 / kThreads;  // of s, that a thread has
constexpr int kTaps = 4;

// ---- Between blocks

constexpr int kLine = 32;  // words of 128 bytes

struct Scratch {
  unsigned arrived;
  alignas(4 * kLine) uint32_t words[];  // u, y, o
};

// A value for other blocks, tag: the layer's number in the upper half.
__device__ inline void give(uint32_t* to, bf16 value, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(tag | value.bits) : "memory");
}

// kN values of other blocks.
template <int kN>
struct Taken {
  uint32_t word[kN];

  __device__ void load(const uint32_t* from) {
    if constexpr (kN == 1)
      asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word[0]) : "l"(from) : "memory");
    else if constexpr (kN == 2)
      asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
                   : "=r"(word[0]), "=r"(word[1])
                   : "l"(from)
                   : "memory");
    else
      asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                   : "l"(from)
                   : "memory");
  }
  // Not 0: another layer's.
  __device__ uint32_t stale(uint32_t tag) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) bits |= word[i] ^ tag;
    return bits & 0xffff0000u;
  }
  __device__ float at(int i) const { return __uint_as_float(word[i] << 16); }
};

// Returns when `target` blocks have come.
__device__ inline void meet(unsigned* arrived, unsigned target) {
  sync_threads<kThreads>(1);
  if (threadIdx.x == 0) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    unsigned seen;
    do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    while (seen < target);
  }
  sync_threads<kThreads>(1);
}

// ---- The stream of weights

struct Ring {
  char* data;
  uint32_t full, empty;  // barriers of each slot
  int slots, bytes;      // of a slot: 4 d
};

// The place of a unit in the ring, and how often the ring has come round.
struct Place {
  int slot = 0, round = 0;

  __device__ void move(const Ring& ring, int by) {
    for (slot += by; slot >= ring.slots; slot -= ring.slots) ++round;
  }
};

struct Units {
  int in, out;  // of the block, in a layer
};

// One thread.
__device__ inline void copy_weights(const Mamba2Step& p, const Mamba2Step::Layer* layers, const Ring& ring,
                                    const Units& units) {
  const int rows_in = int(p.rows_in()), most = max(kInFlight / ring.bytes, 2);
  Place next, oldest;
  int in_flight = 0;
  for (int matrix = 0; matrix < 2 * p.layers; ++matrix) {
    const bool is_out = matrix % 2;
    const auto& layer = layers[matrix / 2];
    const auto* const weight = static_cast<const char*>(is_out ? layer.out_proj : layer.in_proj);
    for (int i = 0; i < (is_out ? units.out : units.in); ++i) {
      if (next.round > 0) wait_for(ring.empty + 8 * next.slot, (next.round - 1) & 1);
      for (++in_flight; in_flight > (is_out ? most / 2 : most); --in_flight) {
        wait_for(ring.full + 8 * oldest.slot, oldest.round & 1);
        oldest.move(ring, 1);
      }
      const int unit = i * int(gridDim.x) + int(blockIdx.x);
      const int bytes = !is_out && 2 * unit + 1 == rows_in ? ring.bytes / 2 : ring.bytes;
      const uint32_t full = ring.full + 8 * next.slot;
      arrive_and_expect(full, bytes);
      bulk_load_once(shared_address(ring.data + next.slot * ring.bytes), weight + int64_t(unit) * ring.bytes,
                     bytes, full);
      next.move(ring, 1);
    }
  }
}

}  // namespace mamba_ops::gpu::sm90::step

// Hopper's own instructions (sm_90a): barriers in shared memory, tensor copies by the copy engine (TMA),
// matrix products of a warpgroup (wgmma), stmatrix, register hand-over. Thin wrappers, one instruction each.
//
// Shared memory is named by its 32-bit address. Tiles of 16-bit values have rows of 64 values (128 bytes) and
// lie as the copy engine writes them with CU_TENSOR_MAP_SWIZZLE_128B: the tile begins at a multiple of 1024
// bytes, and the 16-byte piece c of row r lies at r * 128 + (c ^ r % 8) * 16. Tensors with wider rows are
// several such tiles (slabs) of 64 columns.
//
// wgmma reads a factor from such tiles in either order:
//   K-major   a row of the tile is a row of the factor, k runs along the row. 16 values of k: + 32 bytes,
//             from slab to slab where K > 64.
//   MN-major  a row of the tile is one k, the factor's rows run along it. 16 values of k: + 2048 bytes. More
//             than 64 rows of the factor: slabs `slab` bytes apart.
// Fragments in registers, thread lane = 4 g + t of warp w: accumulators d[4 c + 2 r + e] are row 16 w + g + 8
// r, column 8 c + 2 t + e; a factor A of 16 values of k is 4 words, a[2 c + r] the pair (row 16 w + g + 8 r,
// columns 8 c + 2 t, + 1). So accumulators packed in pairs are fragments of A: no shuffles.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "kernels/view.h"

namespace mamba_ops::gpu::sm90 {

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- barriers

// A barrier's phases are numbered from 0; a phase ends when `count` threads arrived and the bytes announced
// to it were copied. wait_for(parity) returns once the phase of that parity has ended; before the first phase
// ends, parity 1 counts as ended.

__device__ inline void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes the initialised barriers visible to the copy engine; __syncthreads() follows.
__device__ inline void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void wait_for(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

// Whether the phase has ended, without a wait.
__device__ inline bool has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended;
}

// Barrier number `id`, 1 to 15, among kThreads threads.
template <int kThreads>
__device__ inline void sync_threads(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Ordinary writes to shared memory by this thread come before later accesses by wgmma and the copy engine.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor copies

// One thread starts a copy of the box at these coordinates, first dimension first. Outside the tensor, loads
// give zeros (all bytes count) and stores nothing.

__device__ inline void tma_load(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2,
                                int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ inline void tma_load(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2,
                                int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6, %7}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// The box will be loaded: into L2.
__device__ inline void tma_prefetch(const CUtensorMap& map, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(&map),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
__device__ inline void tma_store(const CUtensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ inline void tma_store(const CUtensorMap& map, uint32_t from, int c0, int c1, int c2, int c3,
                                 int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// The same for `bytes` consecutive bytes, a multiple of 16, both ends aligned to 16.
__device__ inline void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Of bytes that are read once: the first that L2 drops.
__device__ inline void bulk_load_once(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  constexpr uint64_t kEvictFirst = 0x12F0000000000000;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}
__device__ inline void bulk_store(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
// This thread's stores so far are one group; groups are waited for by the thread that committed them.
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but the last kPending groups have read their shared memory / are complete.
template <int kPending>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ inline void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrix products of a warpgroup

// Between registers written by other instructions and the next wgmma: wgmma_fence. Products run until a
// wgmma_wait; their registers may not be touched before.

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptors of tiles: bits 0-13 address, 16-29 leading and 32-45 stride offset, all in 16 bytes; bits 62-63
// = 1: 128-byte swizzle. The stride offset leads from 8 rows of a tile to the next 8.
__device__ inline uint64_t tile_descriptor(uint32_t address, uint32_t leading) {
  return 1ull << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(leading >> 4) << 16 | (address >> 4 & 0x3fff);
}
__device__ inline uint64_t k_major(uint32_t tile) { return tile_descriptor(tile, 16); }
__device__ inline uint64_t mn_major(uint32_t tile, uint32_t slab) { return tile_descriptor(tile, slab); }
// The descriptor of the same factor, so many bytes on.
__device__ inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }
// Step number k of 16 values, slabs (or nothing) `slab` bytes apart.
__device__ inline uint64_t k_major_step(uint64_t descriptor, int k, int slab) {
  return advance(descriptor, k / 4 * slab + k % 4 * 32);
}
__device__ inline uint64_t mn_major_step(uint64_t descriptor, int k) { return advance(descriptor, k * 2048); }

// clang-format off
#define MAMBA_ACC8(d, i) "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3]), \
                         "+f"((d)[i + 4]), "+f"((d)[i + 5]), "+f"((d)[i + 6]), "+f"((d)[i + 7])
#define MAMBA_ACC32(d, i) MAMBA_ACC8(d, i), MAMBA_ACC8(d, i + 8), MAMBA_ACC8(d, i + 16), MAMBA_ACC8(d, i + 24)
#define MAMBA_REGS32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
                     "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MAMBA_REGS64 MAMBA_REGS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
                     "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MAMBA_WGMMA(shape, type, on) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " on ", 0;\nwgmma.mma_async.sync.aligned." shape "k16.f32." type "." type " "
// clang-format on

// D (64 x 64) = A B^T + (accumulate ? D : 0) over 16 values of k; A (64 x 16) and B (64 x 16) from shared
// memory, K-major or MN-major (kTurned), T = bf16 or f16.
template <class T, bool kTurnedA, bool kTurnedB>
__device__ inline void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
#define MAMBA_PRODUCT(type)                                                                             \
  asm volatile(MAMBA_WGMMA("m64n64", type, "%34") "{" MAMBA_REGS32 "}, %32, %33, p, 1, 1, %35, %36;\n}" \
               : MAMBA_ACC32(d, 0)                                                                      \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTurnedA)), "n"(int(kTurnedB)))
  if constexpr (std::is_same_v<T, bf16>)
    MAMBA_PRODUCT("bf16");
  else
    MAMBA_PRODUCT("f16");
#undef MAMBA_PRODUCT
}
// The same with B (128 x 16): D is 64 x 128.
template <class T, bool kTurnedA, bool kTurnedB>
__device__ inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
#define MAMBA_PRODUCT(type)                                                                              \
  asm volatile(MAMBA_WGMMA("m64n128", type, "%66") "{" MAMBA_REGS64 "}, %64, %65, p, 1, 1, %67, %68;\n}" \
               : MAMBA_ACC32(d, 0), MAMBA_ACC32(d, 32)                                                   \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTurnedA)), "n"(int(kTurnedB)))
  if constexpr (std::is_same_v<T, bf16>)
    MAMBA_PRODUCT("bf16");
  else
    MAMBA_PRODUCT("f16");
#undef MAMBA_PRODUCT
}
// The same with A in registers: a[0] to a[3].
template <class T, bool kTurnedB>
__device__ inline void wgmma(float (&d)[32], const uint32_t* a, uint64_t b, bool accumulate) {
#define MAMBA_PRODUCT(type)                                                                                \
  asm volatile(                                                                                            \
      MAMBA_WGMMA("m64n64", type, "%37") "{" MAMBA_REGS32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}" \
      : MAMBA_ACC32(d, 0)                                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kTurnedB)))
  if constexpr (std::is_same_v<T, bf16>)
    MAMBA_PRODUCT("bf16");
  else
    MAMBA_PRODUCT("f16");
#undef MAMBA_PRODUCT
}
template <class T, bool kTurnedB>
__device__ inline void wgmma(float (&d)[64], const uint32_t* a, uint64_t b, bool accumulate) {
#define MAMBA_PRODUCT(type)                                                                                 \
  asm volatile(                                                                                             \
      MAMBA_WGMMA("m64n128", type, "%69") "{" MAMBA_REGS64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}" \
      : MAMBA_ACC32(d, 0), MAMBA_ACC32(d, 32)                                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kTurnedB)))
  if constexpr (std::is_same_v<T, bf16>)
    MAMBA_PRODUCT("bf16");
  else
    MAMBA_PRODUCT("f16");
#undef MAMBA_PRODUCT
}

// ---- matrices of 8 x 8 pairs between registers and shared memory

// Lane i gives the address of row i % 8 of matrix i / 8. Turned: a lane's word holds two neighbours of a
// column instead of a row. Ordinary loads may move across stmatrix, up to the next fence or barrier.

template <bool kTurned>
__device__ inline void stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if constexpr (kTurned)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(a), "r"(b), "r"(c), "r"(d));
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d));
}

template <bool kTurned>
__device__ inline void ldmatrix(uint32_t (&to)[4], uint32_t address) {
  if constexpr (kTurned)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// ---- registers

// A value of which the compiler knows nothing but its register. What is cheap to name but slow to get, as
// threadIdx.x is, is not got again wherever it is used; and where registers are short, what is made of the
// value is made there, not before the loop and kept.
template <class I>
__device__ inline I kept(I value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A warpgroup gives registers back, or takes some: then threads x registers over the block stay within what
// it was launched with, and the kernel has __launch_bounds__(threads, 1).
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace mamba_ops::gpu::sm90

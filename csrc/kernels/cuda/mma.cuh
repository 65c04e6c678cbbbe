// Instructions of sm_80 for products of tiles: asynchronous copies into shared memory, matrix loads,
// mma.sync.
#pragma once
#include "kernels/cuda/halves.cuh"

namespace mamba_ops::gpu {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts copying 16 bytes into shared memory, both aligned to 16; zeros where they are not wanted, and then
// `from` is not read.
__device__ inline void copy_async(void* to, const void* from, bool wanted) {
  asm volatile(
      "{.reg .pred ignored; setp.eq.s32 ignored, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, "
      "ignored;}" ::"r"(shared_address(to)),
      "l"(from), "r"(int(wanted)));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits for this thread's copies, but for the last kPending groups. A barrier shows them to other threads.
template <int kPending = 0>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8. Lane 4 r + c
// gets elements 2 c, 2 c + 1 of row r (transposed: of column r) of each.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// An 8 x 8 matrix of 16-bit values, held as ldmatrix gives it: transposed.
__device__ inline uint32_t turn_matrix(uint32_t row) {
  uint32_t turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(row));
  return turned;
}

// Four lanes beside each other hold four words each: word k of lane i becomes word i of lane k.
__device__ inline void turn_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int apart = 1; apart <= 2; apart *= 2) {
    const bool upper = threadIdx.x & apart;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k & apart) continue;
      const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? word[k] : word[k + apart], apart);
      word[k] = upper ? other : word[k];
      word[k + apart] = upper ? word[k + apart] : other;
    }
  }
}

// c += a b. Lane 4 r + q holds of c rows r (c[0], c[1]) and r + 8 (c[2], c[3]), columns 2 q, 2 q + 1.

// (16 x 16) (16 x 8): a[0], a[1] rows r, r + 8 of k = 2 q, 2 q + 1; a[2], a[3] of k + 8. b[0], b[1]: column
// r.
template <class E>
__device__ inline void mma_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define MAMBA_MMA(TYPE)                                      \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE \
      ".f32 {%0, %1, %2, %3}, "                              \
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<E, bf16>)
    MAMBA_MMA("bf16");
  else
    MAMBA_MMA("f16");
#undef MAMBA_MMA
}
// (16 x 8) (8 x 8), the upper 19 bits of float32: a0, a1 rows r, r + 8 of k = q; a2, a3 of k = q + 4. b0, b1:
// k = q, q + 4 of column r.
__device__ inline void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// (8 x 4) (4 x 8): a row r, k = q; b k = q, column r; c0, c1 row r, columns 2 q, 2 q + 1.
__device__ inline void mma_f64(double& c0, double& c1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c0), "+d"(c1)
      : "d"(a), "d"(b));
}

}  // namespace mamba_ops::gpu

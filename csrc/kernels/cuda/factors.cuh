// Products of tiles in shared memory, for three types of factors: bfloat16, float32 (each value split into
// two of TF32, three products: float32 accuracy), float64. Sums in float32, or float64.
//
// A left factor is 16 rows x 16 terms, a right one 16 terms x 8 columns. Lane 4 r + q holds the terms
// 2 q, 2 q + 1, 2 q + 8, 2 q + 9: of rows r and r + 8 on the left, of column r on the right; of a sum (16 x
// 8) it holds rows r, r + 8 (sum[0, 1], sum[2, 3]) of columns 2 q, 2 q + 1. So two neighbouring sums are a
// left factor as they are.
//
// A tile holds a factor along its terms, or across them ("turned"): element (term, column) at
// tile[column ld + term] or tile[term ld + column].
#pragma once
#include "kernels/cuda/load_store.cuh"
#include "kernels/cuda/mma.cuh"

namespace mamba_ops::gpu {

struct Bf16 {
  using Element = bf16;
  using Real = float;
  using Other = float;  // the second type that its inputs may be stored in
  static constexpr DType kType = DType::bf16;
  static constexpr int kPadAlong = 8, kPadAcross = 8;
  struct Left {
    uint32_t w[4];
  };
  struct Right {
    uint32_t w[2];
  };

  __device__ static Left left(const bf16* tile, int ld) {
    const int lane = threadIdx.x % 32;
    Left a;
    load_matrices(a.w, tile + lane % 16 * ld + lane / 16 * 8);
    return a;
  }
  __device__ static Left left_turned(const bf16* tile, int ld) {
    const int lane = threadIdx.x % 32;
    Left a;
    load_matrices_transposed(a.w, tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
    return a;
  }
  template <int kColumns>
  __device__ static void right(Right (&b)[kColumns], const bf16* tile, int ld) {
    const int lane = threadIdx.x % 32;
    load_two(b, [&](uint32_t (&w)[4]) {
      load_matrices(w, tile + (lane % 8 + (kColumns > 1 ? lane / 16 * 8 : 0)) * ld + lane / 8 % 2 * 8);
    });
  }
  template <int kColumns>
  __device__ static void right_turned(Right (&b)[kColumns], const bf16* tile, int ld) {
    const int lane = threadIdx.x % 32;
    load_two(b, [&](uint32_t (&w)[4]) {
      load_matrices_transposed(w, tile + lane % 16 * ld + (kColumns > 1 ? lane / 16 * 8 : 0));
    });
  }
  __device__ static Left from_sums(const float (&first)[4], const float (&second)[4]) {
    return {{pack_bf16(first[0], first[1]), pack_bf16(first[2], first[3]), pack_bf16(second[0], second[1]),
             pack_bf16(second[2], second[3])}};
  }
  // Every term times its weight: weight[term].
  __device__ static Left weighted(const Left& a, const float* weight) {
    const int q = threadIdx.x % 4;
    Left result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 w = *reinterpret_cast<const float2*>(weight + 2 * q + i / 2 * 8);
      result.w[i] =
          pack_bf16(w.x * __uint_as_float(a.w[i] << 16), w.y * __uint_as_float(a.w[i] & 0xffff0000u));
    }
    return result;
  }
  __device__ static const Left& prepare(const Left& a) { return a; }
  __device__ static void multiply(float (&sum)[4], const Left& a, const Right& b) {
    mma_bf16(sum, a.w, b.w[0], b.w[1]);
  }
  __device__ static float term(const Left& a, int half, int i) {  // i: 2 q, 2 q + 1, 2 q + 8, 2 q + 9
    return i % 2 ? __uint_as_float(a.w[i / 2 * 2 + half] & 0xffff0000u)
                 : __uint_as_float(a.w[i / 2 * 2 + half] << 16);
  }
  __device__ static void load_pair(float (&v)[2], const bf16* from) {
    const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
    v[0] = __uint_as_float(two << 16);
    v[1] = __uint_as_float(two & 0xffff0000u);
  }
  __device__ static void store_pair(bf16* to, float first, float second) {
    *reinterpret_cast<uint32_t*>(to) = pack_bf16(first, second);
  }
  // An 8 x 8 block of a sum's half, turned: element (row, column) to tile[column ld + row].
  __device__ static void store_turned(bf16* tile, int ld, float first, float second) {
    const int lane = threadIdx.x % 32;
    *reinterpret_cast<uint32_t*>(tile + lane / 4 * ld + lane % 4 * 2) = turn_matrix(pack_bf16(first, second));
  }

 private:
  // One column block is loaded twice: there is no third form to look after.
  template <int kColumns, class F>
  __device__ static void load_two(Right (&b)[kColumns], F load) {
    static_assert(kColumns == 1 || kColumns == 2);
    uint32_t w[4];
    load(w);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) b[i] = {{w[2 * i], w[2 * i + 1]}};
  }
};

// float and double: factors as they are stored.
template <class R>
struct PlainFactors {
  using Element = R;
  using Real = R;
  struct Left {
    R v[2][4];
  };
  struct Right {
    R v[4];
  };
  struct alignas(2 * sizeof(R)) Pair {
    R v[2];
  };

  __device__ static Left left(const R* tile, int ld) {
    const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    Left a;
#pragma unroll
    for (int half = 0; half < 2; ++half) load_along(a.v[half], tile + (r + 8 * half) * ld + 2 * q);
    return a;
  }
  __device__ static Left left_turned(const R* tile, int ld) {
    const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    Left a;
#pragma unroll
    for (int half = 0; half < 2; ++half) load_across(a.v[half], tile + 2 * q * ld + r + 8 * half, ld);
    return a;
  }
  template <int kColumns>
  __device__ static void right(Right (&b)[kColumns], const R* tile, int ld) {
    const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) load_along(b[i].v, tile + (r + 8 * i) * ld + 2 * q);
  }
  template <int kColumns>
  __device__ static void right_turned(Right (&b)[kColumns], const R* tile, int ld) {
    const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) load_across(b[i].v, tile + 2 * q * ld + r + 8 * i, ld);
  }
  __device__ static Left from_sums(const R (&first)[4], const R (&second)[4]) {
    return {{{first[0], first[1], second[0], second[1]}, {first[2], first[3], second[2], second[3]}}};
  }
  __device__ static Left weighted(const Left& a, const R* weight) {
    R w[4];
    load_along(w, weight + 2 * (threadIdx.x % 4));
    Left result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result.v[i / 4][i % 4] = w[i % 4] * a.v[i / 4][i % 4];
    return result;
  }
  __device__ static R term(const Left& a, int half, int i) { return a.v[half][i]; }
  __device__ static void load_pair(R (&v)[2], const R* from) {
    const Pair two = *reinterpret_cast<const Pair*>(from);
    v[0] = two.v[0];
    v[1] = two.v[1];
  }
  __device__ static void store_pair(R* to, R first, R second) {
    *reinterpret_cast<Pair*>(to) = {{first, second}};
  }
  __device__ static void store_turned(R* tile, int ld, R first, R second) {
    R* to = tile + threadIdx.x % 4 * 2 * ld + threadIdx.x % 32 / 4;
    to[0] = first;
    to[ld] = second;
  }

 private:
  __device__ static void load_along(R (&v)[4], const R* from) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const Pair two = *reinterpret_cast<const Pair*>(from + 4 * i);
      v[i] = two.v[0];
      v[i + 1] = two.v[1];
    }
  }
  __device__ static void load_across(R (&v)[4], const R* from, int ld) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = from[(i / 2 * 8 + i % 2) * ld];
  }
};

struct Float32 : PlainFactors<float> {
  using Other = f16;
  static constexpr DType kType = DType::f32;
  static constexpr int kPadAlong = 8, kPadAcross = 4;  // free of bank conflicts, for rows of 32 k values

  // v = high + low to 22 bits; the instruction drops what TF32 has not.
  struct Split {
    uint32_t high, low;
  };
  __device__ static Split split(float v) {
    const uint32_t high = (__float_as_uint(v) + 0x1000) & 0xffffe000;
    return {high, __float_as_uint(v - __uint_as_float(high)) + 0x1000};
  }
  struct Prepared {
    Split v[2][4];
  };
  __device__ static Prepared prepare(const Left& a) {
    Prepared result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result.v[i / 4][i % 4] = split(a.v[i / 4][i % 4]);
    return result;
  }
  // The instruction cuts its sums off where it should round: each begins from zero, and is added here.
  __device__ static void multiply(float (&sum)[4], const Prepared& a, const Right& b) {
    float part[4] = {};
    const Split b0 = split(b.v[0]), b1 = split(b.v[1]), b2 = split(b.v[2]), b3 = split(b.v[3]);
    const auto &first = a.v[0], &second = a.v[1];
    mma_tf32(part, first[0].low, second[0].low, first[1].low, second[1].low, b0.high, b1.high);
    mma_tf32(part, first[2].low, second[2].low, first[3].low, second[3].low, b2.high, b3.high);
    mma_tf32(part, first[0].high, second[0].high, first[1].high, second[1].high, b0.low, b1.low);
    mma_tf32(part, first[2].high, second[2].high, first[3].high, second[3].high, b2.low, b3.low);
    mma_tf32(part, first[0].high, second[0].high, first[1].high, second[1].high, b0.high, b1.high);
    mma_tf32(part, first[2].high, second[2].high, first[3].high, second[3].high, b2.high, b3.high);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
};

struct Float64 : PlainFactors<double> {
  using Other = float;
  static constexpr DType kType = DType::f64;
  static constexpr int kPadAlong = 2, kPadAcross = 2;

  __device__ static const Left& prepare(const Left& a) { return a; }
  __device__ static void multiply(double (&sum)[4], const Left& a, const Right& b) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) mma_f64(sum[2 * half], sum[2 * half + 1], a.v[half][i], b.v[i]);
  }
};

// sums (16 x 8 kTiles) += a times the columns [0, 8 kTiles) of a tile at its first term. use(i): whether
// columns 16 i .. 16 i + 15 are wanted.
template <class F, bool kTurned, int kTiles, class Use>
__device__ inline void multiply_columns(typename F::Real (&sums)[kTiles][4], const typename F::Left& a,
                                        const typename F::Element* tile, int ld, Use use) {
  const auto& prepared = F::prepare(a);
  constexpr int kBlock = kTiles > 1 ? 2 : 1;
  static_assert(kTiles % kBlock == 0);
#pragma unroll
  for (int i = 0; i < kTiles; i += kBlock) {
    if (!use(i / 2)) continue;
    typename F::Right b[kBlock];
    if constexpr (kTurned)
      F::right_turned(b, tile + i * 8, ld);
    else
      F::right(b, tile + i * 8 * ld, ld);
#pragma unroll
    for (int k = 0; k < kBlock; ++k) F::multiply(sums[i + k], prepared, b[k]);
  }
}
template <class F, bool kTurned, int kTiles>
__device__ inline void multiply_columns(typename F::Real (&sums)[kTiles][4], const typename F::Left& a,
                                        const typename F::Element* tile, int ld) {
  multiply_columns<F, kTurned>(sums, a, tile, ld, [](int) { return true; });
}

// sums += a b over kTerms terms; the tiles at their first row, column and term.
template <class F, bool kTurnedB, int kTerms, int kTiles>
__device__ inline void multiply_tiles(typename F::Real (&sums)[kTiles][4], const typename F::Element* a,
                                      int lda, const typename F::Element* b, int ldb) {
#pragma unroll
  for (int k = 0; k < kTerms; k += 16)
    multiply_columns<F, kTurnedB>(sums, F::left(a + k, lda), b + (kTurnedB ? k * ldb : k), ldb);
}

}  // namespace mamba_ops::gpu

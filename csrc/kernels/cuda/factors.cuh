// Products of tiles in shared memory, by types of factors: bfloat16, float16, float32 (each value split into
// two of TF32, three products: float32 accuracy), float32 as TF32, float64. Sums in float32, or float64.
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

// bf16 or f16: two factors in a register.
template <class E, DType kDType>
struct HalfFactors {
  using Element = E;
  using Real = float;
  using Sum = float;    // of what goes into exponents
  using Other = float;  // the second type that its inputs may be stored in
  static constexpr DType kType = kDType;
  static constexpr int kPadAlong = 8, kPadAcross = 8;
  struct Left {
    uint32_t w[4];
  };
  struct Right {
    uint32_t w[2];
  };

  __device__ static Left left(const E* tile, int ld) {
    const int lane = threadIdx.x % 32;
    Left a;
    load_matrices(a.w, tile + lane % 16 * ld + lane / 16 * 8);
    return a;
  }
  __device__ static Left left_turned(const E* tile, int ld) {
    const int lane = threadIdx.x % 32;
    Left a;
    load_matrices_transposed(a.w, tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
    return a;
  }
  template <int kColumns>
  __device__ static void right(Right (&b)[kColumns], const E* tile, int ld) {
    const int lane = threadIdx.x % 32;
    load_pairs(b, [&](uint32_t (&w)[4], int i) {
      load_matrices(w,
                    tile + (8 * i + lane % 8 + (kColumns > 1 ? lane / 16 * 8 : 0)) * ld + lane / 8 % 2 * 8);
    });
  }
  template <int kColumns>
  __device__ static void right_turned(Right (&b)[kColumns], const E* tile, int ld) {
    const int lane = threadIdx.x % 32;
    load_pairs(b, [&](uint32_t (&w)[4], int i) {
      load_matrices_transposed(w, tile + 8 * i + lane % 16 * ld + (kColumns > 1 ? lane / 16 * 8 : 0));
    });
  }
  __device__ static Left from_sums(const float (&first)[4], const float (&second)[4]) {
    return {{pack<E>(first[0], first[1]), pack<E>(first[2], first[3]), pack<E>(second[0], second[1]),
             pack<E>(second[2], second[3])}};
  }
  // Every term times its weight: weight[term].
  __device__ static Left weighted(const Left& a, const float* weight) {
    const int q = threadIdx.x % 4;
    Left result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 w = *reinterpret_cast<const float2*>(weight + 2 * q + i / 2 * 8);
      result.w[i] = pack<E>(w.x * low<E>(a.w[i]), w.y * high<E>(a.w[i]));
    }
    return result;
  }
  __device__ static const Left& prepare(const Left& a) { return a; }
  template <int kColumns>
  __device__ static void multiply(float (*sums)[4], const Left& a, const Right (&b)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) mma_halves<E>(sums[i], a.w, b[i].w[0], b[i].w[1]);
  }
  __device__ static float term(const Left& a, int half, int i) {  // i: 2 q, 2 q + 1, 2 q + 8, 2 q + 9
    return i % 2 ? high<E>(a.w[i / 2 * 2 + half]) : low<E>(a.w[i / 2 * 2 + half]);
  }
  __device__ static void load_pair(float (&v)[2], const E* from) {
    const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
    v[0] = low<E>(two);
    v[1] = high<E>(two);
  }
  __device__ static void store_pair(E* to, float first, float second) {
    *reinterpret_cast<uint32_t*>(to) = pack<E>(first, second);
  }
  // An 8 x 8 block of a sum's half, turned: element (row, column) to tile[column ld + row].
  __device__ static void store_turned(E* tile, int ld, float first, float second) {
    const int lane = threadIdx.x % 32;
    *reinterpret_cast<uint32_t*>(tile + lane / 4 * ld + lane % 4 * 2) = turn_matrix(pack<E>(first, second));
  }

 private:
  // A single column is loaded twice: there is no third form to look after.
  template <int kColumns, class F>
  __device__ static void load_pairs(Right (&b)[kColumns], F load) {
    static_assert(kColumns == 1 || kColumns % 2 == 0);
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      uint32_t w[4];
      load(w, i);
      b[i] = {{w[0], w[1]}};
      if constexpr (kColumns > 1) b[i + 1] = {{w[2], w[3]}};
    }
  }
};
using Bf16 = HalfFactors<bf16, DType::bf16>;
using Float16 = HalfFactors<f16, DType::f16>;

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

// A sum to twice the digits of float: a difference of two is as exact as a float.
struct Twofold {
  float high, low;

  Twofold() = default;
  __device__ explicit Twofold(double v) : high(float(v)), low(float(v - high)) {}
};
__device__ inline float operator-(const Twofold& a, const Twofold& b) {
  return (a.high - b.high) + (a.low - b.low);
}

struct Float32 : PlainFactors<float> {
  static constexpr bool kExact = true;  // to float32's last bits
  using Sum = Twofold;
  using Other = float;
  static constexpr DType kType = DType::f32;
  static constexpr int kPadAlong = 8, kPadAcross = 4;  // free of bank conflicts, for rows of 32 k values

  // v = high + low, each as TF32: the instruction drops what that has not. high is rounded: low then has a
  // bit more than TF32 at most, and products of two low parts, which are left out, have no sign of their own.
  struct Prepared {
    uint32_t high[2][4], low[2][4];
  };
  __device__ static uint32_t rounded(float v) { return __float_as_uint(v) + 0x1000; }
  __device__ static uint32_t rest(float v, uint32_t high) {
    return __float_as_uint(v - __uint_as_float(high & 0xffffe000));
  }
  __device__ static Prepared prepare(const Left& a) {
    Prepared result;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float v = a.v[i / 4][i % 4];
      result.high[i / 4][i % 4] = rounded(v);
      result.low[i / 4][i % 4] = rest(v, result.high[i / 4][i % 4]);
    }
    return result;
  }
  // The instruction cuts its sums off where it should round: each begins from zero, and is added here. Small
  // products first; those of different columns between them, as each waits for the one before.
  template <int kColumns>
  __device__ static void multiply(float (*sums)[4], const Prepared& a, const Right (&b)[kColumns]) {
    float part[kColumns][4] = {};
    const auto add = [&](const uint32_t (&left)[2][4], bool low) {
#pragma unroll
      for (int k = 0; k < 4; k += 2)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          uint32_t right[2] = {rounded(b[i].v[k]), rounded(b[i].v[k + 1])};
#pragma unroll
          for (int m = 0; m < 2; ++m)
            if (low) right[m] = rest(b[i].v[k + m], right[m]);
          mma_tf32(part[i], left[0][k], left[1][k], left[0][k + 1], left[1][k + 1], right[0], right[1]);
        }
    };
    add(a.low, false);
    add(a.high, true);
    add(a.high, false);
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][k] += part[i][k];
  }
};

// float32 whose factors may lose all but TF32's 11 bits: one product of rounded ones.
struct Tf32 : Float32 {
  static constexpr bool kExact = false;

  __device__ static const Left& prepare(const Left& a) { return a; }
  template <int kColumns>
  __device__ static void multiply(float (*sums)[4], const Left& a, const Right (&b)[kColumns]) {
#pragma unroll
    for (int k = 0; k < 4; k += 2)
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        mma_tf32(sums[i], rounded(a.v[0][k]), rounded(a.v[1][k]), rounded(a.v[0][k + 1]),
                 rounded(a.v[1][k + 1]), rounded(b[i].v[k]), rounded(b[i].v[k + 1]));
  }
};

struct Float64 : PlainFactors<double> {
  using Sum = double;
  using Other = float;
  static constexpr DType kType = DType::f64;
  static constexpr int kPadAlong = 2, kPadAcross = 2;

  __device__ static const Left& prepare(const Left& a) { return a; }
  template <int kColumns>
  __device__ static void multiply(double (*sums)[4], const Left& a, const Right (&b)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          mma_f64(sums[column][2 * half], sums[column][2 * half + 1], a.v[half][i], b[column].v[i]);
  }
};

// sums (16 x 8 kTiles) += a times the columns [0, 8 kTiles) of a tile at its first term.
template <class F, bool kTurned, int kTiles>
__device__ inline void multiply_columns(typename F::Real (&sums)[kTiles][4], const typename F::Left& a,
                                        const typename F::Element* tile, int ld) {
  const auto& prepared = F::prepare(a);
  constexpr int kBlock = kTiles % 4 == 0 ? 4 : kTiles % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kTiles; i += kBlock) {
    typename F::Right b[kBlock];
    if constexpr (kTurned)
      F::right_turned(b, tile + i * 8, ld);
    else
      F::right(b, tile + i * 8 * ld, ld);
    F::multiply(sums + i, prepared, b);
  }
}
// The same for the columns of which use(i), for columns 16 i .. 16 i + 15, is true.
template <class F, bool kTurned, int kTiles, class Use>
__device__ inline void multiply_columns(typename F::Real (&sums)[kTiles][4], const typename F::Left& a,
                                        const typename F::Element* tile, int ld, Use use) {
  const auto& prepared = F::prepare(a);
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
    if (!use(i / 2)) continue;
    typename F::Right b[2];
    if constexpr (kTurned)
      F::right_turned(b, tile + i * 8, ld);
    else
      F::right(b, tile + i * 8 * ld, ld);
    F::multiply(sums + i, prepared, b);
  }
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

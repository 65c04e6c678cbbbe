// Products of float32 factors by tensor cores for float16, to the accuracy of float32: a row of a factor (all
// terms of one row of the left factor, or of one column of the right one) is 2^e (high + low), both float16,
// where 2^e brings the row's largest value to [2^14, 2^15). Three products for one, without low x low: values
// down to 2^-17 of the row's largest keep 22 bits and a sign, smaller ones err by 2^-39 of it. That is as
// exact as three products of TF32, in half of their time; one alone is one of TF32. A row with an infinity
// becomes infinities and NaN.
//
// Split rows lie where rows of float32 lay: of 8 neighbouring values first the 8 high parts, then the 8 low
// ones; the other way round in every second 32 values. So, and with 32 k + 4 values from row to row, there
// are no bank conflicts. Fragments are as in factors.cuh.
#pragma once
#include "kernels/cuda/mma.cuh"

namespace mamba_ops::gpu {

inline constexpr int kSplitPad = 4;  // of rows

// Where in a split row the high or low part of value `at` lies, in floats: of its 8, and of its pair.
template <bool kHigh>
__device__ constexpr int split_place(int at) {
  return at / 8 * 8 + (kHigh == (at / 32 % 2 == 0) ? 0 : 4) + at % 8 / 2;
}

// v to = high + low, v = (high + low) from.
struct SplitScale {
  float to, from;

  SplitScale() = default;
  __device__ explicit SplitScale(float largest) {
    const uint32_t power = max(__float_as_uint(largest), 15u << 23) & 0x7f800000;  // infinity stays
    to = __uint_as_float(((127u + 14 + 127) << 23) - power);
    from = __uint_as_float(power) * 0x1p-14f;
  }
};

__device__ inline void split_pair(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack<f16>(first, second);
  const float2 rounded = unpack<f16>(high);
  low = pack<f16>(first - rounded.x, second - rounded.y);
}
// Two neighbouring values of a split row; `at`: the first, even.
__device__ inline void store_split_pair(float* row, int at, float first, float second) {
  uint32_t high, low;
  split_pair(first, second, high, low);
  row[split_place<true>(at)] = __uint_as_float(high);
  row[split_place<false>(at)] = __uint_as_float(low);
}

// kRows rows of kColumns values become split rows, in place; from[row]: its factor. By one warp, 32 / kRows
// lanes to a row: a lane takes stretches of kTogether values.
template <int kColumns, int kRows>
__device__ inline void split_rows(float* rows, int ld, float* from) {
  constexpr int kLanes = 32 / kRows, kValues = kColumns / kLanes, kTogether = kValues < 16 ? kValues : 16;
  static_assert(kTogether % 8 == 0);
  const int lane = threadIdx.x % 32, first = lane / kRows * kTogether;
  float* const row = rows + lane % kRows * ld;
  const auto place = [&](int i) { return first + i / kTogether * kTogether * kLanes + i % kTogether; };
  float v[kValues];
#pragma unroll
  for (int i = 0; i < kValues; i += 4)
    *reinterpret_cast<float4*>(v + i) = *reinterpret_cast<const float4*>(row + place(i));
  float most = 0;
#pragma unroll
  for (int i = 0; i < kValues; i += 2) most = fmaxf(most, fmaxf(fabsf(v[i]), fabsf(v[i + 1])));
#pragma unroll
  for (int d = kRows; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, d));
  const SplitScale scale(most);
#pragma unroll
  for (int i = 0; i < kValues; i += 8) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      split_pair(v[i + 2 * k] * scale.to, v[i + 2 * k + 1] * scale.to, high[k], low[k]);
    *reinterpret_cast<uint4*>(row + split_place<true>(place(i))) = {high[0], high[1], high[2], high[3]};
    *reinterpret_cast<uint4*>(row + split_place<false>(place(i))) = {low[0], low[1], low[2], low[3]};
  }
  if (lane < kRows) from[lane] = scale.from;
}

struct SplitLeft {
  uint32_t high[4], low[4];
};
// From 16 rows, terms k .. k + 15.
__device__ inline SplitLeft split_left(const float* rows, int ld, int k) {
  const int lane = threadIdx.x % 32;
  const float* row = rows + lane % 16 * ld + lane / 16 * 8;
  SplitLeft a;
  load_matrices(a.high, row + split_place<true>(k));
  load_matrices(a.low, row + split_place<false>(k));
  return a;
}
// A left factor in registers: rows r and r + 8 as sums or PlainFactors hold them, v[half][...].
__device__ inline float row_largest(float most) {
  most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
  return fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
}
__device__ inline SplitLeft split_left(const float (&v)[2][4], const SplitScale (&scale)[2]) {
  SplitLeft a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* two = v[i % 2] + i / 2 * 2;
    split_pair(two[0] * scale[i % 2].to, two[1] * scale[i % 2].to, a.high[i], a.low[i]);
  }
  return a;
}

// sums (16 x 8 kColumns) += a b over 16 terms: of b, rows are columns, terms from `at` on; kTurned: rows are
// terms, columns from `at` on. Products of different columns lie between those of one, each of which waits
// for the one before. The instruction cuts its sums off where it should round: long ones are to be added in
// pieces.
template <bool kExact, bool kTurned, int kColumns>
__device__ inline void multiply_split(float (&sums)[kColumns][4], const SplitLeft& a, const float* rows,
                                      int ld, int at) {
  static_assert(kColumns % 2 == 0);
  const int lane = threadIdx.x % 32;
  uint32_t b[kColumns / 2][4];
  const auto load = [&](int place) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i)
      if constexpr (kTurned)
        load_matrices_transposed(b[i], rows + lane % 16 * ld + 16 * i + lane / 16 * 8 + place);
      else
        load_matrices(b[i], rows + (16 * i + lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8 + place);
  };
  const auto add = [&](const uint32_t (&left)[4]) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      mma_halves<f16>(sums[i], left, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
  };
  if constexpr (kExact) {
    load(split_place<false>(at));
    add(a.high);
  }
  load(split_place<true>(at));
  if constexpr (kExact) add(a.low);
  add(a.high);
}

}  // namespace mamba_ops::gpu

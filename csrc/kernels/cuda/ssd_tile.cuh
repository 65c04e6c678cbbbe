// Between tensors and what the portable kernels of the SSD compute on: tiles of factors in shared memory, the
// steps of a chunk, states in registers.
#pragma once
#include <climits>
#include <cstddef>
#include <initializer_list>

#include "kernels/cuda/device.h"
#include "kernels/cuda/factors.cuh"
#include "kernels/cuda/ssd_states.h"
#include "kernels/cuda/ssd_steps.cuh"

namespace mamba_ops::gpu {

// ---- Tiles

// A tensor whose last dim may be copied 16 bytes at a time: dtype of the factors, unit stride, aligned,
// nothing left over.
struct Rows {
  View view;
  bool direct;
};

template <class F>
Rows rows_of(const View& v, std::initializer_list<int64_t> sizes) {
  constexpr int64_t kVector = 16 / sizeof(typename F::Element);
  const int last = int(sizes.size()) - 1;
  bool direct = v.dtype == F::kType && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.stride[last] == 1 &&
                sizes.begin()[last] % kVector == 0;
  for (int i = 0; i < last; ++i) direct &= sizes.begin()[i] == 1 || v.stride[i] % kVector == 0;
  return {v, direct};
}

// load_tile for any strides and a storage type S. Out of line: it is long, and would be there for every tile.
template <class S, class E>
__device__ __noinline__ void convert_tile(E* tile, int ld, const void* from, int64_t row_stride,
                                          int64_t column_stride, int rows, int columns, int tile_rows,
                                          int tile_columns) {
  constexpr int kBatch = 8;  // loads in flight
  const S* data = static_cast<const S*>(from);
  const int count = tile_rows * tile_columns;
  for (int first = threadIdx.x; first < count; first += kBatch * blockDim.x) {
    S v[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * blockDim.x, row = i / tile_columns, column = i % tile_columns;
      v[k] = row < rows && column < columns ? data[row * row_stride + column * column_stride] : S{};
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * blockDim.x;
      if (i < count) tile[i / tile_columns * ld + i % tile_columns] = from_real<E>(Real<E>(to_real(v[k])));
    }
  }
}

// Rows [0, rows) and columns [0, columns) of what lies at `offset`, zeros beyond, into a (kRows, kColumns)
// tile. For other threads to see after wait_for_copies() and a barrier. A warp copies neighbouring rows.
template <class F, int kRows, int kColumns, int kThreads>
__device__ inline void load_tile(typename F::Element* tile, int ld, const Rows& from, int64_t offset,
                                 int64_t row_stride, int64_t column_stride, int rows, int columns) {
  using E = typename F::Element;
  if (from.direct) {
    constexpr int kVector = 16 / sizeof(E), kVectors = kColumns / kVector;
    constexpr int kAcross = kVectors < 32 ? kVectors : 32, kDown = kThreads / kAcross;
    constexpr int kEach = (kRows + kDown - 1) / kDown;
    for (int column = threadIdx.x % kAcross * kVector; column < kColumns; column += kAcross * kVector) {
      const int row = threadIdx.x / kAcross * kEach, wanted = column < columns ? rows - row : 0;
      const E* data = static_cast<const E*>(from.view.data) + offset + row * row_stride + column;
      E* const to = tile + row * ld + column;
#pragma unroll
      for (int i = 0; i < kEach; ++i, data += row_stride)
        if (kRows % kDown == 0 || row + i < kRows) copy_async(to + i * ld, data, i < wanted);
    }
    return;
  }
  const auto convert = [&]<class S>() {
    convert_tile<S>(tile, ld, static_cast<const S*>(from.view.data) + offset, row_stride, column_stride, rows,
                    columns, kRows, kColumns);
  };
  if (from.view.dtype == F::kType)
    convert.template operator()<E>();
  else
    convert.template operator()<typename F::Other>();
}

// Tokens of one head or group, the first channel of the first at `offset`: (b, l, heads or groups, columns).
template <class F, int kRows, int kColumns, int kThreads>
__device__ inline void load_tokens(typename F::Element* tile, int ld, const Rows& from, int64_t offset,
                                   int tokens, int columns) {
  load_tile<F, kRows, kColumns, kThreads>(tile, ld, from, offset, from.view.stride[1], from.view.stride[3],
                                          tokens, columns);
}
__device__ inline int64_t place(const View& v, int64_t row, int64_t t, int64_t which, int64_t channel) {
  return row * v.stride[0] + t * v.stride[1] + which * v.stride[2] + channel * v.stride[3];
}

// Tokens of a cell of the states that lie in memory, at most; a forward's are no longer.
template <class F, int kN>
inline constexpr int kCellTokens = sizeof(typename F::Element) == 8               ? 16
                                   : sizeof(typename F::Element) == 4 && kN > 128 ? 32
                                                                                  : 64;

// Two neighbouring values of a row of which `left` are left.
template <class F>
__device__ inline void store_two(const Rows& to, int64_t offset, int64_t stride, typename F::Real first,
                                 typename F::Real second, int left) {
  if (to.direct && left >= 2) {
    F::store_pair(static_cast<typename F::Element*>(to.view.data) + offset, first, second);
    return;
  }
  if (left >= 1) store_one(to.view, offset, first);
  if (left >= 2) store_one(to.view, offset + stride, second);
}

// ---- Steps of a chunk

template <class F, int kQ>
struct alignas(16) Steps {
  using R = typename F::Real;
  typename F::Sum s[kQ];  // constant past the end
  R delta[kQ];            // 0 past the end
  R from_start[kQ];       // 2^s_i
  R weight[kQ];           // 2^(T - s_j) delta_j
  R decay;                // 2^T
};

// In double: a decay is as exact as the difference of two sums.
template <class R>
struct HeadParameters {
  double rate;  // A log2(e)
  R bias;

  __device__ HeadParameters(const SsdFwd& p, int64_t head)
      : rate(load_one<R>(p.A, head * p.A.stride[0]) * kLog2e),
        bias(p.dt_bias.data ? load_one<R>(p.dt_bias, head * p.dt_bias.stride[0]) : R(0)) {}
};

// The steps of a chunk in one warp, kPerLane tokens to a lane.
template <class F, int kQ>
struct LaneSteps {
  using R = typename F::Real;
  static constexpr int kPerLane = (kQ + 31) / 32;
  R delta[kPerLane];
  double s[kPerLane], total;

  __device__ LaneSteps(const SsdFwd& p, int64_t row, int64_t t, int64_t head,
                       const HeadParameters<R>& parameters, int tokens) {
    R dt[kPerLane];
    load(dt, p, row, t, head, tokens);
    make(dt, p.dims, parameters, tokens);
  }
  __device__ LaneSteps(const R (&dt)[kPerLane], const SsdDims& dims, const HeadParameters<R>& parameters,
                       int tokens) {
    make(dt, dims, parameters, tokens);
  }

  __device__ static void load(R (&dt)[kPerLane], const SsdFwd& p, int64_t row, int64_t t, int64_t head,
                              int tokens) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int i = threadIdx.x % 32 * kPerLane + k;
      dt[k] = i < tokens
                  ? load_one<R>(p.dt, row * p.dt.stride[0] + (t + i) * p.dt.stride[1] + head * p.dt.stride[2])
                  : R(0);
    }
  }
  __device__ R from_start(int k) const { return exp2_of(R(s[k])); }
  __device__ R to_end(int k) const { return exp2_of(R(total - s[k])); }
  // Many of these are multiplied: for float in double, as ex2.approx errs to one side.
  __device__ R decay() const {
    using Exact = std::conditional_t<std::is_same_v<typename F::Sum, float>, float, double>;
    return R(exp2_of(Exact(total)));
  }
  __device__ void store(Steps<F, kQ>& steps) const {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int i = threadIdx.x % 32 * kPerLane + k;
      if (i >= kQ) continue;
      steps.s[i] = typename F::Sum(s[k]);
      steps.delta[i] = delta[k];
      steps.from_start[i] = from_start(k);
      steps.weight[i] = to_end(k) * delta[k];
    }
    if (threadIdx.x % 32 == 0) steps.decay = decay();
  }

 private:
  __device__ void make(const R (&dt)[kPerLane], const SsdDims& dims, const HeadParameters<R>& head,
                       int tokens) {
    double sum = 0;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      delta[k] = make_step(dt[k], head.bias, dims).delta;
      if (int(threadIdx.x % 32) * kPerLane + k >= tokens) delta[k] = 0;
      sum += delta[k] * head.rate;
    }
    double before = inclusive_sum(sum);
    total = __shfl_sync(kAllLanes, before, 31);
    before -= sum;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) s[k] = before += delta[k] * head.rate;
  }
};

// ---- States in registers: sums of 16 rows (of p) by 8 kTiles columns (of n)

// f(sum, row, column) for the values within (rows, columns) of the 16 x 8 kTiles that begin at (0, 0).
template <int kTiles, class R, class F>
__device__ inline void for_state(R (&sums)[kTiles][4], int64_t rows, int64_t columns, F f) {
  const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = r + k / 2 * 8, column = 8 * i + 2 * q + k % 2;
      if (row < rows && column < columns) f(sums[i][k], row, column);
    }
}
// From rows of `ld` values at `from`, zeros beyond; null: zeros.
template <int kTiles, class R>
__device__ inline void load_state(R (&sums)[kTiles][4], const R* from, int64_t ld, int64_t rows,
                                  int64_t columns) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[i][k] = 0;
  if (from) for_state(sums, rows, columns, [&](R& v, int row, int column) { v = from[row * ld + column]; });
}
template <class S, int kTiles, class R>
__device__ inline void store_state(S* to, int64_t ld, R (&sums)[kTiles][4], int64_t rows, int64_t columns) {
  for_state(sums, rows, columns, [&](R v, int row, int column) { to[row * ld + column] = from_real<S>(v); });
}
// The same as factors, where `ld`, `columns` and the first value are multiples of 8: 64 bytes of a row at
// once in 16 bits, where pairs would leave every request to L2 half of its sectors.
template <class F, int kTiles>
__device__ inline void store_state_factors(typename F::Element* to, int64_t ld,
                                           const typename F::Real (&sums)[kTiles][4], int64_t rows,
                                           int64_t columns) {
  using E = typename F::Element;
  const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    E* const row = to + (r + 8 * half) * ld;
    if constexpr (sizeof(E) == 2 && kTiles % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kTiles; i += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) pairs[k] = pack<E>(sums[i + k][2 * half], sums[i + k][2 * half + 1]);
        turn_quad(pairs);
        if (r + 8 * half < rows && 8 * (i + q) < columns)
          *reinterpret_cast<uint4*>(row + 8 * (i + q)) = {pairs[0], pairs[1], pairs[2], pairs[3]};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        if (r + 8 * half < rows && 8 * i + 2 * q < columns)
          F::store_pair(row + 8 * i + 2 * q, sums[i][2 * half], sums[i][2 * half + 1]);
    }
  }
}

template <int kTiles, class R>
__device__ inline void scale(R (&sums)[kTiles][4], R factor) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[i][k] *= factor;
}

// state (16 rows from p on by 8 kTiles columns from n on) <- the same after one more piece.
template <int kTiles, class R>
__device__ inline void pass_piece(R (&state)[kTiles][4], const SsdDims& dims, const SsdPieces& pieces,
                                  bool reverse, int64_t row, int64_t piece, int64_t head, int64_t p,
                                  int64_t n, int64_t rows) {
  const int64_t slot = (row * pieces.count + piece) * dims.h + head, ldn = ssd_padded_n(dims);
  const R* end =
      static_cast<const R*>(reverse ? pieces.ends[1] : pieces.ends[0]) + (slot * dims.p + p) * ldn + n;
  scale(state, static_cast<const R*>(reverse ? pieces.decays[1] : pieces.decays[0])[slot]);
  for_state(state, rows, dims.n - n, [&](R& v, int r, int c) { v += end[r * ldn + c]; });
}

// ---- Host

// f.template operator()<F>() with the type of a call's factors. float16 has its range: whatever goes into a
// product, states of cells too, must stay below 65504.
template <class Function>
auto by_factors(const SsdFwd& p, Function f) {
  switch (p.x.dtype) {
    case DType::bf16:
      return f.template operator()<Bf16>();
    case DType::f16:
      return f.template operator()<Float16>();
    case DType::f64:
      return f.template operator()<Float64>();
    default:
      return p.dims.tf32 ? f.template operator()<Tf32>() : f.template operator()<Float32>();
  }
}

// f.template operator()<kN>() with the width of the tiles that hold n columns.
template <class Function>
auto by_width(int64_t n, Function f) {
  return n <= 64    ? f.template operator()<64>()
         : n <= 128 ? f.template operator()<128>()
                    : f.template operator()<256>();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// The most pieces of so many cells: more would pass more ends than they have cells.
inline int64_t most_pieces(int64_t cells) {
  int64_t pieces = 1;
  while ((pieces + 1) * (pieces + 1) <= cells) ++pieces;
  return pieces;
}

// Lets a kernel use so much dynamic shared memory, where the device has it.
template <class Kernel>
const char* allow_shared(Kernel kernel, int bytes) {
  if (bytes > shared_bytes()) return "these sizes need more shared memory than a block has on this GPU";
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return launch_error();
}

}  // namespace mamba_ops::gpu

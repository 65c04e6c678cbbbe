// Second pass of the portable selective scan's backward: its partial sums, and the kernels that add them up.
#pragma once
#include "kernels/cuda/selective_scan.cuh"

namespace mamba_ops::gpu {

inline constexpr int kReduceThreads = 256;

// Tokens [begin, end) of every segment.
struct Window {
  int64_t begin, end;

  constexpr int64_t tokens() const { return end - begin; }
};

// Scratch memory besides the carry, whose states are lambda.
template <class S>
struct BwdWork {
  using R = RealOf<S>;

  ScanCarry<S> carry;
  S* middle;       // (rows, n, d): the state that enters every second tile
  S* sums_A;       // (rows, kinds, n, d): dA, and constant dB, dC
  R* sums_d;       // (rows, 2, d): dD, ddelta_bias
  R* sums_BC;      // (channel blocks, b, segments, window, 2, n, parts): dB, dC
  int64_t window;  // most tokens of a window

  static constexpr int64_t kinds(const ScanDims& dims) { return 1 + dims.constant_B + dims.constant_C; }

  BwdWork(const ScanDims& dims, const ScanCut& cut, Carver& carver) : carry(dims, cut, carver) {
    const int64_t rows = cut.rows(dims), states = rows * dims.n * dims.d;
    middle = carver.take<S>(states);
    sums_A = carver.take<S>(kinds(dims) * states);
    sums_d = carver.take<R>(rows * 2 * dims.d);
    window = cut.tokens;
    sums_BC = nullptr;
    if (dims.constant_B && dims.constant_C) return;
    const int64_t per_offset = cut.units(dims) * 2 * dims.n * int64_t(sizeof(S));
    const int64_t most = std::max<int64_t>(kScanPartialBytes / std::max<int64_t>(per_offset, 1), 1);
    const int64_t windows = (cut.tokens + most - 1) / most, grid = kScanCheckpointCuda;
    window = (cut.tokens + windows * grid - 1) / (windows * grid) * grid;
    sums_BC = carver.take<R>(per_offset / int64_t(sizeof(R)) * window);
  }
};

// The partials of dB and dC of a window, added up over the blocks of a group. A thread owns one number of
// one token of one row.
template <class S>
__global__ void __launch_bounds__(kReduceThreads, 4)
    scan_reduce_tokens(const ScanBwd p, const ScanCut cut, const BwdWork<S> work, const Window window) {
  using R = RealOf<S>;
  constexpr int kParts = Number<S>::kParts;
  const ScanDims& dims = p.fwd.dims;
  const int64_t reals = dims.n * kParts, tokens = dims.b * cut.segments * window.tokens();
  const int64_t step = int64_t(gridDim.x) * kReduceThreads;
  for (int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x; i < tokens * 2 * reals; i += step) {
    const int64_t real = i % reals, which = i / reals % 2, token = i / (2 * reals);
    const int64_t segment = token / window.tokens() % cut.segments;
    const int64_t row = token / window.tokens() / cut.segments;
    const int64_t t = segment * cut.tokens + window.begin + token % window.tokens();
    if (t >= dims.l || (which == 0 ? dims.constant_B : dims.constant_C)) continue;
    const View& out = which == 0 ? p.dB : p.dC;
    const int64_t groups = which == 0 ? dims.groups_B : dims.groups_C, blocks = cut.channel_blocks / groups;
    for (int64_t group = 0; group < groups; ++group) {
      R sum = 0;
      for (int64_t block = group * blocks; block < (group + 1) * blocks; ++block)
        sum += work.sums_BC[block * tokens * 2 * reals + i];
      store_one(out,
                row * out.stride[0] + group * out.stride[1] + real / kParts * out.stride[2] + real % kParts +
                    t * out.stride[3],
                sum);
    }
  }
}

// dA, constant dB and dC, dD and ddelta_bias, added up over the rows. A thread owns one number of a channel.
template <class S>
__global__ void __launch_bounds__(kReduceThreads, 4)
    scan_reduce_rows(const ScanBwd p, const Sequences seqs, const BwdWork<S> work, int64_t rows) {
  using R = RealOf<S>;
  constexpr int kParts = Number<S>::kParts;
  const ScanDims& dims = p.fwd.dims;
  const int64_t per_kind = dims.n * dims.d * kParts, kinds = work.kinds(dims);
  const int64_t step = int64_t(gridDim.x) * kReduceThreads;
  const auto sum_of = [&](const R* from, int64_t stride) {
    double sum = is_invalid(seqs) ? NAN : 0;
    for (int64_t row = 0; row < rows; ++row) sum += from[row * stride];
    return sum;
  };
  for (int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x; i < kinds * per_kind + 2 * dims.d;
       i += step) {
    if (i < kinds * per_kind) {
      const int64_t kind = i / per_kind, part = i % kParts, c = i / kParts % dims.d;
      const int64_t state = i / kParts / dims.d % dims.n;
      const View& out = kind == 0 ? p.dA : kind == 1 && dims.constant_B ? p.dB : p.dC;
      store_one(out, c * out.stride[0] + state * out.stride[1] + part,
                sum_of(reinterpret_cast<const R*>(work.sums_A) + i, kinds * per_kind));
    } else {
      const int64_t at = i - kinds * per_kind, c = at % dims.d;
      const View& out = at < dims.d ? p.dD : p.ddelta_bias;
      if (out.data) store_one(out, c * out.stride[0], sum_of(work.sums_d + at, 2 * dims.d));
    }
  }
}

}  // namespace mamba_ops::gpu

// Causal depthwise convolution, backward (math: kernels/causal_conv1d.h).
//
//   gc_t = gy_t silu'(c_t) or gy_t, with c_t computed again;  gx~_s = sum_m W_m gc_{s+m} (+ gfinal);
//   gW_m = sum_t gc_t x~_{t-m};  gbias = sum_t gc_t
//
// A block owns a tile of channels and tokens of one batch row, a thread kC channels and a stretch of the
// tokens (see causal_conv1d.cuh). It walks its chunks of x and dy from left to right; gc of a chunk completes
// dx of the chunk before, and at the end of a stretch gc of kHalo more tokens is computed for the last one.
// dweight and dbias are summed over the thread's own tokens in registers, then over the threads that share a
// channel, in order, in shared memory: one partial per group (a tile of tokens of one row of the grid).
// conv_reduce adds the groups. No atomics, every order is fixed by the sizes: bitwise repeatable, and the
// same on every GPU. Where states enter or leave, conv_edges computes dinitial, and dx of the last w - 1
// tokens anew with dfinal added. Shared memory: taps 5 x 128, sums 5 x kC x 128 values (at most 2.5 + 10 KiB
// in float, 5 + 10 in double).
#include "kernels/cuda/causal_conv1d.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kMaxChunks = 16;  // of conv_tiles

template <class R>
__device__ inline R through_activation(R dy, R c, bool silu) {
  return silu ? dy * silu_grad(c) : dy;
}

// gc of a chunk, added to what it is part of: W_m gc to dx of the token m back, in the chunk or in the kHalo
// tokens before it, and, if the tokens are the thread's own, to its sums of dweight (by distance) and dbias.
template <bool kWhole, class T, int kC, int kRows>
__device__ void add_grad(const Inputs<kWhole, T, kC, kRows>& x, const Chunk<T, kC, kRows>& dy,
                         const Taps<Real<T>, kC>& taps, bool own, Real<T> (*dx_before)[kC], Real<T> (*dx)[kC],
                         Real<T> (&sums)[kHalo + 1][kC]) {
  const ConvDims& dims = x.p.dims;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const auto reach = x.reach(i);
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      Real<T> seen[kHalo], c = taps.bias[j];
#pragma unroll
      for (int m = kHalo - 1; m >= 0; --m)
        if (m < dims.w) {
          seen[m] = x.tap(reach, i, m, j);
          c += taps.weight[m][j] * seen[m];
        }
      Real<T> g = through_activation(dy.at(i, j), c, dims.silu);
      if (!kWhole && x.first + i >= dims.l) g = 0;
      const Real<T> share = own ? g : 0;
#pragma unroll
      for (int m = 0; m < kHalo; ++m)
        if (m < dims.w) {
          sums[m][j] += share * seen[m];
          if (kWhole || m <= reach.tokens)
            (i < m ? dx_before[kHalo + i - m] : dx[i - m])[j] += taps.weight[m][j] * g;
        }
      sums[kHalo][j] += share;
    }
  }
}

template <class T, int kC, int kT>
__global__ void __launch_bounds__(kConvThreads, 3)
    conv_bwd(const ConvBwd p, const Tokens<T> x, const Tokens<T> dy, const Tokens<T> dx, const Sequences seqs,
             const ConvTiles tiles) {
  using R = Real<T>;
  __shared__ R s_taps[(kHalo + 1) * kConvChannels];
  __shared__ R s_sums[kHalo + 1][kConvThreads * kC];
  const ConvDims& dims = p.fwd.dims;
  const ConvThread<kC, kT> me(tiles);
  load_taps(s_taps, p.fwd, seqs, me.block_channel, tiles.channels);
  __syncthreads();
  const Taps<R, kC> taps(s_taps, me.local_channel);
  R sums[kHalo + 1][kC] = {};

  for (int64_t row = blockIdx.y; row < dims.b && me.channel < dims.d; row += gridDim.y) {
    const auto load = [&](auto& chunk, const Tokens<T>& from, int64_t first) {
      chunk.load(from, row, me.channel, first, dims);
    };
    const auto add = [&]<int kRows>(bool own, int64_t first, const Chunk<T, kC, kHalo>& left,
                                    const Chunk<T, kC, kRows>& chunk, const Chunk<T, kC, kRows>& dy_chunk,
                                    R(*dx_before)[kC], R(*dx_chunk)[kC]) {
      const unsigned starts = run_starts<kHalo + kRows>(seqs, row, first - kHalo, dims.l);
      if (starts == 0)
        add_grad<true, T, kC, kRows>({p.fwd, seqs, left, chunk, starts, row, me.channel, first}, dy_chunk,
                                     taps, own, dx_before, dx_chunk, sums);
      else
        add_grad<false, T, kC, kRows>({p.fwd, seqs, left, chunk, starts, row, me.channel, first}, dy_chunk,
                                      taps, own, dx_before, dx_chunk, sums);
    };
    if constexpr (kC > 1) {
      Chunk<T, kC, kT> left, chunk, dy_chunk;
      R dx_before[kT][kC] = {};
      load(chunk, x, me.token - kT);
      // One chunk more than the thread owns completes dx of its last one.
      for (int q = 0; q <= tiles.chunks; ++q) {
        const int64_t first = me.token + q * kT;
        if (first >= dims.l + (q > 0 ? kT : 0)) break;
        left = chunk;
        load(chunk, x, first);
        load(dy_chunk, dy, first);
        R dx_chunk[kT][kC] = {};
        add(q < tiles.chunks, first, left, chunk, dy_chunk, dx_before, dx_chunk);
        if (q > 0) store_chunk(dx, row, me.channel, first - kT, dims, dx_before);
#pragma unroll
        for (int i = 0; i < kT; ++i)
#pragma unroll
          for (int j = 0; j < kC; ++j) dx_before[i][j] = dx_chunk[i][j];
      }
    } else {
      for (int q = 0; q < tiles.chunks; ++q) {
        const int64_t first = me.token + q * me.strips * kT;
        if (first >= dims.l) break;
        Chunk<T, kC, kHalo> left, last, right, dy_right;
        Chunk<T, kC, kT> chunk, dy_chunk;
        load(left, x, first - kHalo);
        load(chunk, x, first);
        load(last, x, first + kT - kHalo);
        load(right, x, first + kT);
        load(dy_chunk, dy, first);
        load(dy_right, dy, first + kT);
        R beyond[kHalo][kC] = {}, dx_chunk[kT][kC] = {};
        add(true, first, left, chunk, dy_chunk, beyond, dx_chunk);
        add(false, first + kT, last, right, dy_right, dx_chunk + (kT - kHalo), beyond);
        store_chunk(dx, row, me.channel, first, dims, dx_chunk);
      }
    }
  }

  // The sums of the threads that share a channel, in the order of their strips.
#pragma unroll
  for (int k = 0; k <= kHalo; ++k)
#pragma unroll
    for (int j = 0; j < kC; ++j) s_sums[k][me.strip * tiles.channels + me.local_channel + j] = sums[k][j];
  __syncthreads();
  const int64_t group = blockIdx.y * tiles.token_tiles + me.token_tile, ld = padded(dims.d);
  R* partial = static_cast<R*>(p.partial) + group * (dims.w + 1) * ld + me.block_channel;
  for (int i = threadIdx.x; i < (dims.w + 1) * tiles.channels; i += kConvThreads) {
    const int k = i / tiles.channels, c = i % tiles.channels;  // k: as in weight, then the bias
    if (me.block_channel + c >= dims.d) continue;
    const R* from = s_sums[k < dims.w ? dims.w - 1 - k : kHalo] + c;
    R total = 0;
    for (int s = 0; s < me.strips; ++s) total += from[s * tiles.channels];
    partial[k * ld + c] = total;
  }
}

constexpr int kReduceColumns = 32, kReduceRows = 8;

// dweight and dbias: thread (column, row) of a block adds the groups row, row + 8, ... of its column, and the
// first row adds the 8 sums. In double: a long sequence has thousands of groups, and these are few additions.
template <class R>
__global__ void __launch_bounds__(kReduceColumns* kReduceRows)
    conv_reduce(const ConvBwd p, const Sequences seqs, int64_t groups) {
  __shared__ double s_sums[kReduceRows][kReduceColumns];
  const int64_t d = p.fwd.dims.d, w = p.fwd.dims.w, ld = padded(d);
  const int column = threadIdx.x % kReduceColumns, first = threadIdx.x / kReduceColumns;
  const int64_t tiles = (d + kReduceColumns - 1) / kReduceColumns;
  const int64_t k = blockIdx.x / tiles, c = blockIdx.x % tiles * kReduceColumns + column;
  const R* from = static_cast<const R*>(p.partial) + k * ld + c;
  double total = 0;
  if (c < d)
    for (int64_t g = first; g < groups; g += kReduceRows) total += from[g * (w + 1) * ld];
  s_sums[first][column] = total;
  __syncthreads();
  if (first != 0 || c >= d) return;
  for (int row = 1; row < kReduceRows; ++row) total += s_sums[row][column];
  if (is_invalid(seqs)) total = NAN;
  if (k < w)
    store_one(p.dweight, c * p.dweight.stride[0] + k * p.dweight.stride[1], total);
  else if (p.dbias.data)
    store_one(p.dbias, c * p.dbias.stride[0], total);
}

template <class R>
__device__ R conv_grad_at(const ConvBwd& p, const EdgeRun& run, int64_t channel, int64_t t) {
  const int w = p.fwd.dims.w;
  const View &weight = p.fwd.weight, &bias = p.fwd.bias;
  R c = bias.data ? load_one<R>(bias, channel * bias.stride[0]) : R(0);
#pragma unroll 1
  for (int k = 0; k < w; ++k)
    c += load_one<R>(weight, channel * weight.stride[0] + k * weight.stride[1]) *
         input_at<R>(p.fwd, run, channel, t - (w - 1) + k);
  const R dy = load_one<R>(p.dy, run.row * p.dy.stride[0] + channel * p.dy.stride[1] + t * p.dy.stride[2]);
  return through_activation(dy, c, p.fwd.dims.silu);
}

// gx~ of token t, which may lie w - 1 before the run: sum_m W_m gc_{t+m}, and dfinal where t is among the
// last w - 1.
template <class R>
__device__ R input_grad_at(const ConvBwd& p, const EdgeRun& run, int64_t c, int64_t t) {
  const int w = p.fwd.dims.w;
  const View& weight = p.fwd.weight;
  R grad = 0;
#pragma unroll 1
  for (int m = 0; m < w; ++m)
    if (t + m >= run.begin && t + m < run.end)
      grad += load_one<R>(weight, c * weight.stride[0] + (w - 1 - m) * weight.stride[1]) *
              conv_grad_at<R>(p, run, c, t + m);
  const View& s = p.dfinal;
  const int64_t k = t - (run.end - (w - 1));
  if (s.data && run.state_out >= 0 && k >= 0)
    grad += load_one<R>(s, run.state_out * s.stride[0] + c * s.stride[1] + k * s.stride[2]);
  return grad;
}

template <class R>
__global__ void __launch_bounds__(kConvThreads)
    conv_edges(const ConvBwd p, const Sequences seqs, int64_t states) {
  const bool invalid = is_invalid(seqs);
  const int64_t c = int64_t(blockIdx.x) * kConvThreads + threadIdx.x, halo = p.fwd.dims.w - 1;
  if (c >= p.fwd.dims.d) return;
  for (int64_t r = blockIdx.y; r < states; r += gridDim.y) {
    if (const View& s = p.dinitial; s.data) {
      const EdgeRun run = edge_run<false>(p.fwd, seqs, r);
      for (int k = 0; k < halo; ++k)
        store_one(s, r * s.stride[0] + c * s.stride[1] + k * s.stride[2],
                  invalid ? R(NAN) : input_grad_at<R>(p, run, c, run.begin - halo + k));
    }
    if (p.dfinal.data && !invalid) {
      const EdgeRun run = edge_run<true>(p.fwd, seqs, r);
      for (int64_t t = run.end - halo; t < run.end; ++t)
        if (t >= run.begin)
          store_one(p.dx, run.row * p.dx.stride[0] + c * p.dx.stride[1] + t * p.dx.stride[2],
                    input_grad_at<R>(p, run, c, t));
    }
  }
}

int64_t groups_of(const ConvDims& dims, const ConvTiles& tiles) {
  return dims.b * dims.d * dims.l > 0 ? tiles.grid.y * tiles.token_tiles : 0;
}

}  // namespace

}  // namespace gpu

int64_t causal_conv1d_groups_cuda(const ConvFwd& p) {
  using namespace gpu;
  return by_layout(p.dims, p.x, [&]<class T, int kC, int kT>() {
    return groups_of(p.dims, conv_tiles<kC, kT>(p.dims, kMaxChunks));
  });
}

const char* causal_conv1d_bwd_cuda(const ConvBwd& p, const Sequences& seqs, int64_t states,
                                   void* cuda_stream) {
  using namespace gpu;
  const ConvDims& dims = p.fwd.dims;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  if (dims.b * dims.d * dims.l > 0) {
    const char* error = by_layout(dims, p.fwd.x, [&]<class T, int kC, int kT>() -> const char* {
      const ConvTiles tiles = conv_tiles<kC, kT>(dims, kMaxChunks);
      if (!tiles.fits()) return "more tiles than one launch may have";
      conv_bwd<T, kC, kT><<<tiles.grid, kConvThreads, 0, stream>>>(
          p, tokens<T, kC, kT>(p.fwd.x, dims), tokens<T, kC, kT>(p.dy, dims), tokens<T, kC, kT>(p.dx, dims),
          seqs, tiles);
      return launch_error();
    });
    if (error) return error;
  }
  const bool wide = p.fwd.x.dtype == DType::f64;
  if (dims.d > 0) {
    const int64_t blocks = (dims.w + 1) * ((dims.d + kReduceColumns - 1) / kReduceColumns);
    const auto reduce = wide ? conv_reduce<double> : conv_reduce<float>;
    reduce<<<unsigned(blocks), kReduceColumns * kReduceRows, 0, stream>>>(p, seqs,
                                                                          causal_conv1d_groups_cuda(p.fwd));
  }
  if ((p.dinitial || p.dfinal) && states * dims.d > 0) {
    const auto edges = wide ? conv_edges<double> : conv_edges<float>;
    edges<<<edge_grid(dims, states), kConvThreads, 0, stream>>>(p, seqs, states);
  }
  return launch_error();
}

}  // namespace mamba_ops

// Causal depthwise convolution, forward (math: kernels/causal_conv1d.h).
//
//   c_t = bias + sum_m W_m x~_{t-m} (m steps back, m < w);  y_t = silu(c_t) or c_t;  final = last w - 1 of x~
//
// A block owns a tile of channels and tokens of one batch row, a thread kC channels and a stretch of the
// tokens (see causal_conv1d.cuh). While it computes a chunk its next chunk is on the way; the neighbours on
// the left stay in registers where channels are contiguous. Shared memory: the taps, 5 x 128 values (2.5 KiB
// in float, 5 in double). Final states: a second, small kernel, a channel a thread. No value is summed by two
// threads: bitwise repeatable.
#include "kernels/cuda/causal_conv1d.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kMaxChunks = 8;  // of conv_tiles

template <bool kWhole, class T, int kC, int kT>
__device__ void convolve(const Inputs<kWhole, T, kC, kT>& x, const Taps<Real<T>, kC>& taps,
                         Real<T> (&y)[kT][kC]) {
  const ConvDims& dims = x.p.dims;
#pragma unroll
  for (int i = 0; i < kT; ++i) {
    const auto reach = x.reach(i);
#pragma unroll
    for (int j = 0; j < kC; ++j) {
      Real<T> c = taps.bias[j];
#pragma unroll
      for (int m = kHalo - 1; m >= 0; --m)
        if (m < dims.w) c += taps.weight[m][j] * x.tap(reach, i, m, j);
      y[i][j] = dims.silu ? silu(c) : c;
    }
  }
}

template <class T, int kC, int kT>
__global__ void __launch_bounds__(kConvThreads, 4)
    conv_fwd(const ConvFwd p, const Tokens<T> x, const Tokens<T> y, const Sequences seqs,
             const ConvTiles tiles) {
  using R = Real<T>;
  __shared__ R s_taps[(kHalo + 1) * kConvChannels];
  const ConvThread<kC, kT> me(tiles);
  load_taps(s_taps, p, seqs, me.block_channel, tiles.channels);
  __syncthreads();
  const ConvDims& dims = p.dims;
  if (me.channel >= dims.d) return;
  const Taps<R, kC> taps(s_taps, me.local_channel);

  constexpr bool kWalk = kC > 1;
  const int step = kWalk ? kT : me.strips * kT;
  for (int64_t row = blockIdx.y; row < dims.b; row += gridDim.y) {
    Chunk<T, kC, kHalo> left;
    Chunk<T, kC, kT> chunk, next;
    next.load(x, row, me.channel, me.token, dims);
    if constexpr (kWalk) left.load(x, row, me.channel, me.token - kHalo, dims);
    for (int q = 0; q < tiles.chunks; ++q) {
      const int64_t first = me.token + q * step;
      if (first >= dims.l) break;
      if constexpr (kWalk) {
        if (q > 0) left = chunk;
      } else {
        left.load(x, row, me.channel, first - kHalo, dims);
      }
      chunk = next;
      if (q + 1 < tiles.chunks) next.load(x, row, me.channel, first + step, dims);
      const unsigned starts = run_starts<kHalo + kT>(seqs, row, first - kHalo, dims.l);
      R out[kT][kC];
      if (starts == 0)
        convolve<true, T, kC, kT>({p, seqs, left, chunk, starts, row, me.channel, first}, taps, out);
      else
        convolve<false, T, kC, kT>({p, seqs, left, chunk, starts, row, me.channel, first}, taps, out);
      store_chunk(y, row, me.channel, first, dims, out);
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kConvThreads)
    conv_final_state(const ConvFwd p, const Sequences seqs, int64_t states) {
  const bool invalid = is_invalid(seqs);
  const View& s = p.final_state;
  const int64_t c = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
  if (c >= p.dims.d) return;
  for (int64_t r = blockIdx.y; r < states; r += gridDim.y) {
    const EdgeRun run = edge_run<true>(p, seqs, r);
    for (int k = 0; k < p.dims.w - 1; ++k) {
      const R value = invalid ? R(NAN) : input_at<R>(p, run, c, run.end - (p.dims.w - 1) + k);
      store_one(s, r * s.stride[0] + c * s.stride[1] + k * s.stride[2], value);
    }
  }
}

}  // namespace

}  // namespace gpu

const char* causal_conv1d_fwd_cuda(const ConvFwd& p, const Sequences& seqs, int64_t states,
                                   void* cuda_stream) {
  using namespace gpu;
  const ConvDims& dims = p.dims;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  if (dims.b * dims.d * dims.l > 0) {
    const char* error = by_layout(dims, p.x, [&]<class T, int kC, int kT>() -> const char* {
      const ConvTiles tiles = conv_tiles<kC, kT>(dims, kMaxChunks);
      if (!tiles.fits()) return "more tiles than one launch may have";
      conv_fwd<T, kC, kT><<<tiles.grid, kConvThreads, 0, stream>>>(p, tokens<T, kC, kT>(p.x, dims),
                                                                   tokens<T, kC, kT>(p.y, dims), seqs, tiles);
      return launch_error();
    });
    if (error) return error;
  }
  if (p.final_state && states * dims.d > 0) {
    const auto kernel = p.x.dtype == DType::f64 ? conv_final_state<double> : conv_final_state<float>;
    kernel<<<edge_grid(dims, states), kConvThreads, 0, stream>>>(p, seqs, states);
  }
  return launch_error();
}

}  // namespace mamba_ops

// Causal depthwise convolution, forward (math: kernels/causal_conv1d.h).
//
//   c_t = bias + sum_m W_m x~_{t-m} (m steps back, m < w);  y_t = silu(c_t) or c_t;  final = last w - 1 of x~
//
// A block owns a tile of channels and tokens of one batch row, a thread kC channels and a stretch of the
// tokens (see causal_conv1d.cuh). While it computes a token, the next kT tokens are on the way. Final states:
// a second, small kernel, a channel a thread. No shared memory; no value is summed by two threads: bitwise
// repeatable.
//
// b4 d5376 l4096 bfloat16 channel-last, SiLU: 0.143 ms on an H100, 2.5 TB/s where a copy of as many bytes has
// 2.85. What remains is latency: 22 warps an SM (80 registers) wait for their loads, issue slots are 41 %
// busy.
#include "kernels/cuda/causal_conv1d.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kMaxChunks = 8, kTokens = 8;  // of conv_tiles; in flight where channels are contiguous

template <class R, int kC>
__device__ inline void output(R (&out)[kC], const Taps<R, kC>& taps, const Past<R, kC>& past,
                              const ConvDims& dims) {
#pragma unroll
  for (int j = 0; j < kC; ++j) out[j] = taps.convolve(past, j, dims.w);
  if (dims.silu)
#pragma unroll
    for (int j = 0; j < kC; ++j) out[j] = silu(out[j]);
}

template <class T, int kC, int kT, bool kVector>
__global__ void __launch_bounds__(kConvThreads, sizeof(T) == 2 ? 6 : 4)
    conv_fwd(const __grid_constant__ ConvFwd p, const __grid_constant__ Sequences seqs,
             const ConvTiles tiles) {
  using R = Real<T>;
  const ConvThread<kC, kT> me(tiles);
  const ConvDims& dims = p.dims;
  if (me.channel >= dims.d) return;
  const Tokens<T> x(p.x), y(p.y);
  const int channels = kVector ? kC : int(min(dims.d - me.channel, int64_t(kC)));
  const Taps<R, kC> taps(p, seqs, me.channel);

  for (int64_t row = blockIdx.y; row < dims.b; row += gridDim.y) {
    const T* const from = x.data + row * x.stride_b + me.channel * x.stride_d;
    T* const to = y.data + row * y.stride_b + me.channel * y.stride_d;
    Past<R, kC> past;
    if constexpr (kC > 1) {
      const int64_t strip_end = min(me.token + int64_t(tiles.chunks) * kT, dims.l);
      for (int64_t first = me.token, end; first < strip_end; first = end) {  // stretches of one run
        end = next_run(seqs, row, first + 1, strip_end);
        const int own = int(end - first);
        const T* ahead = from + first * x.stride_l;
        T* here = to + first * y.stride_l;
        const auto fetch = [&](int t) {
          const auto pack = load_some<kVector, kC>(ahead, x.stride_d, t < own ? channels : 0);
          ahead += x.stride_l;
          return pack;
        };
        Pack<T, kC> pack[kT];
#pragma unroll
        for (int i = 0; i < kT; ++i) pack[i] = fetch(i);
        if (is_inside(seqs, row, first))
#pragma unroll
          for (int m = 1; m < kHalo; ++m) {
            const auto before = load_some<kVector, kC>(from + (first - m) * x.stride_l, x.stride_d, channels);
#pragma unroll
            for (int j = 0; j < kC; ++j) past.at[m][j] = before.at(j);
          }
        else
          past = look_back<T, kC>(p, seqs, row, me.channel, first);
        for (int t = 0; t < own; t += kT)
#pragma unroll
          for (int i = 0; i < kT; ++i) {
#pragma unroll
            for (int j = 0; j < kC; ++j) past.at[0][j] = pack[i].at(j);
            pack[i] = fetch(t + i + kT);
            R out[kC];
            output(out, taps, past, dims);
            past.advance();
            store_some<kVector, kC>(here, y.stride_d, t + i < own ? channels : 0, out);
            here += y.stride_l;
          }
      }
    } else {
      const auto fetch = [&](int64_t first) {
        return load_some<kVector, kT>(from + first * x.stride_l, x.stride_l, dims.l - first);
      };
      const int64_t step = int64_t(me.strips) * kT;
      Pack<T, kT> next = fetch(me.token);
      for (int q = 0; q < tiles.chunks; ++q) {
        const int64_t strip = me.token + q * step, strip_end = min(strip + kT, dims.l);
        if (strip >= dims.l) break;
        const Pack<T, kT> pack = next;
        if (q + 1 < tiles.chunks) next = fetch(strip + step);
        R out[kT];
        for (int64_t first = strip, end; first < strip_end; first = end) {  // stretches of one run
          end = next_run(seqs, row, first + 1, strip_end);
          if (first == strip && is_inside(seqs, row, first)) {
            const auto before =
                load_some<kVector, kHalo>(from + (first - kHalo) * x.stride_l, x.stride_l, kHalo);
#pragma unroll
            for (int m = 1; m < kHalo; ++m) past.at[m][0] = before.at(kHalo - m);
          } else {
            past = look_back<T, kC>(p, seqs, row, me.channel, first);
          }
#pragma unroll
          for (int i = 0; i < kT; ++i) {
            if (strip + i < first) continue;
            R one[kC];
            past.at[0][0] = pack.at(i);
            output(one, taps, past, dims);
            past.advance();
            out[i] = one[0];
          }
        }
        store_some<kVector, kT>(to + strip * y.stride_l, y.stride_l, dims.l - strip, out);
      }
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
    const char* error = by_layout<kTokens>(dims, p.x, [&]<class T, int kC, int kT>() -> const char* {
      const ConvTiles tiles = conv_tiles<kC, kT>(dims, kMaxChunks);
      if (!tiles.fits()) return "more tiles than one launch may have";
      const bool vector = whole_packs<kC, kT>(p.x, dims) && whole_packs<kC, kT>(p.y, dims);
      const auto kernel =
          vector && sizeof(T) < 8 ? conv_fwd<T, kC, kT, sizeof(T) < 8> : conv_fwd<T, kC, kT, false>;
      kernel<<<tiles.grid, kConvThreads, 0, stream>>>(p, seqs, tiles);
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

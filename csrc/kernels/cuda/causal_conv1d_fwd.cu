// Causal depthwise convolution, forward (math: kernels/causal_conv1d.h).
//
//   c_t = bias + sum_m W_m x~_{t-m} (m steps back, m < w);  y_t = silu(c_t) or c_t;  final = last w - 1 of x~
//
// A block owns a tile of channels and tokens of one batch row, a thread kC channels and a stretch of the
// tokens (see causal_conv1d.cuh). The packs that it wants next are on their way into its own slots of shared
// memory (16 KiB a block along channels, 8 KiB along tokens; none where packs are not whole). Final states: a
// second, small kernel, a channel a thread. No value is summed by two threads: bitwise repeatable.
//
// Bound by memory: b4 d5376 l4096 bfloat16, SiLU, takes 0.094 ms channel-last and 0.101 channel-first on an
// H200, 3.7 and 3.5 TB/s where a copy has 4.2. Blocks live for 10 us or so: taps are read once the first
// packs are on their way. ncu (H100, stretches of 64 tokens instead of 32): DRAM at 80 % of its peak, issue
// slots 40 % busy.
#include "kernels/cuda/causal_conv1d.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

// Packs of conv_tiles. Where channels are contiguous: tokens of a step, tokens on their way. Elsewhere: packs
// on their way.
template <int kC>
constexpr int kMaxChunks = kC > 1 ? 8 : 16;
constexpr int kTokens = 4, kAhead = 16, kPacks = 4;

template <class R, int kC>
__device__ inline void output(R (&out)[kC], const Taps<R, kC>& taps, const Past<R, kC>& past, int w,
                              bool with_silu) {
#pragma unroll
  for (int j = 0; j < kC; ++j) out[j] = taps.convolve(past, j, w);
  if (with_silu)
#pragma unroll
    for (int j = 0; j < kC; ++j) out[j] = silu(out[j]);
}

template <class T, int kC, int kT, ConvForm kForm>
__global__ void __launch_bounds__(kConvThreads, sizeof(T) > 2 ? 4
                                                : kC > 1      ? 5
                                                              : 7)
    conv_fwd(const __grid_constant__ ConvFwd p, const __grid_constant__ Sequences seqs,
             const ConvTiles tiles) {
  using R = Real<T>;
  constexpr bool kVector = kForm != ConvForm::any, kFull = kForm == ConvForm::full, kLast = kC > 1;
  using Arrivals = Arrivals<T, kLast ? kC : kT, kLast ? kT : 1, kLast ? kAhead : kPacks, kVector>;
  __shared__ typename Arrivals::Slots s_arrivals;
  const ConvThread<kC, kT> me(tiles);
  const ConvDims& dims = p.dims;
  if (me.channel >= dims.d) return;
  const int w = kFull ? kHalo : dims.w;
  const bool with_silu = kFull || dims.silu;
  const Tokens<T> x(p.x), y(p.y);
  const int channels = kVector ? kC : int(min(dims.d - me.channel, int64_t(kC)));

  for (int64_t row = blockIdx.y; row < dims.b; row += gridDim.y) {
    const T* const from = x.data + row * x.stride_b + me.channel * x.stride_d;
    T* const to = y.data + row * y.stride_b + me.channel * y.stride_d;
    Past<R, kC> past;
    if constexpr (kC > 1) {
      const int64_t strip_end = min(me.token + int64_t(tiles.chunks) * kT, dims.l);
      for (int64_t first = me.token, end; first < strip_end; first = end) {  // stretches of one run
        end = next_run(seqs, row, first + 1, strip_end);
        const int own = int(end - first);
        Arrivals arrivals(s_arrivals, from + first * x.stride_l, own, x.stride_l, x.stride_d);
        T* here = to + first * y.stride_l;
        for (int t = 0; t < kAhead; t += kT) {
          arrivals.fetch(t);
          __pipeline_commit();
        }
        const Taps<R, kC> taps(p, seqs, me.channel);
        if (is_inside(seqs, row, first))
#pragma unroll
          for (int m = 1; m < kHalo; ++m) {
            const auto before = load_some<kVector, kC>(from + (first - m) * x.stride_l, x.stride_d, channels);
#pragma unroll
            for (int j = 0; j < kC; ++j) past.at[m][j] = before.at(j);
          }
        else
          past = look_back<T, kC>(p, seqs, row, me.channel, first);
        const auto walk = [&]<bool kWhole>(int begin) {
          __pipeline_wait_prior(kAhead / kT - 1);
#pragma unroll
          for (int i = 0; i < kT; ++i) {
            const auto now = arrivals.take(begin + i, begin + i < own ? channels : 0);
#pragma unroll
            for (int j = 0; j < kC; ++j) past.at[0][j] = now.at(j);
            R out[kC];
            output(out, taps, past, w, with_silu);
            past.advance();
            store_some<kVector, kC>(here, y.stride_d, kWhole || begin + i < own ? channels : 0, out);
            here += y.stride_l;
          }
          arrivals.fetch(begin + kAhead);
          __pipeline_commit();
        };
        int t = 0;
        for (; t + kT <= own; t += kT) walk.template operator()<true>(t);
        if (t < own) walk.template operator()<false>(t);
        __pipeline_wait_prior(0);
      }
    } else {
      const int64_t step = int64_t(me.strips) * kT, tile = me.token_tile * tiles.tokens;
      const int64_t tile_end = min(tile + tiles.tokens, dims.l);
      const int own = int(tile_end - me.token + step - 1) / kT >> tiles.lane_bits;
      Arrivals arrivals(s_arrivals, from + (own > 0 ? me.token * x.stride_l : 0), max(own, 1),
                        step * x.stride_l, x.stride_l);
      for (int q = 0; q < kPacks; ++q) {
        arrivals.fetch(q);
        __pipeline_commit();
      }
      auto carry =
          load_some<kVector, kHalo>(from + (tile - kHalo) * x.stride_l, x.stride_l, tile > 0 ? kHalo : 0);
      const Taps<R, kC> taps(p, seqs, me.channel);
      for (int q = 0; tile + q * step < tile_end; ++q) {
        const int64_t strip = me.token + q * step, strip_end = min(strip + kT, dims.l);
        __pipeline_wait_prior(kPacks - 1);
        const auto pack = arrivals.take(q, dims.l - strip);
        arrivals.fetch(q + kPacks);
        __pipeline_commit();
        const auto before = values_before(pack, carry, me.strip, me.strips);
        if (strip >= tile_end) continue;
        T* const here = to + strip * y.stride_l;
        if ((strip == 0 && p.initial_state.data) ||
            next_run(seqs, row, strip - (kHalo - 2), strip_end) < strip_end) {
          store_pack(here, y.stride_l, dims.l - strip, kVector,
                     convolve_runs<T, kT>(p, seqs, row, me.channel, strip, taps));
          continue;
        }
#pragma unroll
        for (int m = 1; m < kHalo; ++m) past.at[m][0] = before.at(kHalo - m);
        R out[kT];
#pragma unroll
        for (int k = 0; k < kT; ++k) {
          R one[kC];
          past.at[0][0] = pack.at(k);
          output(one, taps, past, w, with_silu);
          past.advance();
          out[k] = one[0];
        }
        store_some<kVector, kT>(here, y.stride_l, dims.l - strip, out);
      }
      __pipeline_wait_prior(0);
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
    const char* error = by_layout<kTokens, 4>(dims, p.x, [&]<class T, int kC, int kT>() -> const char* {
      const ConvTiles tiles = conv_tiles<kC, kT>(dims, kMaxChunks<kC>);
      if (!tiles.fits()) return "more tiles than one launch may have";
      const auto kernel = by_form<T, kC, kT>(dims, {&p.x, &p.y},
                                             [&]<ConvForm kForm>() { return conv_fwd<T, kC, kT, kForm>; });
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

// Causal depthwise convolution, forward (math: kernels/causal_conv1d.h).
//
//   c_t = bias + sum_m W_m x~_{t-m} (m steps back, m < w);  y_t = silu(c_t) or c_t;  final = last w - 1 of x~
//
// A block owns a tile of channels and tokens of one batch row, a thread kC channels and a stretch of the
// tokens (see causal_conv1d.cuh). Where channels are contiguous, the packs that it wants next are on their
// way into its own slots of shared memory (16 KiB a block; none where packs are not whole). Elsewhere it asks
// for all its packs, those of the tokens before and the taps at once, into registers: blocks are short, and
// what is on its way lies close together in memory. Final states: a second, small kernel, a channel a thread.
// No value is summed by two threads: bitwise repeatable.
//
// Bound by memory: b4 d5376 l4096 bfloat16, SiLU, takes 0.094 ms channel-last and 0.090 channel-first on an
// H200, where a copy of its bytes takes 0.086. Channel-last blocks live for 10 us or so: taps are read once
// the first packs are on their way. ncu (H100): DRAM at 82 % of its peak and channel-first at 86 %, issue
// slots 46 and 44 %.
#include "kernels/cuda/bits.cuh"
#include "kernels/cuda/causal_conv1d.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

// Where channels are contiguous: tokens of a step, tokens on their way. Elsewhere: packs of a thread.
constexpr int kTokens = 4, kAhead = 16, kPacks = 4;
template <int kC>
constexpr int kMaxChunks = kC > 1 ? 8 : kPacks;  // packs of conv_tiles

template <class R, int kC>
__device__ inline void output(R (&out)[kC], const Taps<R, kC>& taps, const Past<R, kC>& past, int w,
                              bool with_silu) {
#pragma unroll
  for (int j = 0; j < kC; ++j) out[j] = taps.convolve(past, j, w);
  if (with_silu)
#pragma unroll
    for (int j = 0; j < kC; ++j) out[j] = silu(out[j]);
}

// Where channels are contiguous.
template <class T, int kC, int kT, ConvForm kForm>
__global__ void __launch_bounds__(kConvThreads, sizeof(T) > 2 ? 4 : 5)
    conv_channels(const __grid_constant__ ConvFwd p, const __grid_constant__ Sequences seqs,
                  const ConvTiles tiles) {
  using R = Real<T>;
  constexpr bool kVector = kForm != ConvForm::any, kFull = kForm == ConvForm::full;
  using Arrivals = Arrivals<T, kC, kT, kAhead, kVector>;
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
  }
}

// The taps of one channel, all asked for before the first is waited for. kFull: there are kHalo.
template <class T, bool kFull>
__device__ inline Taps<Real<T>, 1> taps_at_once(const ConvFwd& p, const Sequences& seqs, int64_t channel) {
  using R = Real<T>;
  if constexpr (sizeof(T) == 8) {
    return Taps<R, 1>(p, seqs, channel);
  } else {
    const int w = kFull ? kHalo : p.dims.w;
    uint32_t bits[kHalo];
#pragma unroll
    for (int m = 0; m < kHalo; ++m)
      if (m < w)
        bits[m] = load_bits(p.weight, channel * p.weight.stride[0] + (w - 1 - m) * p.weight.stride[1]);
    const uint32_t bias = load_bits(p.bias, channel * p.bias.stride[0]);
    const R poison = is_invalid(seqs) ? R(NAN) : R(0);
    Taps<R, 1> taps;
#pragma unroll
    for (int m = 0; m < kHalo; ++m)
      taps.weight[m][0] = m < w ? poison + from_bits<T>(bits[m], p.weight.dtype) : R(0);
    taps.bias[0] = from_bits<T>(bias, p.bias.dtype);
    return taps;
  }
}

// Elsewhere. kRuns: runs begin within a row, or states enter, or a block takes several batch rows.
template <class T, int kT, ConvForm kForm, bool kRuns>
__global__ void __launch_bounds__(kConvThreads, sizeof(T) > 2                     ? 4
                                                : kRuns || kForm == ConvForm::any ? 7
                                                                                  : 10)
    conv_tokens(const __grid_constant__ ConvFwd p, const __grid_constant__ Sequences seqs,
                const ConvTiles tiles) {
  using R = Real<T>;
  constexpr bool kVector = kForm != ConvForm::any, kFull = kForm == ConvForm::full;
  constexpr int kAtOnce = kRuns || !kVector ? 2 : kPacks;
  const ConvThread<1, kT> me(tiles);
  const ConvDims& dims = p.dims;
  if (me.channel >= dims.d) return;
  const int w = kFull ? kHalo : dims.w;
  const Tokens<T> x(p.x), y(p.y);
  const int64_t stride_x = kVector ? 1 : x.stride_l, stride_y = kVector ? 1 : y.stride_l;
  const int step = me.strips * kT;  // from one pack to the next

  for (int64_t row = blockIdx.y; row < dims.b; row += gridDim.y) {
    for (int done = 0; done < tiles.chunks; done += kAtOnce) {
      const int64_t token = me.token + done * step;
      const int left = int(min(dims.l - token, int64_t(kPacks * step)));
      const auto exist = [&](int q) { return done + q < tiles.chunks ? left - q * step : 0; };
      const T* const from = x.data + row * x.stride_b + me.channel * x.stride_d + token * stride_x;
      T* const to = y.data + row * y.stride_b + me.channel * y.stride_d + token * stride_y;
      Pack<T, kT> packs[kAtOnce];
      Pack<T, kHalo> before[kAtOnce];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        packs[q] = load_some<kVector, kT>(from + q * step * stride_x, stride_x, exist(q));
        const bool inside = token + q > 0 && exist(q) > 0;
        before[q] =
            load_some<kVector, kHalo>(from + (q * step - kHalo) * stride_x, stride_x, inside ? kHalo : 0);
      }
      const Taps<R, 1> taps = taps_at_once<T, kFull>(p, seqs, me.channel);
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        if (exist(q) <= 0) continue;
        T* const here = to + q * step * stride_y;
        if constexpr (kRuns) {
          const int64_t first = token + q * step, end = min(first + kT, dims.l);
          if ((first == 0 && p.initial_state.data) || next_run(seqs, row, first - (kHalo - 2), end) < end) {
            store_pack(here, stride_y, exist(q), kVector,
                       convolve_runs<T, kT>(p, seqs, row, me.channel, first, taps));
            continue;
          }
        }
        Past<R, 1> past;
#pragma unroll
        for (int m = 1; m < kHalo; ++m) past.at[m][0] = before[q].at(kHalo - m);
        R out[kT];
#pragma unroll
        for (int k = 0; k < kT; ++k) {
          R one[1];
          past.at[0][0] = packs[q].at(k);
          output(one, taps, past, w, kFull || dims.silu);
          past.advance();
          out[k] = one[0];
        }
        store_some<kVector, kT>(here, stride_y, exist(q), out);
      }
      if (kAtOnce == kPacks) return;
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
      const bool runs = seqs.starts || p.initial_state || dims.b > tiles.grid.y;
      const auto kernel = by_form<T, kC, kT>(dims, {&p.x, &p.y}, [&]<ConvForm kForm>() {
        if constexpr (kC > 1)
          return conv_channels<T, kC, kT, kForm>;
        else
          return runs ? conv_tokens<T, kT, kForm, true> : conv_tokens<T, kT, kForm, false>;
      });
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

// Causal depthwise convolution, backward (math: kernels/causal_conv1d.h).
//
//   gc_t = gy_t silu'(c_t) or gy_t, with c_t computed again;  gx~_s = sum_m W_m gc_{s+m} (+ gfinal);
//   gW_m = sum_t gc_t x~_{t-m};  gbias = sum_t gc_t
//
// A block owns a tile of channels and tokens of one batch row, a thread kC channels and a stretch of the
// tokens (see causal_conv1d.cuh). It walks x and dy from left to right, the next ones on their way; gc
// of a token completes dx of the token kHalo - 1 before it, so that a stretch takes kHalo - 1 tokens more
// than it has. dweight and dbias are summed over the thread's own tokens in registers, then over the threads
// that share a channel, in order, in shared memory: one partial per group (a tile of tokens of one row of the
// grid). conv_reduce adds the groups. No atomics, every order is fixed by the sizes: bitwise repeatable, and
// the same on every GPU. Where states enter or leave, conv_edges computes dinitial, and dx of the last w - 1
// tokens anew with dfinal added. Shared memory: sums 5 x kC x 128 values (at most 10 KiB), and the tokens of
// x and dy on their way, 32 KiB.
//
// Bound by memory: b4 d5376 l4096 bfloat16 channel-last, SiLU, takes 0.210 ms on an H100, conv_reduce
// included: 2.52 TB/s where a copy has 3.0. ncu: DRAM at 83 % of its peak in conv_bwd, issue slots 54 %.
#include "kernels/cuda/causal_conv1d.cuh"
#include "kernels/cuda/reduce.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

// Packs of conv_tiles; where channels are contiguous, tokens of a step and tokens on their way.
constexpr int kMaxChunks = 16, kTokens = 4, kAhead = 16;

// Sums of dweight by distance, then of dbias.
template <class R, int kC>
struct Sums {
  R of[kHalo + 1][kC];
};

// dx of tokens that gc of later ones still adds to: at[m] of the token m + 1 before the next one.
template <class R, int kC>
struct Pending {
  R at[kHalo - 1][kC];
};

// gc of the token past[0], added to what it is part of. finished: dx of the token kHalo - 1 before it.
// kMasked: the run may have ended (gc = 0), and the token may be another thread's (no sums).
template <bool kMasked, class R, int kC>
__device__ inline void add_grad(const Taps<R, kC>& taps, const Past<R, kC>& past, const R (&dy)[kC], int w,
                                bool silu, bool exists, bool own, Sums<R, kC>& sums, Pending<R, kC>& pending,
                                R (&finished)[kC]) {
  R grad[kC];
#pragma unroll
  for (int j = 0; j < kC; ++j) grad[j] = dy[j];
  if (silu)
#pragma unroll
    for (int j = 0; j < kC; ++j) grad[j] *= silu_grad(taps.convolve(past, j, w));
#pragma unroll
  for (int j = 0; j < kC; ++j) {
    R g = grad[j];
    if (kMasked && !exists) g = 0;
    const R share = kMasked && !own ? R(0) : g;
    R part[kHalo];  // of dx of the token m before
#pragma unroll
    for (int m = 0; m < kHalo; ++m) {
      part[m] = m == 0 ? R(0) : pending.at[m - 1][j];
      if (m >= w) continue;
      sums.of[m][j] += share * past.at[m][j];
      part[m] += taps.weight[m][j] * g;
    }
    sums.of[kHalo][j] += share;
    finished[j] = part[kHalo - 1];
#pragma unroll
    for (int m = 0; m < kHalo - 1; ++m) pending.at[m][j] = part[m];
  }
}

template <class T, int kC, int kT, ConvForm kForm>
__global__ void __launch_bounds__(kConvThreads, kC == 1 || kForm == ConvForm::full ? 4 : 3)
    conv_bwd(const __grid_constant__ ConvBwd p, const __grid_constant__ Sequences seqs,
             const ConvTiles tiles) {
  using R = Real<T>;
  __shared__ R s_sums[kHalo + 1][kConvThreads * kC];
  constexpr bool kVector = kForm != ConvForm::any, kFull = kForm == ConvForm::full;
  constexpr bool kLast = kC > 1;
  using Arrivals = Arrivals<T, kLast ? kC : 2, kTokens, kLast ? kAhead : kTokens, kVector && kLast>;
  __shared__ typename Arrivals::Slots s_x, s_dy;
  const ConvDims& dims = p.fwd.dims;
  const int w = kFull ? kHalo : dims.w;
  const bool silu = kFull || dims.silu;
  const ConvThread<kC, kT> me(tiles);
  const Tokens<T> x(p.fwd.x), dy(p.dy), dx(p.dx);
  const int channels = kVector ? kC : int(min(dims.d - me.channel, int64_t(kC)));
  const Taps<R, kC> taps(p.fwd, seqs, me.channel);
  Sums<R, kC> sums = {};

  for (int64_t row = blockIdx.y; row < dims.b && me.channel < dims.d; row += gridDim.y) {
    const T* const from_x = x.data + row * x.stride_b + me.channel * x.stride_d;
    const T* const from_dy = dy.data + row * dy.stride_b + me.channel * dy.stride_d;
    T* const to = dx.data + row * dx.stride_b + me.channel * dx.stride_d;
    // Where the run of token t ends, as far as tokens before `end` may be concerned.
    const auto run_end = [&](int64_t t, int64_t end) {
      return next_run(seqs, row, t + 1, min(end + kHalo - 1, dims.l));
    };
    Past<R, kC> past;
    if constexpr (kC > 1) {
      const int64_t strip_end = min(me.token + int64_t(tiles.chunks) * kT, dims.l);
      for (int64_t first = me.token, end; first < strip_end; first = end) {  // stretches of one run
        const int64_t last = run_end(first, strip_end);
        end = min(last, strip_end);
        // Tokens from here on are counted from `first`.
        const int own = int(end - first), exist = int(min(end + kHalo - 1, last) - first);
        Arrivals arrivals_x(s_x, from_x + first * x.stride_l, exist, x.stride_l, x.stride_d);
        Arrivals arrivals_dy(s_dy, from_dy + first * dy.stride_l, exist, dy.stride_l, dy.stride_d);
        const auto fetch = [&](int t) {
          arrivals_x.fetch(t);
          arrivals_dy.fetch(t);
          __pipeline_commit();
        };
        T* done = to + (first - (kHalo - 1)) * dx.stride_l;
        for (int t = 0; t < kAhead; t += kT) fetch(t);
        if (is_inside(seqs, row, first))
#pragma unroll
          for (int m = 1; m < kHalo; ++m) {
            const auto before =
                load_some<kVector, kC>(from_x + (first - m) * x.stride_l, x.stride_d, channels);
#pragma unroll
            for (int j = 0; j < kC; ++j) past.at[m][j] = before.at(j);
          }
        else
          past = look_back<T, kC>(p.fwd, seqs, row, me.channel, first);
        Pending<R, kC> pending = {};
        const auto walk = [&]<bool kMasked>(int begin) {
          __pipeline_wait_prior(kAhead / kT - 1);
#pragma unroll
          for (int i = 0; i < kT; ++i) {
            const int t = begin + i;
            const int count = t < exist ? channels : 0;
            const auto now_x = arrivals_x.take(t, count), now_dy = arrivals_dy.take(t, count);
            R gy[kC], finished[kC];
#pragma unroll
            for (int j = 0; j < kC; ++j) {
              past.at[0][j] = now_x.at(j);
              gy[j] = now_dy.at(j);
            }
            add_grad<kMasked>(taps, past, gy, w, silu, t < exist, t < own, sums, pending, finished);
            past.advance();
            const bool mine = t >= kHalo - 1 && (!kMasked || t < own + kHalo - 1);
            store_some<kVector, kC>(done, dx.stride_d, mine ? channels : 0, finished);
            done += dx.stride_l;
          }
          fetch(begin + kAhead);
        };
        int t = 0;
        for (; t + kT <= own; t += kT) walk.template operator()<false>(t);
        for (; t < own + kHalo - 1; t += kT) walk.template operator()<true>(t);
        __pipeline_wait_prior(0);
      }
    } else {
      for (int q = 0; q < tiles.chunks; ++q) {
        const int64_t strip = me.token + q * int64_t(me.strips) * kT, strip_end = min(strip + kT, dims.l);
        if (strip >= dims.l) break;
        const auto load = [&]<int kN>(const T* from, int64_t stride, int64_t t) {
          return load_some<kVector, kN>(from + t * stride, stride, dims.l - t);
        };
        const auto own_x = load.template operator()<kT>(from_x, x.stride_l, strip);
        const auto own_dy = load.template operator()<kT>(from_dy, dy.stride_l, strip);
        const auto right_x = load.template operator()<kHalo>(from_x, x.stride_l, strip + kT);
        const auto right_dy = load.template operator()<kHalo>(from_dy, dy.stride_l, strip + kT);
        R out[kT];
        for (int64_t first = strip, end; first < strip_end; first = end) {  // stretches of one run
          const int64_t last = run_end(first, strip_end);
          end = min(last, strip_end);
          if (first == strip && is_inside(seqs, row, first)) {
            const auto left = load.template operator()<kHalo>(from_x, x.stride_l, first - kHalo);
#pragma unroll
            for (int m = 1; m < kHalo; ++m) past.at[m][0] = left.at(kHalo - m);
          } else {
            past = look_back<T, kC>(p.fwd, seqs, row, me.channel, first);
          }
          Pending<R, kC> pending = {};
          const int begin = int(first - strip), own = int(end - strip), exist = int(last - strip);
#pragma unroll
          for (int i = 0; i < kT + kHalo - 1; ++i) {
            if (i < begin) continue;
            R gy[kC], finished[kC];
            past.at[0][0] = i < kT ? own_x.at(i) : right_x.at(i - kT);
            gy[0] = i < kT ? own_dy.at(i) : right_dy.at(i - kT);
            add_grad<true>(taps, past, gy, w, silu, i < exist, i < own, sums, pending, finished);
            past.advance();
            if (const int done = i - (kHalo - 1); done >= begin && done < own)
              out[i - (kHalo - 1)] = finished[0];
          }
        }
        store_some<kVector, kT>(to + strip * dx.stride_l, dx.stride_l, dims.l - strip, out);
      }
    }
  }

  // The sums of the threads that share a channel, in the order of their strips.
#pragma unroll
  for (int k = 0; k <= kHalo; ++k)
#pragma unroll
    for (int j = 0; j < kC; ++j) s_sums[k][me.strip * tiles.channels + me.local_channel + j] = sums.of[k][j];
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

// dweight and dbias.
template <class R>
__global__ void __launch_bounds__(kReduceThreads)
    conv_reduce(const ConvBwd p, const Sequences seqs, int64_t groups) {
  const int64_t d = p.fwd.dims.d, w = p.fwd.dims.w, ld = padded(d), tiles = reduce_blocks(d);
  const int64_t k = blockIdx.x / tiles,
                c = blockIdx.x % tiles * kReduceColumns + threadIdx.x % kReduceColumns;
  double total = sum_column(static_cast<const R*>(p.partial) + k * ld + c, groups, (w + 1) * ld, c < d);
  if (threadIdx.x >= kReduceColumns || c >= d) return;
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
  return p.fwd.dims.silu ? dy * silu_grad(c) : dy;
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
  return by_layout<kTokens, 8>(p.dims, p.x, [&]<class T, int kC, int kT>() {
    return groups_of(p.dims, conv_tiles<kC, kT>(p.dims, kMaxChunks));
  });
}

const char* causal_conv1d_bwd_cuda(const ConvBwd& p, const Sequences& seqs, int64_t states,
                                   void* cuda_stream) {
  using namespace gpu;
  const ConvDims& dims = p.fwd.dims;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  if (dims.b * dims.d * dims.l > 0) {
    const char* error = by_layout<kTokens, 8>(dims, p.fwd.x, [&]<class T, int kC, int kT>() -> const char* {
      const ConvTiles tiles = conv_tiles<kC, kT>(dims, kMaxChunks);
      if (!tiles.fits()) return "more tiles than one launch may have";
      const auto kernel = by_form<T, kC, kT>(dims, {&p.fwd.x, &p.dy, &p.dx},
                                             [&]<ConvForm kForm>() { return conv_bwd<T, kC, kT, kForm>; });
      kernel<<<tiles.grid, kConvThreads, 0, stream>>>(p, seqs, tiles);
      return launch_error();
    });
    if (error) return error;
  }
  const bool wide = p.fwd.x.dtype == DType::f64;
  if (dims.d > 0) {
    const auto reduce = wide ? conv_reduce<double> : conv_reduce<float>;
    reduce<<<unsigned((dims.w + 1) * reduce_blocks(dims.d)), kReduceThreads, 0, stream>>>(
        p, seqs, causal_conv1d_groups_cuda(p.fwd));
  }
  if ((p.dinitial || p.dfinal) && states * dims.d > 0) {
    const auto edges = wide ? conv_edges<double> : conv_edges<float>;
    edges<<<edge_grid(dims, states), kConvThreads, 0, stream>>>(p, seqs, states);
  }
  return launch_error();
}

}  // namespace mamba_ops

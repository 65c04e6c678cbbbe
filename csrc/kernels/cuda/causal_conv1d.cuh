// What forward and backward of the causal convolution share: how a launch is cut, a thread's tokens, its
// taps.
//
// A thread owns kC channels and walks strips of tokens from left to right, with the last kHalo - 1 inputs in
// registers. Where channels are contiguous in memory kC > 1, a pack is one token of kC channels, the lanes of
// a warp lie along the channels, and a strip is all the tokens that a thread has. Elsewhere kC = 1, a pack is
// kT tokens, the lanes lie along the tokens, and a strip is one pack; the strips of a thread are a row of
// lanes apart. Any strides are right: see ConvForm.
#pragma once
#include <cuda_pipeline.h>

#include <algorithm>
#include <climits>
#include <cmath>

#include "kernels/causal_conv1d.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/sequences.cuh"

namespace mamba_ops::gpu {

inline constexpr int kConvThreads = 128;
inline constexpr int kHalo = 4;  // taps; a strip sees one token less of its neighbours

// What a kernel is compiled for: anything, moved value by value; whole, aligned packs; and those with kHalo
// taps and SiLU.
enum class ConvForm { any, packs, full };

// ---- Host: tiles and tensors

// A (b, d, l) tensor with its storage type.
template <class T>
struct Tokens {
  T* data;
  int64_t stride_b, stride_d, stride_l;

  __device__ explicit Tokens(const View& v)
      : data(static_cast<T*>(v.data)), stride_b(v.stride[0]), stride_d(v.stride[1]), stride_l(v.stride[2]) {}
};

// Whether all packs of a tensor are whole, contiguous and aligned.
template <int kC, int kT>
bool whole_packs(const View& v, const ConvDims& dims) {
  return kC > 1 ? dims.d % kC == 0 && packs_align(v, 1, {dims.b, dims.l}, kC)
                : dims.l % kT == 0 && packs_align(v, 2, {dims.b, dims.d}, kT);
}

// Whether neighbours in memory are channels rather than tokens.
inline bool channel_last(const ConvDims& dims, const View& x) {
  return dims.d > 1 && (dims.l == 1 || x.stride[1] < x.stride[2]);
}

// A block takes one tile of one batch row; each of its threads takes `chunks` times kT tokens of it.
struct ConvTiles {
  int lane_bits;  // log2 of the threads of a block along the contiguous axis
  int chunks;
  int channels, tokens;  // of a tile
  int64_t channel_tiles, token_tiles;
  dim3 grid;  // (tiles of a row, rows); more rows than the grid may have are taken in turns

  bool fits() const { return channel_tiles * token_tiles <= INT_MAX; }
};

template <int kC, int kT>
ConvTiles conv_tiles(const ConvDims& dims, int max_chunks) {
  constexpr int64_t kEnoughBlocks = 1024;
  const int64_t channel_packs = (dims.d + kC - 1) / kC, all_chunks = (dims.l + kT - 1) / kT;
  ConvTiles tiles{};
  while (tiles.lane_bits < 5 && (1 << tiles.lane_bits) < (kC > 1 ? channel_packs : all_chunks))
    ++tiles.lane_bits;
  const int lanes = 1 << tiles.lane_bits, others = kConvThreads / lanes;
  const int64_t blocks_of_one_chunk = dims.b * channel_packs * all_chunks / kConvThreads;
  tiles.chunks = int(std::clamp<int64_t>(blocks_of_one_chunk / kEnoughBlocks, 1, max_chunks));
  tiles.channels = kC > 1 ? lanes * kC : others;
  tiles.tokens = (kC > 1 ? others : lanes) * kT * tiles.chunks;
  tiles.channel_tiles = (dims.d + tiles.channels - 1) / tiles.channels;
  tiles.token_tiles = (dims.l + tiles.tokens - 1) / tiles.tokens;
  tiles.grid = {unsigned(tiles.channel_tiles * tiles.token_tiles), unsigned(std::min(dims.b, kMaxGrid))};
  return tiles;
}

// f.template operator()<T, kC, kT>() for the storage type and the layout of x. A pack of channels is 8 bytes
// (16 of double): more would take registers away from threads, and those keep more bytes in flight. A pack of
// tokens has 8 values, kWidePack of float and double.
template <int kTokens, int kWidePack, class F>
auto by_layout(const ConvDims& dims, const View& x, F f) {
  return by_storage(x.dtype, [&]<class T>() {
    constexpr int kC = sizeof(T) == 2 ? 4 : 2;
    constexpr int kPack = sizeof(T) == 2 ? 8 : kWidePack;
    return channel_last(dims, x) ? f.template operator()<T, kC, kTokens>()
                                 : f.template operator()<T, 1, kPack>();
  });
}

// f.template operator()<form>() for a call of these tensors.
template <class T, int kC, int kT, class F>
auto by_form(const ConvDims& dims, std::initializer_list<const View*> tensors, F f) {
  if constexpr (sizeof(T) < 8) {
    bool whole = true;
    for (const View* v : tensors) whole = whole && whole_packs<kC, kT>(*v, dims);
    if (whole && dims.w == kHalo && dims.silu) return f.template operator()<ConvForm::full>();
    if (whole) return f.template operator()<ConvForm::packs>();
  }
  return f.template operator()<ConvForm::any>();
}

// ---- Device

// Where a thread stands in its block's tile. Its strip is a stretch of tokens that it walks; kC = 1 has
// `chunks` of them.
template <int kC, int kT>
struct ConvThread {
  int64_t block_channel, channel;  // first ones of the block and of the thread
  int local_channel;               // channel - block_channel
  int64_t token_tile, token;       // token: where the thread's first strip begins
  int strip, strips;               // which of the threads that share a channel, of how many

  __device__ explicit ConvThread(const ConvTiles& tiles) {
    constexpr bool kChannelLast = kC > 1;
    const unsigned inner = unsigned(kChannelLast ? tiles.channel_tiles : tiles.token_tiles);
    const unsigned across = blockIdx.x / inner, along = blockIdx.x - across * inner;
    const int lane = threadIdx.x & ((1 << tiles.lane_bits) - 1), other = threadIdx.x >> tiles.lane_bits;
    block_channel = int64_t(kChannelLast ? along : across) * tiles.channels;
    local_channel = kChannelLast ? lane * kC : other;
    channel = block_channel + local_channel;
    strip = kChannelLast ? other : lane;
    strips = kChannelLast ? kConvThreads >> tiles.lane_bits : 1 << tiles.lane_bits;
    token_tile = kChannelLast ? across : along;
    token = token_tile * tiles.tokens + strip * (kChannelLast ? kT * tiles.chunks : kT);
  }
};

// N values from p on, as many of them as there are; kVector: all of them or none.
template <bool kVector, int N, class T>
__device__ inline Pack<T, N> load_some(const T* p, int64_t stride, int64_t count) {
  if constexpr (kVector) {
    return count > 0 ? *reinterpret_cast<const Pack<T, N>*>(p) : Pack<T, N>{};
  } else {
    return load_pack<N>(p, stride, count, false);
  }
}
template <bool kVector, int N, class T>
__device__ inline void store_some(T* p, int64_t stride, int64_t count, const Real<T> (&v)[N]) {
  if constexpr (kVector) {
    if (count > 0) *reinterpret_cast<Pack<T, N>*>(p) = to_pack<T>(v);
  } else {
    store_pack(p, stride, count, false, to_pack<T>(v));
  }
}

// A thread's packs of N values on their way, kAhead of them, through slots of its own in shared memory; kT at
// a time. Where packs are not whole they are read when they are wanted.
template <class T, int N, int kT, int kAhead, bool kVector>
struct Arrivals {
  using Slot = Pack<T, N>;
  using Slots = Slot[kVector ? kAhead : 1][kConvThreads];
  static_assert(kAhead % kT == 0 && (kAhead & (kAhead - 1)) == 0);

  Slots& slots;
  const T *from, *ahead;  // the first pack, the next one to fetch
  int64_t step, stride;   // from one pack to the next, from one value to the next
  int exist;              // packs, at least one
  uint32_t address;       // of the thread's first slot

  __device__ Arrivals(Slots& memory, const T* first, int packs, int64_t step, int64_t stride)
      : slots(memory),
        from(first),
        ahead(first),
        step(step),
        stride(stride),
        exist(packs),
        address(static_cast<uint32_t>(__cvta_generic_to_shared(&memory[0][threadIdx.x]))) {}

  // Packs t .. t + kT - 1, beyond the last one that again; called for t = 0, kT, ...
  __device__ void fetch(int t) {
    if constexpr (kVector) {
      constexpr unsigned kRow = sizeof(slots[0]);
      const uint32_t to = address + (t & (kAhead - 1)) * kRow;
#pragma unroll
      for (int i = 0; i < kT; ++i) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to + i * kRow), "l"(ahead),
                     "n"(sizeof(Slot))
                     : "memory");
        if (t + i + 1 < exist) ahead += step;
      }
    }
  }
  // Pack t, of which there are `count` values, if a pack need not be whole.
  __device__ Slot take(int t, int64_t count) const {
    if constexpr (kVector)
      return slots[t & (kAhead - 1)][threadIdx.x];
    else
      return load_pack<N>(from + t * step, stride, count, false);
  }
};

// The inputs at and before a token of a thread's channels: at[m] is m tokens back.
template <class R, int kC>
struct Past {
  R at[kHalo][kC];

  __device__ void advance() {
#pragma unroll
    for (int m = kHalo - 1; m > 0; --m)
#pragma unroll
      for (int j = 0; j < kC; ++j) at[m][j] = at[m - 1][j];
  }
};

// The taps of a thread's channels (beyond the last one: its own): weight[m] meets the token m steps back. NaN
// where the offsets are invalid.
template <class R, int kC>
struct Taps {
  R weight[kHalo][kC], bias[kC];

  Taps() = default;
  __device__ Taps(const ConvFwd& p, const Sequences& seqs, int64_t channel) {
    const R poison = is_invalid(seqs) ? R(NAN) : R(0);
    const auto clamped = [&](int j) { return min(channel + j, p.dims.d - 1); };
    with_data(p.weight, [&](const auto* data) {
#pragma unroll
      for (int j = 0; j < kC; ++j)
#pragma unroll
        for (int m = 0; m < kHalo; ++m)
          weight[m][j] =
              m < p.dims.w
                  ? poison +
                        R(to_real(
                            data[clamped(j) * p.weight.stride[0] + (p.dims.w - 1 - m) * p.weight.stride[1]]))
                  : R(0);
    });
#pragma unroll
    for (int j = 0; j < kC; ++j) bias[j] = 0;
    if (p.bias.data)
      with_data(p.bias, [&](const auto* data) {
#pragma unroll
        for (int j = 0; j < kC; ++j) bias[j] = to_real(data[clamped(j) * p.bias.stride[0]]);
      });
  }
  __device__ R convolve(const Past<R, kC>& past, int j, int w) const {
    R out = bias[j];
#pragma unroll
    for (int m = kHalo - 1; m >= 0; --m)
      if (m < w) out += weight[m][j] * past.at[m][j];
    return out;
  }
};

template <class T>
__device__ inline Real<T> value_at(const View& v, int64_t i, int64_t channel, int64_t k) {
  return to_real(static_cast<const T*>(v.data)[i * v.stride[0] + channel * v.stride[1] + k * v.stride[2]]);
}

// What lies before token t: tokens of its run, then the run's initial state. Where runs begin, out of the way
// of the kernels' registers.
template <class T, int kC>
__device__ __noinline__ Past<Real<T>, kC> look_back(const ConvFwd& p, const Sequences& seqs, int64_t row,
                                                    int64_t channel, int64_t t) {
  int reach = 0;
  while (reach < kHalo - 1 && t - reach > 0 && !begins(seqs, row, t - reach)) ++reach;
  const int64_t state =
      p.initial_state.data && reach < kHalo - 1 ? state_row(seqs, row, t - reach) : int64_t(-1);
  Past<Real<T>, kC> past = {};
#pragma unroll
  for (int m = 1; m < kHalo; ++m)
#pragma unroll
    for (int j = 0; j < kC; ++j)
      if (m < p.dims.w && channel + j < p.dims.d) {
        if (m <= reach)
          past.at[m][j] = value_at<T>(p.x, row, channel + j, t - m);
        else if (state >= 0)
          past.at[m][j] = value_at<T>(p.initial_state, state, channel + j, p.dims.w - 1 - m + reach);
      }
  return past;
}

// y of a pack of tokens in which runs begin, one after the other; out of the way as well.
template <class T, int kT>
__device__ __noinline__ Pack<T, kT> convolve_runs(const ConvFwd& p, const Sequences& seqs, int64_t row,
                                                  int64_t channel, int64_t first, Taps<Real<T>, 1> taps) {
  Pack<T, kT> out;
  Past<Real<T>, 1> past;
#pragma unroll 1
  for (int k = 0; k < kT && first + k < p.dims.l; ++k) {
    if (k == 0 || begins(seqs, row, first + k)) past = look_back<T, 1>(p, seqs, row, channel, first + k);
    past.at[0][0] = value_at<T>(p.x, row, channel, first + k);
    const Real<T> c = taps.convolve(past, 0, p.dims.w);
    out.set(k, from_real<T>(p.dims.silu ? silu(c) : c));
    past.advance();
  }
  return out;
}

// Whether all kHalo - 1 tokens before token t are of its run.
__device__ inline bool is_inside(const Sequences& seqs, int64_t row, int64_t t) {
  return t > 0 && next_run(seqs, row, t - (kHalo - 2), t + 1) > t;
}

// ---- Ends of runs, where states enter and leave: one channel, one value at a time

struct EdgeRun {
  int64_t row, begin, end;
  int64_t state_in, state_out;  // rows of the states, -1: none
};

// The run of the states' row r: with seq_idx the last one of batch row r (kLast) or the first. A run of which
// neither end lies within 2 kHalo tokens of the end in question is cut short there: nobody looks further.
template <bool kLast>
__device__ inline EdgeRun edge_run(const ConvFwd& p, const Sequences& seqs, int64_t r) {
  const int64_t l = p.dims.l;
  if (const IndexView& cu = seqs.cu_seqlens; cu.data)
    return {0, index_at(cu, r * cu.stride[0]), index_at(cu, (r + 1) * cu.stride[0]), r, r};
  EdgeRun run{r, kLast ? l : 0, kLast ? l : 0, -1, -1};
  if (kLast)
    for (int i = 0; i < 2 * kHalo && run.begin > 0; ++i)
      if (--run.begin == 0 || begins(seqs, r, run.begin)) break;
  if (!kLast)
    for (int i = 0; i < 2 * kHalo && run.end < l; ++i)
      if (++run.end == l || begins(seqs, r, run.end)) break;
  if (run.begin == 0) run.state_in = r;
  if (run.end == l) run.state_out = r;
  return run;
}

// x~ of channel c at token t >= begin - (w - 1).
template <class R>
__device__ inline R input_at(const ConvFwd& p, const EdgeRun& run, int64_t c, int64_t t) {
  if (t >= run.begin)
    return load_one<R>(p.x, run.row * p.x.stride[0] + c * p.x.stride[1] + t * p.x.stride[2]);
  const View& s = p.initial_state;
  if (!s.data || run.state_in < 0) return 0;
  return load_one<R>(
      s, run.state_in * s.stride[0] + c * s.stride[1] + (p.dims.w - 1 + t - run.begin) * s.stride[2]);
}

// A thread for every channel, a row of blocks for every row of states; more rows than fit are taken in turns.
inline dim3 edge_grid(const ConvDims& dims, int64_t states) {
  return {unsigned((dims.d + kConvThreads - 1) / kConvThreads), unsigned(std::min(states, kMaxGrid))};
}

}  // namespace mamba_ops::gpu

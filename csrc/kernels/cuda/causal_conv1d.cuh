// What forward and backward of the causal convolution share: how a launch is cut, a thread's tokens, its
// taps.
//
// A thread owns kC channels and walks chunks of kT tokens, with the kHalo tokens before a chunk at hand.
// Where channels are contiguous in memory kC > 1, a pack is one token of kC channels, the lanes of a warp lie
// along the channels, and a thread's chunks follow each other. Elsewhere kC = 1, a pack is a chunk, the lanes
// lie along the tokens, and a thread's chunks are one row of lanes apart. Any strides are right: what is not
// contiguous and aligned is moved value by value.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>

#include "kernels/causal_conv1d.h"
#include "kernels/cuda/sequences.cuh"

namespace mamba_ops::gpu {

inline constexpr int kConvThreads = 128;
inline constexpr int kConvChannels = 128;  // most channels of a block
inline constexpr int kHalo = 4;            // tokens kept of the neighbouring chunk, >= w - 1

// ---- Host: tiles and tensors

// A (b, d, l) tensor with its storage type.
template <class T>
struct Tokens {
  T* data;
  int64_t stride_b, stride_d, stride_l;
  bool vector;  // its packs are contiguous and aligned
};

template <class T, int kC, int kT>
Tokens<T> tokens(const View& v, const ConvDims& dims) {
  constexpr int kPack = kC > 1 ? kC : kT;
  const int64_t along = v.stride[kC > 1 ? 1 : 2], across = v.stride[kC > 1 ? 2 : 1];
  const int64_t across_size = kC > 1 ? dims.l : dims.d;
  const bool aligned = reinterpret_cast<uintptr_t>(v.data) % alignof(Pack<T, kPack>) == 0 &&
                       (dims.b == 1 || v.stride[0] % kPack == 0) && (across_size == 1 || across % kPack == 0);
  return {static_cast<T*>(v.data), v.stride[0], v.stride[1], v.stride[2], along == 1 && aligned};
}

// Whether neighbours in memory are channels rather than tokens.
inline bool channel_last(const ConvDims& dims, const View& x) {
  return dims.d > 1 && (dims.l == 1 || x.stride[1] < x.stride[2]);
}

// A block takes one tile of one batch row; each of its threads takes `chunks` chunks of it.
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
  tiles.grid = {unsigned(tiles.channel_tiles * tiles.token_tiles),
                unsigned(std::min<int64_t>(dims.b, 65535))};
  return tiles;
}

// f.template operator()<T, kC, kT>() for the storage type and the layout of x. A pack of channels is 8 bytes
// (16 of double): more would take registers away from threads, and those keep more bytes in flight.
template <class F>
auto by_layout(const ConvDims& dims, const View& x, F f) {
  return by_storage(x.dtype, [&]<class T>() {
    constexpr int kC = sizeof(T) == 2 ? 4 : 2;
    return channel_last(dims, x) ? f.template operator()<T, kC, kHalo>() : f.template operator()<T, 1, 8>();
  });
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

// kRows tokens of kC channels, as stored.
template <class T, int kC, int kRows>
struct Chunk {
  Pack<T, (kC > 1 ? kC : kRows)> pack[kC > 1 ? kRows : 1];

  // Tokens first .. first + kRows - 1, or zeros outside [0, l) and from channel d on. A chunk begins at a
  // multiple of its size: it lies before token 0 as a whole or not at all.
  __device__ void load(const Tokens<T>& x, int64_t row, int64_t channel, int64_t first,
                       const ConvDims& dims) {
    const T* p = x.data + row * x.stride_b + channel * x.stride_d + first * x.stride_l;
    const int rows = first < 0 || first >= dims.l ? 0 : dims.l - first < kRows ? int(dims.l - first) : kRows;
    if constexpr (kC > 1) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        pack[i] = load_pack<kC>(p + i * x.stride_l, x.stride_d, i < rows ? dims.d - channel : 0, x.vector);
    } else {
      pack[0] = load_pack<kRows>(p, x.stride_l, rows, x.vector);
    }
  }
  __device__ Real<T> at(int i, int j) const { return kC > 1 ? pack[kC > 1 ? i : 0].at(j) : pack[0].at(i); }
};

template <int kC, int kT, class T>
__device__ inline void store_chunk(const Tokens<T>& y, int64_t row, int64_t channel, int64_t first,
                                   const ConvDims& dims, const Real<T> (&v)[kT][kC]) {
  T* p = y.data + row * y.stride_b + channel * y.stride_d + first * y.stride_l;
  if constexpr (kC > 1) {
#pragma unroll
    for (int i = 0; i < kT; ++i)
      if (first + i < dims.l)
        store_pack(p + i * y.stride_l, y.stride_d, dims.d - channel, y.vector, to_pack<T>(v[i]));
  } else {
    Real<T> tokens[kT];
#pragma unroll
    for (int i = 0; i < kT; ++i) tokens[i] = v[i][0];
    store_pack(p, y.stride_l, dims.l - first, y.vector, to_pack<T>(tokens));
  }
}

// How many tokens of its run lie before the token of bit i in `starts` (see run_starts), up to kHalo - 1.
__device__ inline int tokens_before(unsigned starts, int i) {
  return starts >> i & 1 ? 0 : starts >> (i - 1) & 1 ? 1 : starts >> (i - 2) & 1 ? 2 : kHalo - 1;
}

// x~ around a chunk: the chunk, its left neighbours, and the initial states of the runs that begin here.
// kWhole: no run begins here.
template <bool kWhole, class T, int kC, int kRows>
struct Inputs {
  const ConvFwd& p;
  const Sequences& seqs;
  const Chunk<T, kC, kHalo>& left;
  const Chunk<T, kC, kRows>& chunk;
  unsigned starts;  // bit kHalo: the chunk's first token
  int64_t row, channel, first;

  struct Reach {
    int tokens = kHalo - 1;     // that lie before in the run
    const T* before = nullptr;  // the run's initial state; absent: zeros
  };
  __device__ Reach reach(int i) const {
    Reach reach;
    if (kWhole) return reach;
    reach.tokens = tokens_before(starts, kHalo + i);
    if (const View& s = p.initial_state; s.data && reach.tokens < kHalo - 1 && first + i < p.dims.l) {
      const int64_t state = state_row(seqs, row, first + i - reach.tokens);
      if (state >= 0)
        reach.before = static_cast<const T*>(s.data) + state * s.stride[0] + channel * s.stride[1];
    }
    return reach;
  }
  // What token i of the chunk sees m tokens back in channel j.
  __device__ Real<T> tap(const Reach& reach, int i, int m, int j) const {
    if (kWhole || m <= reach.tokens) return m <= i ? chunk.at(i - m, j) : left.at(kHalo + i - m, j);
    if (!reach.before) return 0;
    const View& s = p.initial_state;
    return to_real(reach.before[j * s.stride[1] + (p.dims.w - 1 - m + reach.tokens) * s.stride[2]]);
  }
};

// The taps of a thread's channels: weight[m] meets the token m steps back.
template <class R, int kC>
struct Taps {
  R weight[kHalo][kC], bias[kC];

  __device__ Taps(const R* shared, int local_channel) {
#pragma unroll
    for (int j = 0; j < kC; ++j) {
#pragma unroll
      for (int m = 0; m < kHalo; ++m) weight[m][j] = shared[m * kConvChannels + local_channel + j];
      bias[j] = shared[kHalo * kConvChannels + local_channel + j];
    }
  }
};

// Fills the block's taps in shared memory: weights by their distance, then the bias. NaN where the offsets
// are invalid.
template <class R>
__device__ inline void load_taps(R* shared, const ConvFwd& p, const Sequences& seqs, int64_t first,
                                 int channels) {
  const R poison = is_invalid(seqs) ? R(NAN) : R(0);
  const int w = p.dims.w;
  for (int i = threadIdx.x; i < channels * kHalo; i += kConvThreads) {
    const int c = i / kHalo, k = i % kHalo;
    if (k < w)
      shared[(w - 1 - k) * kConvChannels + c] =
          first + c < p.dims.d
              ? load_one<R>(p.weight, (first + c) * p.weight.stride[0] + k * p.weight.stride[1]) + poison
              : R(0);
    else
      shared[k * kConvChannels + c] = 0;
  }
  for (int c = threadIdx.x; c < channels; c += kConvThreads)
    shared[kHalo * kConvChannels + c] =
        p.bias.data && first + c < p.dims.d ? load_one<R>(p.bias, (first + c) * p.bias.stride[0]) : R(0);
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
  return {unsigned((dims.d + kConvThreads - 1) / kConvThreads), unsigned(std::min<int64_t>(states, 65535))};
}

}  // namespace mamba_ops::gpu

// Mamba-2 layers, one token of one sequence (math: kernels/mamba2_step.h).
//
// A block on every multiprocessor, all at once (cooperative launch). Each has every blocks-th unit of every
// weight: two rows of in_proj, or one of out_proj, whose columns are as many. A warp of the block, the
// producer, copies its units into a ring of slots in shared memory, through all layers, and never waits for
// what the layers compute; eight warps, the consumers, take them in turns, a lane 16 bytes of every 512.
// Between the products all blocks meet three times a layer:
//
//   u = in_proj      made by units; the convolution's parameters of a unit are asked for one unit ahead
//   y = the states   rows of h shared among all warps, asked for before the blocks meet
//   o = out_proj     made by units
//
// and each makes the norms of s and y for itself. A value that goes from block to block is a word of bfloat16
// with the layer's number above it: whoever reads it asks again while it is another layer's. So nothing needs
// a fence, which would wait for the copies in flight, 2 to 6 us. Blocks count each other in only not to ask
// in vain. A word is written again after every block has read it: every block has a part of o, which it makes
// of all of y, and of y, which it makes of u.
//
// Copies in flight are few, kInFlight bytes of in_proj and half of that of out_proj: what keeps the memory
// busy. Behind more of them, what the blocks exchange waits, and fast multiprocessors fetch out_proj before
// slow ones have in_proj.
//
// Shared memory: the ring (d 2560: 19 slots of 10 KiB), x' in float32 (8 d bytes, the first half of every
// pack, then the others: no bank conflicts), the layers' addresses.
//
// A unit's sum is made by one warp in one order: bitwise repeatable.
//
// Measured: a step of Mamba-2 on an H100, bfloat16 states, ms (three launches a layer in brackets): 2.7B 2.03
// (2.31), d 2048 x 48 1.09 (1.33), d 1536 x 48 0.83 (0.97), d 1024 x 48 0.61 (0.69), d 768 x 24 0.304
// (0.307). Bound by the bytes of the weights where they are many: 2.7B has 1.86 at 3.0 TB/s. A layer takes 31
// us of 28; the slowest multiprocessor ends in_proj 3 us behind the middle one. No gain, 2.7B: 60, 80 or 160
// KiB in flight of both weights (0.1, 0.2, 0.4 slower than 40); fences (0.1); asking without counting (0.4);
// the count in one line with u (0.1); copies of 16 bytes by the consumers (0.8: their issue keeps shared
// memory's readers waiting); units drawn by ticket, all of them by consumers that have room (0.7), or the
// last rounds of in_proj by producers (0.2); twelve consumers (0.4: no registers).
#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/sm90/mamba2_step.cuh"

namespace mamba_ops {

namespace gpu::sm90::step {

namespace {

// Where the pair of columns c, c + 1 of x' lies in shared memory; the columns from d on, of y, are a second
// x'.
__device__ inline int place_of(int c, int d) {
  const int half = c >= d ? d : 0;
  c -= half;
  return half / 2 + (c & 4 ? d / 4 : 0) + c / 8 * 2 + (c & 2) / 2;
}

// f(unit, dot) for the warp's units of a matrix; dot() gives the products of the unit's two halves, both with
// x' or, kBoth, the second with the second x'.
template <bool kBoth, class F>
__device__ inline void for_units(const Ring& ring, Place& place, int& first, int units, int d,
                                 const float4* s_x, F f) {
  const int lane = threadIdx.x % 32;
  for (; first < units; first += kWarps, place.move(ring, kWarps))
    f(first * int(gridDim.x) + int(blockIdx.x), [&] {
      wait_for(ring.full + 8 * place.slot, place.round & 1);
      float sum[2][2] = {};
      const auto* const w =
          reinterpret_cast<const Pack<bf16, kPack>*>(ring.data + place.slot * ring.bytes) + lane;
      const float4* const x = s_x + lane;
      const int chunks = d / kChunk;
#pragma unroll 2
      for (int i = 0; i < chunks; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pack<bf16, kPack> pack = w[(i + half * chunks) * 32];
          const float4* const from = x + (kBoth ? half * d / 4 : 0) + i * 32;
          const float4 v[2] = {from[0], from[d / 8]};
#pragma unroll
          for (int k = 0; k < kPack; ++k) sum[half][k % 2] += pack.at(k) * (&v[k / 4].x)[k % 4];
        }
      float2 all = {sum[0][0] + sum[0][1], sum[1][0] + sum[1][1]};
      for (int i = 16; i > 0; i /= 2) {
        all.x += __shfl_xor_sync(kAllLanes, all.x, i);
        all.y += __shfl_xor_sync(kAllLanes, all.y, i);
      }
      arrive(ring.empty + 8 * place.slot);
      return all;
    });
  first -= units;
}

// The pairs of a bfloat16 vector that a thread has.
template <int kN>
__device__ inline void load_pairs(uint32_t (&to)[kN], const void* from, int count) {
#pragma unroll
  for (int i = 0; i < kN; ++i)
    to[i] = static_cast<const uint32_t*>(from)[min(int(threadIdx.x) + i * kThreads, count / 2 - 1)];
}
template <int kN>
__device__ inline void take_pairs(Taken<2> (&to)[kN], const uint32_t* from, int count, uint32_t tag) {
  uint32_t stale;
  do {
    stale = 0;
#pragma unroll
    for (int i = 0; i < kN; ++i) to[i].load(from + 2 * min(int(threadIdx.x) + i * kThreads, count / 2 - 1));
#pragma unroll
    for (int i = 0; i < kN; ++i) stale |= to[i].stale(tag);
  } while (stale);
}

// f(pair, c) for the thread's pairs of a vector of `count` values, and the norm's factor of the sum of
// squares that f returns. A barrier: x' is there for all.
template <int kN, class F>
__device__ inline float norm_pairs(int count, float eps, float* s_squares, F f) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const int c = 2 * (int(threadIdx.x) + i * kThreads);
    if (c < count) squares += f(i, c);
  }
  for (int i = 16; i > 0; i /= 2) squares += __shfl_xor_sync(kAllLanes, squares, i);
  if (threadIdx.x % 32 == 0) s_squares[threadIdx.x / 32] = squares;
  sync_threads<kThreads>(1);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += s_squares[i];
  return rsqrtf(sum / float(count) + eps);
}

// Value i of a parameter, from the word that it lies in: one load for both types.
__device__ inline uint32_t word_of(const void* from, DType dtype, int i) {
  return static_cast<const uint32_t*>(from)[dtype == DType::f32 ? i : i / 2];
}
__device__ inline float value_of(uint32_t word, DType dtype, int i) {
  if (dtype == DType::f32) return __uint_as_float(word);
  return i % 2 ? high<bf16>(word) : low<bf16>(word);
}

// S: of the state.
template <class S>
__global__ void __launch_bounds__(kThreads + 32, 1)
    mamba2_step(const __grid_constant__ Mamba2Step p, const int slots) {
  constexpr int kStatePack = 16 / sizeof(S), kRows = sizeof(S) == 2 ? 3 : 5;  // of h, that a warp has at once
  extern __shared__ uint4 s_memory[];
  __shared__ uint64_t s_full[kMaxSlots], s_empty[kMaxSlots];
  __shared__ float s_squares[kWarps];
  const int d = int(p.d), inner = 2 * d, n = int(p.n), conv_end = inner + int(p.conv_width()),
            rows_in = int(p.rows_in());
  const Ring ring = {.data = reinterpret_cast<char*>(s_memory),
                     .full = shared_address(s_full),
                     .empty = shared_address(s_empty),
                     .slots = slots,
                     .bytes = 4 * d};
  auto* const s_x = reinterpret_cast<float2*>(ring.data + slots * ring.bytes);
  auto* const s_layers = reinterpret_cast<Mamba2Step::Layer*>(s_x + d);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x, blocks = gridDim.x;
  const Units units = {((rows_in + 1) / 2 - block + blocks - 1) / blocks, (d - block + blocks - 1) / blocks};

  for (int i = threadIdx.x; i < p.layers * int(sizeof(Mamba2Step::Layer) / 8); i += blockDim.x)
    reinterpret_cast<uint64_t*>(s_layers)[i] = reinterpret_cast<const uint64_t*>(p.layer)[i];
  if (threadIdx.x == 0) {
    for (int i = 0; i < slots; ++i) {
      barrier_init(ring.full + 8 * i, 1);
      barrier_init(ring.empty + 8 * i, 32);  // every lane, for itself
    }
    barriers_ready();
  }
  __syncthreads();
  if (warp == kWarps) {
    if (lane == 0) copy_weights(p, s_layers, ring, units);
    return;
  }

  auto* const scratch = static_cast<Scratch*>(p.scratch);
  uint32_t* const u_all = scratch->words;
  uint32_t* const y_all = u_all + (rows_in + kLine - 1) / kLine * kLine;
  uint32_t* const o_all = y_all + inner;
  unsigned target = 0;
  const auto meet_all = [&] { meet(&scratch->arrived, target += blocks); };

  float2 s[kPairs];
  uint32_t norm[kPairs], gate_norm[2 * kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int c = 2 * (int(threadIdx.x) + i * kThreads);
    if (c >= d) continue;
    s[i] = p.stream_dtype == DType::f32 ? static_cast<const float2*>(p.stream)[c / 2]
                                        : unpack<bf16>(static_cast<const uint32_t*>(p.stream)[c / 2]);
  }
  load_pairs(norm, s_layers[0].norm, d);

  // Of the convolution of a unit's two rows: for each, lanes with its taps, its state and its bias.
  const int conv_part = lane % 8, conv_row = lane / 8 % 2;
  uint32_t conv;
  const auto ask_for_conv = [&](const Mamba2Step::Layer& layer, int unit) {
    // Any channel's where there is none: a branch would wait for the load.
    const int c = min(max(2 * unit - inner, 0), conv_end - inner - 2) + conv_row;
    const auto* from = static_cast<const uint16_t*>(layer.conv_weight) + c * kTaps + conv_part % kTaps;
    if (conv_part >= kTaps)
      from = static_cast<const uint16_t*>(layer.conv_state) + c * (kTaps - 1) + conv_part - kTaps;
    if (conv_part == 7)
      from = static_cast<const uint16_t*>(p.conv_bias ? layer.conv_bias : layer.conv_weight) + c;
    asm volatile("ld.global.u16 %0, [%1];" : "=r"(conv) : "l"(from));
  };

  // A team of lanes has a row of h.
  const int team = n / kStatePack, rows_at_once = 32 / team, member = lane % team,
            head_dim = inner / int(p.h);
  const int first_rows = (warp * blocks + block) * rows_at_once + lane / team,
            rows_apart = kWarps * blocks * rows_at_once;

  Place place;
  place.move(ring, warp);
  int first = warp;  // of the block's units of the next matrix, the warp's
  uint32_t tag = 0;
  for (int l = 0; l < p.layers; ++l) {
    const Mamba2Step::Layer& layer = s_layers[l];
    // u
    if (l > 0) {
      Taken<2> o[kPairs];
      take_pairs(o, o_all, d, tag);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        s[i].x += o[i].at(0), s[i].y += o[i].at(1);
        if (p.stream_dtype == DType::bf16) s[i] = unpack<bf16>(pack<bf16>(s[i].x, s[i].y));
      }
    }
    tag += 1 << 16;
    ask_for_conv(layer, first * blocks + block);
    float factor = norm_pairs<kPairs>(d, p.eps, s_squares, [&](int i, int c) {
      const float2 w = unpack<bf16>(norm[i]);
      s_x[place_of(c, d)] = unpack<bf16>(pack<bf16>(s[i].x * w.x, s[i].y * w.y));
      return s[i].x * s[i].x + s[i].y * s[i].y;
    });
    const auto* const s_x4 = reinterpret_cast<const float4*>(s_x);
    for_units<false>(ring, place, first, units.in, d, s_x4, [&](int unit, auto dot) {
      const float2 both = dot();
      const int row = 2 * unit + conv_row;
      bf16 y = from_real<bf16>((conv_row ? both.y : both.x) * factor);
      if (2 * unit >= inner && 2 * unit < conv_end) {  // its ends are even
        const auto of_part = [&](int i) {
          return to_real(bf16{uint16_t(__shfl_sync(kAllLanes, conv, i, 8))});
        };
        const uint32_t follows = __shfl_down_sync(kAllLanes, conv, 1);
        if (lane < 16 && conv_part >= kTaps && conv_part < 7)
          static_cast<uint16_t*>(layer.conv_state)[(row - inner) * (kTaps - 1) + conv_part - kTaps] =
              conv_part < 6 ? uint16_t(follows) : y.bits;
        float sum = of_part(7);
        if (!p.conv_bias) sum = 0;
#pragma unroll
        for (int k = 0; k + 1 < kTaps; ++k) sum += of_part(k) * of_part(kTaps + k);
        sum += of_part(kTaps - 1) * to_real(y);
        y = from_real<bf16>(silu(sum));
      }
      if (lane < 16 && conv_part == 0 && row < rows_in) give(u_all + row, y, tag);
      ask_for_conv(layer, unit + kWarps * blocks);
    });

    // y
    int begin = first_rows;
    do {
      // Asked for in one place: where two meet, the compiler would wait for the loads.
      Pack<S, kStatePack>* stored[kRows];
      Pack<S, kStatePack> h[kRows];
      uint32_t dt_bias[kRows], A[kRows], D[kRows];
      int row[kRows], head[kRows];  // the nearest, where there are no more
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        row[r] = min(begin + r * rows_apart, inner - 1);
        head[r] = row[r] / head_dim;
        stored[r] = static_cast<Pack<S, kStatePack>*>(layer.state) + int64_t(row[r]) * team + member;
        h[r] = *stored[r];
        dt_bias[r] = word_of(layer.dt_bias, p.dt_bias_dtype, head[r]);
        A[r] = word_of(layer.A_log, p.A_dtype, head[r]);
        D[r] = word_of(layer.D, p.D_dtype, p.D_by_channel ? row[r] : head[r]);
      }
      if (begin == first_rows) {
        load_pairs(gate_norm, layer.gate_norm, inner);
        meet_all();
      }
      Taken<4> B[kStatePack / 4], C[kStatePack / 4];
      Taken<1> x[kRows], z[kRows], dt[kRows];
      uint32_t stale;
      do {
        stale = 0;
#pragma unroll
        for (int i = 0; i < kStatePack / 4; ++i) {
          B[i].load(u_all + 2 * inner + member * kStatePack + 4 * i);
          C[i].load(u_all + 2 * inner + n + member * kStatePack + 4 * i);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          x[r].load(u_all + inner + row[r]);
          z[r].load(u_all + row[r]);
          dt[r].load(u_all + conv_end + head[r]);
        }
#pragma unroll
        for (int i = 0; i < kStatePack / 4; ++i) stale |= B[i].stale(tag) | C[i].stale(tag);
#pragma unroll
        for (int r = 0; r < kRows; ++r) stale |= x[r].stale(tag) | z[r].stale(tag) | dt[r].stale(tag);
      } while (stale);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (begin + r * rows_apart >= inner) continue;  // all rows of a warp at once
        float step = dt[r].at(0) + value_of(dt_bias[r], p.dt_bias_dtype, head[r]);
        if (step <= 20) step = log1p(exp2_of(float(kLog2e) * step));
        step = step == step ? min(max(step, p.dt_min), p.dt_max) : step;
        const float rate = exp2_of(float(kLog2e) * value_of(A[r], p.A_dtype, head[r])),
                    decay = exp2_of(float(-kLog2e) * step * rate), gain = step * x[r].at(0);
        float state[kStatePack], sum = 0;
#pragma unroll
        for (int k = 0; k < kStatePack; ++k) {
          state[k] = decay * h[r].at(k) + gain * B[k / 4].at(k % 4);
          sum += C[k / 4].at(k % 4) * state[k];
        }
        *stored[r] = to_pack<S>(state);
        for (int i = team / 2; i > 0; i /= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);
        const float skip = value_of(D[r], p.D_dtype, p.D_by_channel ? row[r] : head[r]);
        const float y = (sum + skip * x[r].at(0)) * silu(z[r].at(0));
        if (member == 0) give(y_all + row[r], from_real<bf16>(y), tag);
      }
      begin += kRows * rows_apart;
    } while (begin - lane / team < inner);
    meet_all();

    // o
    Taken<2> y[2 * kPairs];
    take_pairs(y, y_all, inner, tag);
    factor = norm_pairs<2 * kPairs>(inner, p.gate_eps, s_squares, [&](int i, int c) {
      const float2 w = unpack<bf16>(gate_norm[i]);
      s_x[place_of(c, d)] = unpack<bf16>(pack<bf16>(y[i].at(0) * w.x, y[i].at(1) * w.y));
      return y[i].at(0) * y[i].at(0) + y[i].at(1) * y[i].at(1);
    });
    for_units<true>(ring, place, first, units.out, d, s_x4, [&](int unit, auto dot) {
      const float2 both = dot();
      if (lane == 0) give(o_all + unit, from_real<bf16>((both.x + both.y) * factor), tag);
    });
    load_pairs(norm, s_layers[min(l + 1, int(p.layers) - 1)].norm, d);
    meet_all();
  }

  if (block > 0) return;
  Taken<2> o[kPairs];
  take_pairs(o, o_all, d, tag);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int c = 2 * (int(threadIdx.x) + i * kThreads);
    if (c >= d) continue;
    static_cast<uint32_t*>(p.out)[c / 2] = (o[i].word[0] & 0xffff) | o[i].word[1] << 16;
    if (p.stream_dtype == DType::f32)
      static_cast<float2*>(p.sum)[c / 2] = s[i];
    else
      static_cast<uint32_t*>(p.sum)[c / 2] = pack<bf16>(s[i].x, s[i].y);
  }
}

// Beside the ring.
int64_t other_bytes(const Mamba2Step& p) {
  constexpr int64_t kStatic = 2048;
  return 8 * p.d + p.layers * int64_t(sizeof(Mamba2Step::Layer)) + kStatic;
}
// Every block has a part of y and of o.
int64_t blocks_of(const Mamba2Step& p) { return std::min(multiprocessors(), p.d / 2); }
int64_t slots_of(const Mamba2Step& p) {
  return std::min<int64_t>(kMaxSlots, (shared_bytes() - other_bytes(p)) / (4 * p.d));
}

}  // namespace

}  // namespace gpu::sm90::step

bool mamba2_step_takes(const Mamba2Step& p) {
  using namespace gpu;
  using namespace gpu::sm90::step;
  const int64_t bytes = p.n * (p.state_dtype == DType::f32 ? 4 : 2);  // of a row of the state
  return !portable_only && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         p.layers <= Mamba2Step::kMaxLayers && p.d > 0 && p.d % kChunk == 0 && p.d <= kMaxWidth && p.h > 0 &&
         p.inner() % p.h == 0 && (bytes == 128 || bytes == 256 || bytes == 512) && slots_of(p) >= 2 * kWarps;
}

int64_t mamba2_step_scratch(const Mamba2Step& p) {
  using namespace gpu::sm90::step;
  const int64_t words = (p.rows_in() + kLine - 1) / kLine * kLine + p.inner() + p.d;
  return int64_t(sizeof(Scratch)) + 4 * words;
}

const char* mamba2_step_hopper(const Mamba2Step& p, void* cuda_stream) {
  using namespace gpu;
  using namespace gpu::sm90::step;
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const auto kernel = p.state_dtype == DType::f32 ? mamba2_step<float> : mamba2_step<bf16>;
  const int slots = int(slots_of(p));
  const int shared = int(slots * 4 * p.d + 8 * p.d + p.layers * int64_t(sizeof(Mamba2Step::Layer)));
  cudaMemsetAsync(p.scratch, 0, size_t(mamba2_step_scratch(p)), stream);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks_of(p)));
  config.blockDim = dim3(kThreads + 32);
  config.dynamicSmemBytes = size_t(shared);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, p, slots);
  return launch_error();
}

}  // namespace mamba_ops

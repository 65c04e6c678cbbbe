// What forward and backward of the portable selective scan share: how a call is cut, where a thread stands,
// the segment form.
//
// A block owns 32 channels that share B and C, of one row and one segment, and goes through the segment in
// tiles of 32 tokens. Q neighbouring lanes (1, 2 or 4, as many as the warps) share a channel: each holds 16
// bytes of its state in registers, so Q * 16 bytes of every channel's state are run through a tile at a time;
// a larger state takes several passes over the tile. Step sizes are computed once for each token and channel
// and lie in shared memory with B and C. Between tiles the states lie in device memory ("carry"), where the
// thread that wrote them reads them again.
//
// Segments: a sequence with too few channels to fill a GPU is cut. Every segment is first run from a zero
// state: it ends in E, and the segment as a whole maps h -> exp(A sum(delta)) h + E, or h -> E if a run
// begins in it. scan_combine turns the E's into the states that enter; then every segment is run on its own.
// The gradients likewise, from right to left. How a call is cut follows from its sizes alone.
#pragma once
#include <algorithm>
#include <climits>

#include "kernels/cuda/scan_number.cuh"
#include "kernels/cuda/selective_scan.h"
#include "kernels/cuda/sequences.cuh"

namespace mamba_ops::gpu {

inline constexpr int kScanTile = 32;   // tokens of a tile: one for each lane where runs are looked up
inline constexpr int kScanWidth = 32;  // channels of a block
inline constexpr int kScanLd = kScanWidth + 1;  // columns and rows of a tile without bank conflicts
inline constexpr int kScanPlane = kScanTile * kScanLd;
inline constexpr int kScanMaxSlices = 4;  // Q
inline constexpr int kScanMaxThreads = 32 * kScanMaxSlices;

// ---- Host: how a call is cut

struct ScanCut {
  int slice_bits, passes;  // log2 of Q, and how often Q slices go into the state
  int64_t blocks_per_share, channel_blocks;
  int64_t segments, tokens;  // of a segment; a multiple of the checkpoints' interval

  constexpr int slices() const { return 1 << slice_bits; }
  int threads() const { return 32 << slice_bits; }
  constexpr int64_t units(const ScanDims& dims) const { return segments * dims.b * channel_blocks; }
  int64_t rows(const ScanDims& dims) const { return segments * dims.b; }
};

inline constexpr int64_t kScanEnoughWarps = 2048, kScanMinSegment = 256, kScanMinSegments = 3;

template <class S>
ScanCut scan_cut(const ScanDims& dims) {
  constexpr int64_t kStates = Slice<S>::kStates, kGrid = kScanCheckpointCuda;
  ScanCut cut{.slice_bits = dims.n <= kStates       ? 0
                            : dims.n <= 2 * kStates ? 1
                                                    : 2,
              .passes = 1,
              .blocks_per_share = 1,
              .channel_blocks = 0,
              .segments = 1,
              .tokens = std::max<int64_t>((dims.l + kGrid - 1) / kGrid * kGrid, kGrid)};
  cut.passes = int((dims.n + cut.slices() * kStates - 1) / (cut.slices() * kStates));
  if (dims.d == 0) return cut;
  cut.blocks_per_share = (dims.sharing() + kScanWidth - 1) / kScanWidth;
  cut.channel_blocks = dims.d / dims.sharing() * cut.blocks_per_share;
  const int64_t warps = std::max<int64_t>(dims.b * cut.channel_blocks * cut.slices(), 1);
  const int64_t segments = std::min(kScanEnoughWarps / warps, dims.l / kScanMinSegment);
  if (segments < kScanMinSegments) return cut;  // running every token twice would not pay
  cut.tokens = (dims.l + segments * kGrid - 1) / (segments * kGrid) * kGrid;
  cut.segments = (dims.l + cut.tokens - 1) / cut.tokens;
  return cut;
}

// f.template operator()<S, kFast>() with the type of the states, and whether the data are 16-bit.
template <class F>
auto by_state(const ScanFwd& p, F f) {
  const bool wide = p.u.dtype == DType::f64, fast = p.u.dtype == DType::bf16 || p.u.dtype == DType::f16;
  if (p.dims.complex)
    return wide ? f.template operator()<Complex<double>, false>()
                : f.template operator()<Complex<float>, false>();
  return wide   ? f.template operator()<double, false>()
         : fast ? f.template operator()<float, true>()
                : f.template operator()<float, false>();
}

// Hands out parts of the workspace; without a base it only counts.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return p;
  }
};

// What lies between tiles and between segments; row = segment * b + batch row.
template <class S>
struct ScanCarry {
  S* states;         // (rows, n, d)
  RealOf<S>* steps;  // (rows, d): sum of delta over the segment
  int32_t* resets;   // (rows): whether a run begins in the segment

  ScanCarry(const ScanDims& dims, const ScanCut& cut, Carver& carver) {
    const int64_t rows = cut.rows(dims), split = cut.segments > 1;
    states = carver.take<S>(rows * dims.n * dims.d);
    steps = carver.take<RealOf<S>>(split * rows * dims.d);
    resets = carver.take<int32_t>(split * rows);
  }
};

inline unsigned scan_grid(int64_t units) { return unsigned(std::min<int64_t>(units, INT_MAX)); }

// ---- Device: where a thread stands

template <class S>
struct ScanThread {
  using R = RealOf<S>;
  static constexpr int kStates = Slice<S>::kStates, kReals = Slice<S>::kReals, kParts = Number<S>::kParts;

  const ScanDims& dims;
  const ScanCut& cut;
  const Sequences& seqs;
  int64_t row, segment, begin, end;  // tokens [begin, end) of a row
  int64_t block, first;              // the block's number and first channel
  int channels;                      // of the block
  int slice, channel;                // of the thread, in the block

  __device__ ScanThread(const ScanDims& dims, const ScanCut& cut, const Sequences& seqs, int64_t unit)
      : dims(dims), cut(cut), seqs(seqs) {
    block = unit % cut.channel_blocks;
    row = unit / cut.channel_blocks % dims.b;
    segment = unit / cut.channel_blocks / dims.b;
    begin = segment * cut.tokens;
    end = begin + cut.tokens < dims.l ? begin + cut.tokens : dims.l;
    const int64_t share = dims.d / (cut.channel_blocks / cut.blocks_per_share);
    const int64_t within = block % cut.blocks_per_share * kScanWidth;
    first = block / cut.blocks_per_share * share + within;
    channels = share - within < kScanWidth ? int(share - within) : kScanWidth;
    slice = threadIdx.x % cut.slices();
    channel = threadIdx.x >> cut.slice_bits;
  }

  __device__ int64_t carry_row() const { return segment * dims.b + row; }

  // f(i, state) for the states that the thread holds in a pass, of those that there are.
  template <class F>
  __device__ void each_state(int pass, F f) const {
    const int from = ((pass << cut.slice_bits) + slice) * kStates, n = channel < channels ? int(dims.n) : 0;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (from + i < n) f(i, from + i);
  }
  __device__ Slice<S> load_rates(const View& A, int pass) const {
    Slice<S> slice{};
    with_storage<R>(A, [&](const auto* p) {
      const auto* from = p + (first + channel) * A.stride[0];
      each_state(pass, [&](int i, int state) { slice.s[i] = to_number<S>(from + state * A.stride[1]); });
    });
    return slice;
  }
  // Row `at` of a (rows, n, d) buffer.
  __device__ Slice<S> load_carry(const S* carry, int64_t at, int pass) const {
    Slice<S> slice{};
    each_state(pass, [&](int i, int state) {
      slice.s[i] = carry[(at * dims.n + state) * dims.d + first + channel];
    });
    return slice;
  }
  __device__ void store_carry(S* carry, int64_t at, int pass, const Slice<S>& slice) const {
    each_state(pass, [&](int i, int state) {
      carry[(at * dims.n + state) * dims.d + first + channel] = slice.s[i];
    });
  }
  // Row `at` of (rows, d, n) states; zeros where it is -1 or they are absent.
  __device__ Slice<S> load_states(const void* states, int64_t at, int pass) const {
    Slice<S> slice{};
    if (states && at >= 0)
      each_state(pass, [&](int i, int state) {
        slice.s[i] = static_cast<const S*>(states)[(at * dims.d + first + channel) * dims.n + state];
      });
    return slice;
  }
  __device__ void store_states(void* states, int64_t at, int pass, const Slice<S>& slice) const {
    if (states && at >= 0)
      each_state(pass, [&](int i, int state) {
        static_cast<S*>(states)[(at * dims.d + first + channel) * dims.n + state] = slice.s[i];
      });
  }
  // The state that enters token t, a multiple of the interval above 0.
  __device__ R* checkpoint(void* checkpoints, int64_t t, int state) const {
    const int64_t at = row * (dims.l / kScanCheckpointCuda) + t / kScanCheckpointCuda - 1;
    return static_cast<R*>(checkpoints) + (at * kParts * dims.n + state) * dims.d + first + channel;
  }
  __device__ Slice<S> load_checkpoint(void* checkpoints, int64_t t, int pass) const {
    Slice<S> slice{};
    each_state(pass, [&](int i, int state) {
      const R* from = checkpoint(checkpoints, t, state);
      if constexpr (kParts == 2)
        slice.s[i] = {from[0], from[dims.n * dims.d]};
      else
        slice.s[i] = *from;
    });
    return slice;
  }
  __device__ void store_checkpoint(void* checkpoints, int64_t t, int pass, const Slice<S>& slice) const {
    each_state(pass, [&](int i, int state) {
      R* to = checkpoint(checkpoints, t, state);
      to[0] = real_part(slice.s[i]);
      if constexpr (kParts == 2) to[dims.n * dims.d] = slice.s[i].im;
    });
  }

  // Bit j: a run begins at token t0 + j of the segment. For whole warps.
  __device__ unsigned run_begins(int64_t t0) const {
    const int64_t t = t0 + threadIdx.x % 32;
    return __ballot_sync(kAllLanes, t < end && is_edge(seqs, row, t, dims.l));
  }
  // The row of the states that leave after token t, the last of its run, or -1.
  __device__ int64_t leaving_row(int64_t t) const { return state_row_out(seqs, row, t + 1, dims.l); }
  __device__ bool run_ends(int64_t t) const { return is_edge(seqs, row, t + 1, dims.l); }

  // Over the lanes that share a channel.
  __device__ R sum_slices(R v) const {
    if (cut.slice_bits > 0) v += __shfl_xor_sync(kAllLanes, v, 1);
    if (cut.slice_bits > 1) v += __shfl_xor_sync(kAllLanes, v, 2);
    return v;
  }
};

// ---- The segment form, and rows of states without tokens

// Turns what every segment made from nothing into what enters it: from the left, or (kReverse) gradients from
// the right. A thread owns one state of one channel of one row.
template <class S, bool kReverse>
__global__ void __launch_bounds__(kScanMaxThreads)
    scan_combine(const ScanDims dims, const View A, const ScanCut cut, const ScanCarry<S> carry) {
  const int64_t count = dims.b * dims.n * dims.d, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t c = i % dims.d, state = i / dims.d % dims.n, row = i / dims.d / dims.n;
    S rate;
    with_storage<RealOf<S>>(
        A, [&](const auto* p) { rate = to_number<S>(p + c * A.stride[0] + state * A.stride[1]); });
    S entering{};
    for (int64_t k = 0; k < cut.segments; ++k) {
      const int64_t at = (kReverse ? cut.segments - 1 - k : k) * dims.b + row;
      S& stored = carry.states[(at * dims.n + state) * dims.d + c];
      const S made = stored;
      stored = entering;
      if (carry.resets[at]) {
        entering = made;
        continue;
      }
      const S through = decay<false>(carry.steps[at * dims.d + c], rate);
      entering = (kReverse ? conj(through) : through) * entering + made;
    }
  }
}

template <class S, bool kReverse>
void combine_segments(const ScanFwd& p, const ScanCut& cut, const ScanCarry<S>& carry, cudaStream_t stream) {
  const int64_t blocks = (p.dims.b * p.dims.n * p.dims.d + kScanMaxThreads - 1) / kScanMaxThreads;
  scan_combine<S, kReverse><<<scan_grid(blocks), kScanMaxThreads, 0, stream>>>(p.dims, p.A, cut, carry);
}

// What leaves a sequence without tokens is what entered; NaN in every row where the offsets are invalid.
template <class R>
__global__ void __launch_bounds__(kScanMaxThreads)
    scan_empty_rows(const Sequences seqs, int64_t l, int64_t states, int64_t size, const R* from, R* to) {
  const bool invalid = is_invalid(seqs);
  const IndexView& cu = seqs.cu_seqlens;
  for (int64_t r = blockIdx.x; r < states; r += gridDim.x) {
    const bool empty =
        cu.data ? index_at(cu, r * cu.stride[0]) == index_at(cu, (r + 1) * cu.stride[0]) : l == 0;
    if (!invalid && !empty) continue;
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x)
      to[r * size + i] = invalid ? R(NAN) : from ? from[r * size + i] : R(0);
  }
}

template <class S>
void pass_empty_rows(const ScanDims& dims, const Sequences& seqs, int64_t states, const void* from, void* to,
                     cudaStream_t stream) {
  using R = RealOf<S>;
  if (!to || states * dims.d == 0 || (dims.l > 0 && !seqs.cu_seqlens.data)) return;
  scan_empty_rows<R><<<scan_grid(states), kScanMaxThreads, 0, stream>>>(
      seqs, dims.l, states, dims.d * dims.n * Number<S>::kParts, static_cast<const R*>(from),
      static_cast<R*>(to));
}

// Launches a kernel over units with its tile as dynamic shared memory.
template <class Tile, class... Params, class... Args>
const char* launch_units(void (*kernel)(Params...), const ScanDims& dims, const ScanCut& cut,
                         cudaStream_t stream, const Args&... args) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Tile));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kernel<<<scan_grid(cut.units(dims)), cut.threads(), sizeof(Tile), stream>>>(args...);
  return launch_error();
}

}  // namespace mamba_ops::gpu

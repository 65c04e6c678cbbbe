// A projection of few rows, the norm before it and the convolution after it (math: kernels/norm_linear.h).
//
// As many blocks as the GPU has multiprocessors share the rows of W in tiles of 4. A tile is a row of chunks
// of 64 columns, and the chunks of all tiles go to the 16 warps of a block in turns: a warp streams every
// 16th. A thread's 16 bytes of a chunk are of row lane / 8, columns 8 (lane % 8) + 0..7: eight threads read a
// line of 128 bytes. Copies run kAhead steps before the products, through slots of shared memory that each
// thread has for itself, so that no barrier stands in their way.
//
// Products: two mma a step. Their right factor has a column for each half (32 columns) of each of the 4 rows,
// as the threads have loaded them; the left one has x' twice, for the first halves in rows 0 to 7, for the
// second in 8 to 15. Of the result the threads use what belongs together, rows r of the first halves and
// r + 8 of the second: thread 4 r + q has the sum of rows r of x' and q of the tile, c[0] + c[3]. A round of
// tiles has up to kRound outputs, a thread each, which asks for what the output takes beside its sum when the
// round begins, and at its end adds the sums of the warps, in their order, which depends on the row of W
// alone: bitwise repeatable. (A barrier a round: with one every four tiles, blocks whose outputs are
// convolved fell 4 us behind the others.)
//
// Every block makes x' for itself, but for the norm's factor of a row, which multiplies the sums; it asks for
// the first rows before the copies begin, behind which they would wait.
//
// Shared memory: the slots (kAhead x 8 KiB), sums of a round (16 KiB), x' (2 k bytes a row). More rows
// than eight, or than fit: one launch after the other.
//
// Bound by the bytes of W. What runs before the first product runs once in every warp, and hides behind
// nothing: kernels compiled for what stands before the projection, few instructions. Launches overlap: a
// block comes as soon as one of the launch before has ended, and asks for its first 128 KiB of W while it
// waits for x. On an H100 in_proj of Mamba-2 2.7B with its norm and convolution takes 20.5 us at batch 1,
// where its 54 MB take 18.2 (21.0 with 64 KiB of hints, 20.3 with 192, which cost out_proj 0.9; 21.7 with
// sums every four tiles); a step 2.37 ms with 64 KiB (2.45 with sums every four tiles). On an H200 the step
// before took 2.07 ms, without overlap 2.26, with six steps ahead 2.09, with twelve 2.13. Two blocks a
// multiprocessor lose: those of an overlapped launch gather where room comes free first (2.92).
#include <algorithm>

#include "kernels/cuda/bits.cuh"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/norm_linear.h"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kAhead = 8;         // steps
constexpr int kPack = 8;          // values of 16 bytes
constexpr int kStep = 8 * kPack;  // columns of a chunk
constexpr int kSpan = kWarps * kStep;
constexpr int kTile = 4;          // rows of W
constexpr int kRound = 256;       // outputs that are added up at once
constexpr int kMaxRows = 8;       // of x
constexpr int kAtOnce = 2;        // packs of a row of x that a thread asks for at once
constexpr int kEarly = 64 << 10;  // values of W that a block asks for before it waits

struct Shape {
  int tiles;        // of W, that every block has
  int more;         // blocks that have one more
  int columns;      // of a tile, in whole chunks
  int team_bits;    // log2 of the teams that make x'
  float mean, eps;  // 1 / k
};

// What makes x' of x, in kernels for tensors that lie in whole packs of 16 bytes; `any` looks.
enum class Before { any, nothing, norm, add_norm, gated_norm };

// Values of a row of x' in shared memory: 64 bytes more than a multiple of 128, so that the eight threads of
// a quarter warp, of two rows, meet no bank twice.
__host__ __device__ inline int pitch_of(int columns) { return columns + 32; }

// ---- x'

// kPack values of a row, as they are stored, 16-bit ones in the first half: no load is waited for before a
// value is asked for.
struct Values {
  struct alignas(16) Half {
    uint32_t word[4];
  } half[2];
  bool is_wide;

  __device__ float at(int i) const {
    if (is_wide) return __uint_as_float(half[i / 4].word[i % 4]);
    const uint32_t word = half[0].word[i / 2];
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  }
};

// In columns from `column`, zeros beyond the row's end. kWide: may be float32.
template <bool kVector, bool kWide>
__device__ inline Values load_values(const View& from, int row, int column, int k) {
  Values values = {.is_wide = kWide && from.dtype == DType::f32};
  const int64_t at = row * from.stride[0] + column * (kVector ? 1 : from.stride[1]);
  const auto* const wide = static_cast<const uint32_t*>(from.data) + at;
  const auto* const narrow = static_cast<const uint16_t*>(from.data) + at;
  if constexpr (kVector) {
    if (column >= k) return values;
    values.half[0] =
        *static_cast<const Values::Half*>(values.is_wide ? static_cast<const void*>(wide) : narrow);
    if (values.is_wide) values.half[1] = *reinterpret_cast<const Values::Half*>(wide + 4);
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (column + i >= k) continue;
      const int64_t step = i * from.stride[1];
      if (values.is_wide)
        values.half[i / 4].word[i % 4] = wide[step];
      else
        values.half[0].word[i / 2] |= uint32_t(narrow[step]) << (i % 2 * 16);
    }
  }
  return values;
}

// Fills s_x with the rows of x' without the norm's factors, zeros beyond column k, and writes the sum. Every
// thread calls between() once it has asked for its first values. s_squares: of the warps, of which every
// 2^team_bits-th has the same row.
template <Before kBefore, class F>
__device__ inline void make_rows(const NormLinear& p, bf16* s_x, float* s_squares, int columns, int team_bits,
                                 F between) {
  constexpr bool kVector = kBefore != Before::any;
  const bool adds = kVector ? kBefore == Before::add_norm : p.residual.data != nullptr;
  const bool gated = kVector ? kBefore == Before::gated_norm : p.z.data != nullptr;
  const bool normed = kVector ? kBefore != Before::nothing : p.norm.data != nullptr;
  const bool rounds = adds && p.sum.dtype == DType::bf16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A team of warps has a row, if there are so many.
  const int row = warp & ((1 << team_bits) - 1), apart = (kThreads >> team_bits) * kPack;
  const int end = row < p.b ? columns : 0, k = row < p.b ? int(p.k) : 0;
  int column = ((warp >> team_bits) * 32 + lane) * kPack;
  Values x[kAtOnce], other[kAtOnce], weight[kAtOnce];  // other: of residual or z
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = column + i * apart;
      x[i] = load_values<kVector, false>(p.x, row, at, k);
      if (adds) other[i] = load_values<kVector, true>(p.residual, row, at, k);
      if (gated) other[i] = load_values<kVector, false>(p.z, row, at, k);
      if (normed) weight[i] = load_values<kVector, true>(p.norm, 0, at, k);
    }
  };
  float squares = 0;
  load();
  between();
  for (; column < end; column += kAtOnce * apart, load()) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = column + j * apart;
      if (at >= end) continue;
      float v[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        v[i] = x[j].at(i);
        if (adds) v[i] += other[j].at(i);
        if (rounds) v[i] = to_real(from_real<bf16>(v[i]));
      }
      if (adds && blockIdx.x == 0 && at < k) {
        const int64_t to = row * p.k + at;
        const int count = kVector ? kPack : k - at;
        if (rounds)
          store_values(static_cast<bf16*>(p.sum.data) + to, 1, count, kVector, v);
        else
          store_values(static_cast<float*>(p.sum.data) + to, 1, count, kVector, v);
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float gate = gated ? silu(other[j].at(i)) : 1, gated_v = v[i] * gate,
                    counts = p.norm_before_gate ? v[i] : gated_v;
        squares += counts * counts;
        v[i] = normed ? gated_v * weight[j].at(i) : gated_v;
      }
      reinterpret_cast<Pack<bf16, kPack>*>(s_x)[(row * pitch_of(columns) + at) / kPack] = to_pack<bf16>(v);
    }
  }
  if (normed) {
    for (int i = 16; i > 0; i /= 2) squares += __shfl_xor_sync(kAllLanes, squares, i);
    if (lane == 0) s_squares[warp] = squares;
  }
}

// ---- y

// What an output takes beside its sum, as it is stored.
struct Output {
  uint32_t bias, conv_bias;
  uint32_t weight[kConvMaxWidth], seen[kConvMaxWidth];  // the last ones, of w; seen: with the new one
  bool in_conv;
};

__device__ inline Output load_output(const NormLinear& p, int64_t row, int64_t to) {
  const NormLinear::Conv& conv = p.conv;
  const int64_t c = to - conv.begin;
  Output out = {.in_conv = conv.state.data && c >= 0 && c < conv.d};
  out.bias = load_bits(p.bias, to * p.bias.stride[0]);
  if (!out.in_conv) return out;
  out.conv_bias = load_bits(conv.bias, c * conv.bias.stride[0]);
#pragma unroll
  for (int k = 0; k < kConvMaxWidth; ++k) {
    const int i = k - (kConvMaxWidth - conv.w);
    if (i < 0) continue;
    out.weight[k] = load_bits(conv.weight, c * conv.weight.stride[0] + i * conv.weight.stride[1]);
    if (k + 1 < kConvMaxWidth)
      out.seen[k] = load_bits(
          conv.state, row * conv.state.stride[0] + c * conv.state.stride[1] + i * conv.state.stride[2]);
  }
  return out;
}

__device__ inline void store_output(const NormLinear& p, int64_t row, int64_t to, Output out, float y) {
  y += from_bits(out.bias, p.bias.dtype);
  if (out.in_conv) {
    const NormLinear::Conv& conv = p.conv;
    bf16* const state = static_cast<bf16*>(conv.state.data) + row * conv.state.stride[0] +
                        (to - conv.begin) * conv.state.stride[1];
    out.seen[kConvMaxWidth - 1] = from_real<bf16>(y).bits;
    float sum = from_bits(out.conv_bias, conv.bias.dtype);
#pragma unroll
    for (int k = 0; k < kConvMaxWidth; ++k) {
      sum += from_bits(out.weight[k], conv.weight.dtype) * from_bits(out.seen[k], DType::bf16);
      const int i = k - (kConvMaxWidth - conv.w);
      if (i >= 0 && k + 1 < kConvMaxWidth) state[i * conv.state.stride[2]] = {uint16_t(out.seen[k + 1])};
    }
    y = silu(sum);
  }
  static_cast<bf16*>(p.y.data)[row * p.n + to] = from_real<bf16>(y);
}

// ---- The kernel

template <Before kBefore>
__global__ void __launch_bounds__(kThreads, 1) norm_linear(const NormLinear p, const Shape shape) {
  constexpr bool kVector = kBefore != Before::any;
  extern __shared__ uint4 s_memory[];
  __shared__ float s_squares[kWarps], s_factor[kMaxRows];
  const int columns = shape.columns, pitch = pitch_of(columns);
  auto* const s_slots = reinterpret_cast<Pack<bf16, kPack>*>(s_memory) + threadIdx.x;
  float* const s_sums = reinterpret_cast<float*>(s_memory + kAhead * kThreads);
  bf16* const s_x = reinterpret_cast<bf16*>(s_sums + kWarps * kRound);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x;
  const int tiles = shape.tiles + (block < shape.more);
  const int64_t first_tile = int64_t(block) * shape.tiles + min(block, shape.more);
  // The warp's first chunk, from the beginning of the block's first tile: chunk i of W is of warp i % kWarps.
  const int first_column = (kSpan + warp * kStep - int(first_tile * columns % kSpan)) % kSpan;

  const int rows = int(min(int64_t(tiles) * kTile, p.n - first_tile * kTile));

  // The next step's copy, into the given slot.
  int next_column = first_column + lane % 8 * kPack, rows_left = rows - lane / 8;
  const int64_t stride = kVector ? 1 : p.weight.stride[1], to_next_step = kSpan * stride,
                to_next_tile = kTile * p.weight.stride[0] - columns * stride;
  const bf16* next = static_cast<const bf16*>(p.weight.data) +
                     (first_tile * kTile + lane / 8) * p.weight.stride[0] + next_column * stride;
  const auto copy_next = [&](int slot) {
    while (next_column >= columns) {
      next_column -= columns;
      next += to_next_tile;
      rows_left -= kTile;
    }
    const bool inside = rows_left > 0 && next_column < p.k;  // else nothing is read
    if constexpr (kVector) {
      copy_async(s_slots + slot * kThreads, next, inside);
      commit_copies();
    } else {
      s_slots[slot * kThreads] = load_pack<kPack>(next, stride, inside ? p.k - next_column : 0, false);
    }
    next_column += kSpan;
    next += to_next_step;
  };
  overlap([&] {
    if (!kVector) return;
    if (block == 0) prefetch(p.norm, 0, p.k);
    prefetch(p.weight, first_tile * kTile * p.weight.stride[0],
             min((rows - 1) * p.weight.stride[0] + p.k, int64_t(kEarly)));
  });
  make_rows<kBefore>(p, s_x, s_squares, columns, shape.team_bits, [&] {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) copy_next(slot);
  });
  __syncthreads();
  if (threadIdx.x < p.b) {
    float sum = 0;
    for (int i = threadIdx.x; i < kWarps; i += 1 << shape.team_bits) sum += s_squares[i];
    s_factor[threadIdx.x] = p.norm.data ? rsqrtf(sum * shape.mean + shape.eps) : 1;
  }

  // This thread's rows of x and of a tile: in products, and as the output of its tile of a round.
  const int row = lane / 4, part = lane % 4;
  const int outputs = kTile * int(p.b), round = kRound / outputs;  // of a tile; tiles
  const int out_tile = threadIdx.x / outputs, out_row = threadIdx.x % outputs / kTile,
            out_part = threadIdx.x % kTile;
  const bf16* const my_x = s_x + (row < p.b ? row : 0) * pitch + part * kPack;
  Output out = {};
  int slot = 0, column = first_column;
  for (int tile = 0, in_round = 0; tile < tiles; ++tile, column -= columns) {
    const int to = (tile - in_round + out_tile) * kTile + out_part;  // of the block's rows
    const bool has_output = out_tile < round && to < rows;
    if (in_round == 0 && has_output) out = load_output(p, out_row, first_tile * kTile + to);
    float c[2][4] = {};
    for (; column < columns; column += kSpan) {
      wait_for_copies<kAhead - 1>();
      const Pack<bf16, kPack> w = s_slots[slot * kThreads];
      const auto first = *reinterpret_cast<const Pack<bf16, kPack>*>(my_x + column),
                 second = *reinterpret_cast<const Pack<bf16, kPack>*>(my_x + column + kStep / 2);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        mma_halves<bf16>(
            c[i], {first.word[2 * i], second.word[2 * i], first.word[2 * i + 1], second.word[2 * i + 1]},
            w.word[2 * i], w.word[2 * i + 1]);
      copy_next(slot);
      if (++slot == kAhead) slot = 0;
    }
    if (lane < outputs)
      s_sums[warp * kRound + in_round * outputs + lane] = (c[0][0] + c[0][3]) + (c[1][0] + c[1][3]);
    if (++in_round < round && tile + 1 < tiles) continue;
    in_round = 0;
    __syncthreads();
    if (has_output) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += s_sums[i * kRound + threadIdx.x];
      store_output(p, out_row, first_tile * kTile + to, out, sum * s_factor[out_row]);
    }
    if (tile + 1 < tiles) __syncthreads();
  }
}

// The rows [begin, begin + b) of the call.
NormLinear rows_of(NormLinear p, int64_t begin, int64_t b) {
  p.b = b;
  for (View* v : {&p.x, &p.residual, &p.z, &p.sum, &p.y, &p.conv.state})
    if (v->data)
      v->data = static_cast<char*>(v->data) + begin * v->stride[0] * (v->dtype == DType::f32 ? 4 : 2);
  return p;
}

}  // namespace

}  // namespace gpu

const char* norm_linear_cuda(const NormLinear& p, void* cuda_stream) {
  using namespace gpu;
  if (p.b * p.n == 0) return nullptr;
  const int64_t tiles = (p.n + kTile - 1) / kTile, blocks = std::min(multiprocessors(), tiles);
  Shape shape = {.tiles = int(tiles / blocks),
                 .more = int(tiles % blocks),
                 .columns = int(std::max<int64_t>((p.k + kStep - 1) / kStep, 1) * kStep),
                 .mean = 1 / float(p.k),
                 .eps = float(p.eps)};
  const int64_t fixed_bytes = kAhead * kThreads * 16 + kWarps * kRound * 4, static_bytes = 1024,
                row_bytes = pitch_of(shape.columns) * 2;
  const int64_t rows = std::min<int64_t>(kMaxRows, (shared_bytes() - static_bytes - fixed_bytes) / row_bytes);
  if (rows < 1) return "a row does not fit into shared memory";
  while (1 << shape.team_bits < std::min(rows, p.b)) ++shape.team_bits;
  bool vector = p.k > 0 && p.k % kPack == 0 && packs_align(p.weight, 1, {p.n}, kPack);
  for (const View* v : {&p.x, &p.residual, &p.z, &p.sum, &p.norm})
    vector = vector && (!v->data || packs_align(*v, 1, {p.b}, kPack));
  const auto kernel = !vector           ? norm_linear<Before::any>
                      : p.residual.data ? norm_linear<Before::add_norm>
                      : p.z.data        ? norm_linear<Before::gated_norm>
                      : p.norm.data     ? norm_linear<Before::norm>
                                        : norm_linear<Before::nothing>;
  // More than half of what a multiprocessor has: of a launch that overlaps, two blocks would share the first
  // multiprocessors that come free, and others have none.
  const int shared =
      int(std::max<int64_t>(fixed_bytes + std::min(rows, p.b) * row_bytes, shared_bytes() / 2 + 1024));
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  for (int64_t begin = 0; begin < p.b; begin += rows)
    launch_overlapped(kernel, unsigned(blocks), kThreads, shared, static_cast<cudaStream_t>(cuda_stream),
                      rows_of(p, begin, std::min(rows, p.b - begin)), shape);
  return launch_error();
}

}  // namespace mamba_ops

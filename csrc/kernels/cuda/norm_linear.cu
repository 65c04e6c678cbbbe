// A projection of few rows and the norm before it (math: kernels/norm_linear.h).
//
// As many blocks as the GPU has multiprocessors share the rows of W in tiles of 8. A block streams its tiles,
// one after the other; its 16 warps share the columns, 32 at a time: a thread's 16 bytes of a step, row
// lane / 4 and columns 8 (lane % 4) + 0..7 of the warp's, are the right factor of two mma with the up to
// eight rows of x' on the left. Copies run kAhead steps before the products, through slots of shared memory
// that each thread has for itself, so that no barrier stands in their way. Every block makes x' for itself,
// but for the norm's factor of a row, which multiplies the sums; it asks for the rows before the copies
// begin, behind which they would wait. The sums of the warps are added in their order: bitwise repeatable.
//
// Shared memory: the slots (kAhead x 8 KiB), x' (2 k bytes a row), sums of 2 x 2 tiles (2 KiB a row). More
// rows than eight, or than fit: one launch after the other. Bound by the bytes of W.
#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/load_store.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/norm_linear.h"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kAhead = 8;         // steps
constexpr int kPack = 8;          // values of 16 bytes
constexpr int kStep = 4 * kPack;  // columns of a warp in a step
constexpr int kSpan = kWarps * kStep;
constexpr int kTile = 8;     // rows of W
constexpr int kGroup = 2;    // tiles whose sums are added at once
constexpr int kMaxRows = 8;  // of x

struct Shape {
  int64_t tiles;  // of W
  int columns;    // of a tile, in whole steps
};

// Values of a row of x' in shared memory: 64 bytes more than a multiple of 128, so that the eight threads of
// a quarter warp, of two rows, meet no bank twice.
__host__ __device__ inline int pitch_of(int columns) { return columns + 32; }

// c += of rows 0 to 7 on the left
__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1) {
  mma_halves<bf16>(c, {a0, 0, a2, 0}, b0, b1);
}

// kPack values of a row, as they are stored: no load is waited for before a value is asked for.
struct Values {
  Pack<float, kPack> wide;
  Pack<bf16, kPack> narrow;
  bool is_wide;

  __device__ float at(int i) const { return is_wide ? wide.at(i) : narrow.at(i); }
};

// In columns from `column`, zeros beyond the row's end, or where there is no tensor.
template <bool kVector>
__device__ inline Values load_values(const View& from, int64_t row, int64_t column, int64_t k) {
  const auto load = [&]<class S>(Pack<S, kPack>& pack) {
    const S* at = static_cast<const S*>(from.data) + row * from.stride[0] + column * from.stride[1];
    if (!kVector)
      pack = load_pack<kPack>(at, from.stride[1], k - column, false);
    else if (column < k)
      pack = *reinterpret_cast<const Pack<S, kPack>*>(at);
  };
  Values values = {{}, {}, from.dtype == DType::f32};
  if (from.data) values.is_wide ? load(values.wide) : load(values.narrow);
  return values;
}

// Fills s_x with the rows of x' without the norm's factors, zeros beyond column k, and writes the sum. Every
// thread calls between() once it has asked for its first values. s_squares: of a row in warps row,
// row + teams, ...; returns teams.
template <bool kVector, class F>
__device__ inline int make_rows(const NormLinear& p, bf16* s_x, float* s_squares, int columns, F between) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int teams = 1;  // a power of two; a team of as many warps as the others has a row
  while (teams < p.b) teams *= 2;
  const int row = warp % teams, apart = kThreads / teams * kPack;
  int column = (warp / teams * 32 + lane) * kPack;
  Values x, other, weight;  // other: of residual or z
  const auto load = [&] {
    x = load_values<kVector>(p.x, row, column, p.k);
    other = load_values<kVector>(p.residual.data ? p.residual : p.z, row, column, p.k);
    weight = load_values<kVector>(p.norm, 0, column, p.k);
  };
  bool has_columns = row < p.b && column < columns;
  if (has_columns) load();
  between();
  float squares = 0;
  while (has_columns) {
    float v[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      v[i] = x.at(i);
      if (p.residual.data) v[i] += other.at(i);
      if (p.residual.data && p.sum.dtype != DType::f32) v[i] = to_real(from_real<bf16>(v[i]));
    }
    const auto store = [&]<class S>(S* sum) {
      store_values(sum + row * p.k + column, 1, p.k - column, kVector, v);
    };
    if (p.sum.data && blockIdx.x == 0)
      p.sum.dtype == DType::f32 ? store(static_cast<float*>(p.sum.data))
                                : store(static_cast<bf16*>(p.sum.data));
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float gate = p.z.data ? silu(other.at(i)) : 1;
      if (!p.norm_before_gate) v[i] *= gate;
      squares += v[i] * v[i];
      if (p.norm.data) v[i] *= weight.at(i);
      if (p.norm_before_gate) v[i] *= gate;
    }
    *reinterpret_cast<Pack<bf16, kPack>*>(s_x + row * pitch_of(columns) + column) = to_pack<bf16>(v);
    column += apart;
    has_columns = column < columns;
    if (has_columns) load();
  }
  for (int i = 16; i > 0; i /= 2) squares += __shfl_xor_sync(kAllLanes, squares, i);
  if (lane == 0) s_squares[warp] = squares;
  return teams;
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads, 1) norm_linear(const NormLinear p, const Shape shape) {
  extern __shared__ uint4 s_memory[];
  __shared__ float s_squares[kWarps], s_factor[kMaxRows];
  const int columns = shape.columns, pitch = pitch_of(columns);
  auto* const s_slots = reinterpret_cast<Pack<bf16, kPack>*>(s_memory) + threadIdx.x;
  bf16* const s_x = reinterpret_cast<bf16*>(s_memory + kAhead * kThreads);
  float* const s_sums = reinterpret_cast<float*>(s_x + p.b * pitch);
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
  const int64_t begin = blockIdx.x * shape.tiles / gridDim.x,
                end = (blockIdx.x + 1) * shape.tiles / gridDim.x;

  // The next step's copy, into the given slot.
  const int first_column = warp * kStep + part * kPack;
  const bf16* const weight = static_cast<const bf16*>(p.weight.data);
  const bf16* next = weight + (begin * kTile + row) * p.weight.stride[0] + first_column * p.weight.stride[1];
  const int64_t to_next_step = kSpan * p.weight.stride[1],
                to_next_tile = kTile * p.weight.stride[0] - columns * p.weight.stride[1];
  int next_column = first_column, rows_left = int(min(end * kTile, p.n) - begin * kTile) - row;
  const auto copy_next = [&](int slot) {
    const bool inside = rows_left > 0 && next_column < p.k;
    if constexpr (kVector) {
      copy_async(s_slots + slot * kThreads, inside ? next : weight, inside ? 16 : 0);
      commit_copies();
    } else {
      s_slots[slot * kThreads] =
          load_pack<kPack>(next, p.weight.stride[1], inside ? p.k - next_column : 0, false);
    }
    next_column += kSpan;
    next += to_next_step;
    if (next_column >= columns) {
      next_column = first_column;
      next += to_next_tile;
      rows_left -= kTile;
    }
  };
  const int teams = make_rows<kVector>(p, s_x, s_squares, columns, [&] {
    for (int slot = 0; slot < kAhead; ++slot) copy_next(slot);
  });
  __syncthreads();
  if (threadIdx.x < p.b) {
    float sum = 0;
    for (int i = threadIdx.x; i < kWarps; i += teams) sum += s_squares[i];
    s_factor[threadIdx.x] = p.norm.data ? 1 / sqrtf(sum / float(p.k) + float(p.eps)) : 1;
  }

  const bool has_x = row < p.b;
  const bf16* const my_x = s_x + row * pitch + first_column;
  int slot = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    float c[2][4] = {};
    for (int column = 0; column < columns; column += kSpan) {
      wait_for_copies<kAhead - 1>();
      const Pack<bf16, kPack> w = s_slots[slot * kThreads];
      Pack<bf16, kPack> x = {};
      if (has_x) x = *reinterpret_cast<const Pack<bf16, kPack>*>(my_x + column);
      mma(c[0], x.word[0], x.word[1], w.word[0], w.word[1]);
      mma(c[1], x.word[2], x.word[3], w.word[2], w.word[3]);
      copy_next(slot);
      if (++slot == kAhead) slot = 0;
    }
    // c: row `row` of x', rows 2 part, 2 part + 1 of the tile
    const int at = int(tile - begin) % (2 * kGroup), sums = int(p.b) * kTile;
    if (has_x)
      *reinterpret_cast<float2*>(s_sums + (at * kWarps + warp) * sums + row * kTile + 2 * part) =
          make_float2(c[0][0] + c[1][0], c[0][1] + c[1][1]);
    if (at % kGroup < kGroup - 1 && tile + 1 < end) continue;
    __syncthreads();  // the other half of s_sums is free again when the next group has come here
    const int mine = threadIdx.x / sums, value = threadIdx.x % sums;  // of the group's tiles; of its sums
    const int64_t to_row = (tile - at % kGroup + mine) * kTile + value % kTile;
    if (mine > at % kGroup || to_row >= p.n) continue;
    const float* from = s_sums + ((at / kGroup * kGroup + mine) * kWarps) * sums + value;
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += from[i * sums];
    sum *= s_factor[value / kTile];
    if (p.bias.data) sum += load_one<float>(p.bias, to_row * p.bias.stride[0]);
    static_cast<bf16*>(p.y.data)[value / kTile * p.n + to_row] = from_real<bf16>(sum);
  }
}

// The rows [begin, begin + b) of the call.
NormLinear rows_of(NormLinear p, int64_t begin, int64_t b) {
  p.b = b;
  for (View* v : {&p.x, &p.residual, &p.z, &p.sum, &p.y})
    if (v->data)
      v->data = static_cast<char*>(v->data) + begin * v->stride[0] * (v->dtype == DType::f32 ? 4 : 2);
  return p;
}

}  // namespace

}  // namespace gpu

const char* norm_linear_cuda(const NormLinear& p, void* cuda_stream) {
  using namespace gpu;
  if (p.b * p.n == 0) return nullptr;
  const Shape shape = {(p.n + kTile - 1) / kTile, int((p.k + kSpan - 1) / kSpan * kSpan)};
  const int64_t slot_bytes = kAhead * kThreads * 16, static_bytes = 1024,
                row_bytes = pitch_of(shape.columns) * 2 + 2 * kGroup * kWarps * kTile * 4;
  const int64_t rows = std::min<int64_t>(kMaxRows, (shared_bytes() - static_bytes - slot_bytes) / row_bytes);
  if (rows < 1) return "a row does not fit into shared memory";
  bool vector = p.k % kPack == 0 && packs_align(p.weight, 1, {p.n}, kPack);
  for (const View* v : {&p.x, &p.residual, &p.z, &p.sum, &p.norm})
    vector = vector && (!v->data || packs_align(*v, 1, {p.b}, kPack));
  const auto kernel = vector ? norm_linear<true> : norm_linear<false>;
  const int shared = int(slot_bytes + std::min(rows, p.b) * row_bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  for (int64_t begin = 0; begin < p.b; begin += rows)
    kernel<<<unsigned(std::min(multiprocessors(), shape.tiles)), kThreads, shared,
             static_cast<cudaStream_t>(cuda_stream)>>>(rows_of(p, begin, std::min(rows, p.b - begin)), shape);
  return launch_error();
}

}  // namespace mamba_ops

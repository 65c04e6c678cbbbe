// Residual addition and RMS norm, backward:
//
//   r = (mean s^2 + eps)^-1/2;  q = gy w;  g = gs + r (q - s r^2 mean(q s)) for both summands;  gw = sum_rows
//   gy s r
//
// A block owns a run of rows, a thread one pack of 16 bytes of gy in every row (of longer rows every so many
// packs, which it then reads twice): it meets the others for the sums of s^2 and q s, and stores g in the
// dtypes of both summands. Its part of gw stays in registers (in the partial row itself where rows are long);
// one partial row per block, which add_norm_reduce adds in order: no atomics, bitwise repeatable, the same on
// every GPU. Bound by memory, every tensor once: 4096 x 2560 bfloat16 beside a float32 stream, 168 MB, take
// 0.081 ms on an H100, 2.1 TB/s where a copy has 3.0.
#include "kernels/add_norm.h"
#include "kernels/cuda/block_sums.cuh"
#include "kernels/cuda/load_store.cuh"
#include "kernels/cuda/reduce.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kMaxThreads = 512;
constexpr int64_t kThreads = 160 << 10;  // of a large call

template <class T>
int64_t packs_of_row(const AddNormBwd& p) {
  return (p.d * int64_t(sizeof(T)) + 15) / 16;
}
template <class T>
int threads_of_block(const AddNormBwd& p) {
  return int(std::min<int64_t>((packs_of_row<T>(p) + 31) / 32 * 32, kMaxThreads));
}

// T: of gy and x. S: of s, gs and the residual. R: of the arithmetic. kOnce: a thread has one pack of a row.
// vector: packs align.
template <class T, class S, class R, bool kOnce>
__global__ void __launch_bounds__(kMaxThreads) add_rms_norm_bwd(const AddNormBwd p, const bool vector) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t d = p.d, step = blockDim.x * kPack, first = threadIdx.x * kPack;
  const int64_t begin = blockIdx.x * p.rows / gridDim.x, end = (blockIdx.x + 1) * p.rows / gridDim.x;
  R* partial = static_cast<R*>(p.partial) + blockIdx.x * padded(d);
  Pack<T, kPack> gy = {};
  Pack<S, kPack> s = {}, gs = {};
  R weight[kPack] = {}, dweight[kPack] = {};
  const auto load_weight = [&](int64_t i) {
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      weight[k] = i + k < d ? load_one<R>(p.weight, (i + k) * p.weight.stride[0]) : R(0);
  };
  const auto load = [&](int64_t row, int64_t i) {
    const int64_t at = row * d + i;
    gy = load_pack<kPack>(static_cast<const T*>(p.dy.data) + at, 1, d - i, vector);
    s = load_pack<kPack>(static_cast<const S*>(p.sum.data) + at, 1, d - i, vector);
    if (p.dsum.data) gs = load_pack<kPack>(static_cast<const S*>(p.dsum.data) + at, 1, d - i, vector);
    if (!kOnce) load_weight(i);
  };
  if (kOnce) load_weight(first);
  for (int64_t row = begin; row < end; ++row) {
    R sums[2] = {};
    for (int64_t i = first; i < d; i += step) {
      load(row, i);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const R v = s.at(k);
        sums[0] += v * v;
        sums[1] += R(gy.at(k)) * weight[k] * v;
      }
    }
    block_sums(sums, (row - begin) & 1);
    const R r = R(1) / sqrt(sums[0] / R(d) + R(p.eps)), c = r * r * r * (sums[1] / R(d));
    for (int64_t i = first; i < d; i += step) {
      if (!kOnce) load(row, i);
      R g[kPack];
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const R v = s.at(k), gyk = gy.at(k), share = gyk * (v * r);
        g[k] = R(gs.at(k)) + (gyk * weight[k] * r - v * c);
        if (kOnce)
          dweight[k] += share;
        else if (i + k < d)
          partial[i + k] = share + (row == begin ? R(0) : partial[i + k]);
      }
      const int64_t at = row * d + i;
      store_values(static_cast<S*>(p.dresidual.data) + at, 1, d - i, vector, g);
      if (p.dx.data) store_values(static_cast<T*>(p.dx.data) + at, 1, d - i, vector, g);
    }
  }
  if (kOnce)
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      if (first + k < d) partial[first + k] = dweight[k];
}

// dweight from the partial sums of the blocks.
template <class R>
__global__ void __launch_bounds__(kReduceThreads) add_norm_reduce(const AddNormBwd p) {
  const int64_t column = int64_t(blockIdx.x) * kReduceColumns + threadIdx.x % kReduceColumns;
  const double total =
      sum_column(static_cast<const R*>(p.partial) + column, p.units, padded(p.d), column < p.d);
  if (threadIdx.x < kReduceColumns && column < p.d) store_one(p.dweight, column * p.dweight.stride[0], total);
}

template <class T, class S, class R>
const char* launch(const AddNormBwd& p, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  bool vector = p.d % kPack == 0;
  for (const View* v : {&p.dy, &p.sum, &p.dsum, &p.dresidual, &p.dx})
    vector = vector && reinterpret_cast<uintptr_t>(v->data) % 16 == 0;
  const int threads = threads_of_block<T>(p);
  auto kernel = add_rms_norm_bwd<T, S, R, false>;
  if constexpr (sizeof(R) == sizeof(Real<T>))
    if (packs_of_row<T>(p) <= threads) kernel = add_rms_norm_bwd<T, S, R, true>;
  if (p.units > 0) kernel<<<unsigned(p.units), threads, 0, stream>>>(p, vector);
  add_norm_reduce<R><<<unsigned(reduce_blocks(p.d)), kReduceThreads, 0, stream>>>(p);
  return launch_error();
}

}  // namespace

}  // namespace gpu

int64_t add_rms_norm_bwd_units_cuda(const AddNormBwd& p) {
  return gpu::by_storage(p.dy.dtype, [&]<class T>() {
    return p.rows == 0 ? 0 : std::clamp<int64_t>(gpu::kThreads / gpu::threads_of_block<T>(p), 1, p.rows);
  });
}

const char* add_rms_norm_bwd_cuda(const AddNormBwd& p, bool wide, void* cuda_stream) {
  using namespace gpu;
  if (p.d == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  return by_storage(p.dy.dtype, [&]<class T>() -> const char* {
    using R = Real<T>;
    if (p.sum.dtype == p.dy.dtype) return wide ? launch<T, T, double>(p, stream) : launch<T, T, R>(p, stream);
    return wide ? launch<T, R, double>(p, stream) : launch<T, R, R>(p, stream);
  });
}

}  // namespace mamba_ops

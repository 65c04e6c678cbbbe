// Residual addition and RMS norm:  s = residual + x, rounded as it is stored;  y = s (mean s^2 + eps)^-1/2 w.
//
// A block owns a row, a thread every so many packs of 16 bytes of x: it adds and stores s, meets the others
// for the sum of squares (shuffles, then the sums of the warps through shared memory, in a
// fixed order: bitwise repeatable), and reads its own part of s again, out of the caches. Bound by memory;
// few rows by the two latencies.
#include <climits>

#include "kernels/add_norm.h"
#include "kernels/cuda/block_sums.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/load_store.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kMaxThreads = 512;

// T: of x and y. S: of residual and s. vector: packs align.
template <class T, class S>
__global__ void __launch_bounds__(kMaxThreads) add_rms_norm(const AddNorm p, const bool vector) {
  using R = Real<T>;
  constexpr int kPack = 16 / sizeof(T);
  const int64_t d = p.d, begin = blockIdx.x * d, step = blockDim.x * kPack;
  const T* x = static_cast<const T*>(p.x.data) + begin;
  const S* residual = static_cast<const S*>(p.residual.data) + begin;
  S* s = static_cast<S*>(p.sum.data) + begin;
  T* y = static_cast<T*>(p.y.data) + begin;
  overlap();
  R v[kPack], squares[1] = {};
  for (int64_t i = threadIdx.x * kPack; i < d; i += step) {
    const auto added = load_pack<kPack>(x + i, 1, d - i, vector);
    const auto before = load_pack<kPack>(residual + i, 1, d - i, vector);
#pragma unroll
    for (int k = 0; k < kPack; ++k) v[k] = before.at(k) + added.at(k);
    const Pack<S, kPack> stored = to_pack<S>(v);
    store_pack(s + i, 1, d - i, vector, stored);
#pragma unroll
    for (int k = 0; k < kPack; ++k) squares[0] += stored.at(k) * stored.at(k);
  }
  block_sums(squares, 0);
  const R scale = R(1) / sqrt(squares[0] / R(d) + R(p.eps));
  for (int64_t i = threadIdx.x * kPack; i < d; i += step) {
    const auto stored = load_pack<kPack>(s + i, 1, d - i, vector);
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      v[k] = i + k < d ? stored.at(k) * (scale * load_one<R>(p.weight, (i + k) * p.weight.stride[0])) : R(0);
    store_pack(y + i, 1, d - i, vector, to_pack<T>(v));
  }
}

}  // namespace

}  // namespace gpu

const char* add_rms_norm_cuda(const AddNorm& p, void* cuda_stream) {
  using namespace gpu;
  if (p.rows * p.d == 0) return nullptr;
  if (p.rows > INT_MAX) return "more rows than one launch may have";
  return by_storage(p.x.dtype, [&]<class T>() -> const char* {
    constexpr int kPack = 16 / sizeof(T);
    bool vector = p.d % kPack == 0;
    for (const View* v : {&p.x, &p.residual, &p.sum, &p.y})
      vector = vector && reinterpret_cast<uintptr_t>(v->data) % 16 == 0;
    const int64_t packs = (p.d + kPack - 1) / kPack;
    const int threads = int(std::min<int64_t>((packs + 31) / 32 * 32, kMaxThreads));
    const auto kernel = p.residual.dtype == p.x.dtype ? add_rms_norm<T, T> : add_rms_norm<T, Real<T>>;
    launch_overlapped(kernel, unsigned(p.rows), threads, 0, static_cast<cudaStream_t>(cuda_stream), p,
                      vector);
    return launch_error();
  });
}

}  // namespace mamba_ops

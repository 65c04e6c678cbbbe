// One token, or a few, of the causal convolution, with the state in place (math: kernels/causal_conv1d.h).
//
// One token of four taps, whose tensors have one type (weight and bias may be float32) and lie in whole packs
// of 16 bytes: a thread owns a pack of channels of one batch row, and asks for its inputs, states and weights
// at once, 16 bytes at a time. Where there are few, a block is a warp: more multiprocessors have a share.
// Anything else: a thread owns a channel of one batch row, keeps the last w - 1 inputs in registers, walks
// the tokens, and moves the state on. Nothing is shared, no value is summed by two threads: bitwise
// repeatable. A call moves a few bytes per channel: the launch is what it costs, and one latency of the
// memory.
#include <algorithm>

#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_rows.cuh"
#include "kernels/state_update.h"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kThreads = 128, kFewThreads = 32;

// ---- Packs of 16 bytes

// Values that neighbouring packs hold.
template <class T, int kPacks>
struct Packs {
  static constexpr int kPack = 16 / sizeof(T);

  Pack<T, kPack> pack[kPacks];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) pack[i] = reinterpret_cast<const Pack<T, kPack>*>(from)[i];
  }
  __device__ Real<T> at(int i) const { return pack[i / kPack].at(i % kPack); }
  __device__ void set(int i, Real<T> v) { pack[i / kPack].set(i % kPack, from_real<T>(v)); }  // in order
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) reinterpret_cast<Pack<T, kPack>*>(to)[i] = pack[i];
  }
};

// W: of weight and bias. kSeen: k of the state.
template <class T, class W, int kSeen>
__global__ void __launch_bounds__(kThreads) conv_packs(const ConvUpdate p, const DeviceRows rows) {
  constexpr int kPack = 16 / sizeof(T), kTaps = kConvMaxWidth, kWide = sizeof(W) / sizeof(T);
  const ConvDims& dims = p.conv.dims;
  const int64_t c = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kPack;
  const bool inside = c < dims.d;  // whole warps look for their rows
  overlap();
  Packs<W, kTaps * kWide> weight = {};
  Packs<W, kWide> bias = {};
  if (inside) {
    weight.load(static_cast<const W*>(p.conv.weight.data) + c * kTaps);
    if (p.conv.bias.data) bias.load(static_cast<const W*>(p.conv.bias.data) + c);
  }

  const auto output = [&](int64_t b) { return static_cast<T*>(p.conv.y.data) + b * p.conv.y.stride[0] + c; };
  const auto update = [&](int64_t b, int64_t row) {
    if (!inside) return;
    T* const state = static_cast<T*>(p.state.data) + row * p.state.stride[0] + c * kSeen;
    Packs<T, kSeen> seen, moved;
    Packs<T, 1> x, y;
    seen.load(state);
    x.load(static_cast<const T*>(p.conv.x.data) + b * p.conv.x.stride[0] + c);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      Real<T> conv = bias.at(i);
#pragma unroll
      for (int k = 0; k + 1 < kTaps; ++k)
        conv += weight.at(kTaps * i + k) * seen.at(kSeen * i + kSeen - (kTaps - 1) + k);
      conv += weight.at(kTaps * i + kTaps - 1) * x.at(i);
      y.set(i, dims.silu ? silu(conv) : conv);
#pragma unroll
      for (int k = 0; k < kSeen; ++k)
        moved.set(kSeen * i + k, k + 1 < kSeen ? seen.at(kSeen * i + k + 1) : x.at(i));
    }
    y.store(output(b));
    moved.store(state);
  };
  const auto fill = [&](int64_t b, Real<T> value) {
    Packs<T, 1> y;
#pragma unroll
    for (int i = 0; i < kPack; ++i) y.set(i, value);
    if (inside) y.store(output(b));
  };
  for_rows(rows, dims.b, update, fill);
}

template <class T, class W>
bool packs_fit(const ConvUpdate& p, const DeviceRows& rows) {
  constexpr int kPack = 16 / sizeof(T);
  const ConvDims& dims = p.conv.dims;
  const View &x = p.conv.x, &y = p.conv.y, &weight = p.conv.weight, &bias = p.conv.bias, &state = p.state;
  const auto fits = [&](const View& v) { return v.dtype == x.dtype && packs_align(v, 1, {dims.b}, kPack); };
  const auto is_parameter = [&](const View& v, int dim) {
    return v.dtype == (std::is_same_v<W, T> ? x.dtype : DType::f32) &&
           packs_align(v, dim, {}, 16 / sizeof(W));
  };
  return dims.l == 1 && dims.w == kConvMaxWidth && (p.k == dims.w || p.k == dims.w - 1) &&
         dims.d % kPack == 0 && fits(x) && fits(y) && weight.stride[0] == dims.w && is_parameter(weight, 1) &&
         (!bias.data || is_parameter(bias, 0)) && state.dtype == x.dtype && state.stride[1] == p.k &&
         packs_align(state, 2, {rows.states}, kPack);
}

// ---- Anything else

template <class R>
__global__ void __launch_bounds__(kThreads) conv_any(const ConvUpdate p, const DeviceRows rows) {
  const ConvDims& dims = p.conv.dims;
  const View &x = p.conv.x, &y = p.conv.y, &state = p.state, &weights = p.conv.weight;
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = c < dims.d;  // whole warps look for their rows
  overlap();
  R weight[kConvMaxWidth] = {}, bias = 0;
#pragma unroll
  for (int k = 0; k < kConvMaxWidth; ++k)
    if (inside && k < dims.w) weight[k] = load_one<R>(weights, c * weights.stride[0] + k * weights.stride[1]);
  if (inside && p.conv.bias.data) bias = load_one<R>(p.conv.bias, c * p.conv.bias.stride[0]);

  const auto update = [&](int64_t b, int64_t row) {
    if (!inside) return;
    const int64_t at = row * state.stride[0] + c * state.stride[1], step = state.stride[2];
    const auto token = [&](int64_t t) {
      return load_one<R>(x, b * x.stride[0] + c * x.stride[1] + t * x.stride[2]);
    };
    R seen[kConvMaxWidth];  // seen[k] meets weight[k]
#pragma unroll
    for (int k = 0; k < kConvMaxWidth; ++k)
      seen[k] = k + 1 < dims.w ? load_one<R>(state, at + (p.k - (dims.w - 1) + k) * step) : R(0);
    for (int64_t t = 0; t < dims.l; ++t) {
      R conv = bias;
#pragma unroll
      for (int k = 0; k < kConvMaxWidth; ++k) {
        if (k + 1 == dims.w) seen[k] = token(t);
        if (k < dims.w) conv += weight[k] * seen[k];
      }
      store_one(y, b * y.stride[0] + c * y.stride[1] + t * y.stride[2], dims.silu ? silu(conv) : conv);
#pragma unroll
      for (int k = 0; k + 1 < kConvMaxWidth; ++k) seen[k] = seen[k + 1];
    }
    for (int64_t j = 0; j < p.k; ++j)
      if (j + dims.l < p.k)
        store_one(state, at + j * step, load_one<double>(state, at + (j + dims.l) * step));
      else
        store_one(state, at + j * step, token(j + dims.l - p.k));
  };
  const auto fill = [&](int64_t b, R value) {
    for (int64_t t = 0; inside && t < dims.l; ++t)
      store_one(y, b * y.stride[0] + c * y.stride[1] + t * y.stride[2], value);
  };
  for_rows(rows, dims.b, update, fill);
}

}  // namespace

}  // namespace gpu

const char* state_update_cuda(const ConvUpdate& p, const DeviceRows& rows, void* cuda_stream) {
  using namespace gpu;
  const ConvDims& dims = p.conv.dims;
  if (dims.b * dims.d == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const auto grid = [&](int64_t owners, int threads) {
    return dim3(unsigned((owners + threads - 1) / threads), 1, unsigned(std::min<int64_t>(dims.b, 65535)));
  };
  by_storage(p.conv.x.dtype, [&]<class T>() {
    const auto in_packs = [&]<class W>() {
      if (!packs_fit<T, W>(p, rows)) return false;
      const auto kernel =
          p.k == dims.w ? conv_packs<T, W, kConvMaxWidth> : conv_packs<T, W, kConvMaxWidth - 1>;
      const int64_t owners = dims.d / (16 / sizeof(T));
      const int threads = dims.b * owners < kThreads * multiprocessors() ? kFewThreads : kThreads;
      launch_overlapped(kernel, grid(owners, threads), threads, 0, stream, p, rows);
      return true;
    };
    if (in_packs.template operator()<T>()) return;
    if constexpr (sizeof(T) == 2)
      if (in_packs.template operator()<float>()) return;
    launch_overlapped(conv_any<Real<T>>, grid(dims.d, kThreads), kThreads, 0, stream, p, rows);
  });
  return launch_error();
}

}  // namespace mamba_ops

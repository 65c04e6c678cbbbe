// One token, or a few, of the causal convolution, with the state in place (math: kernels/causal_conv1d.h).
//
// One token of four taps, whose tensors have one type (weight and bias may be float32) and lie in whole
// packs: a thread owns two channels of one batch row, and asks for their inputs, states and weights at once.
// Where there are few, a block is a warp: more multiprocessors have a share. Anything else: a thread owns a
// channel of one batch row, keeps the last w - 1 inputs in registers, walks the tokens, and moves the state
// on. Nothing is shared, no value is summed by two threads: bitwise repeatable.
//
// A call moves a few bytes per channel: it costs its launch, one latency of the memory, and its instructions
// (four or eight channels a thread: 0.5 or 1.1 us more). d5376 bfloat16 on an H200, L2 flushed: b1 4.2 us,
// of which 3.1 are those of an empty kernel, b128 7.2.
#include <algorithm>
#include <climits>
#include <optional>

#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_rows.cuh"
#include "kernels/state_update.h"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kThreads = 128, kFewThreads = 32;
constexpr int kC = 2;  // channels of a thread, in packs

// ---- Packs

// What they need of ConvUpdate, with strides in bytes, and weights in the place of an absent bias.
struct Channels {
  char *x, *y, *state;
  const void *weight, *bias;
  unsigned x_stride, y_stride, state_stride;  // from one batch row, or one row of the state, to the next
  unsigned b, d;
  bool has_bias, silu;
};

// kN neighbouring values, moved in the largest packs that they make up.
template <class T, int kN>
struct Values {
  static constexpr int kBytes = kN * sizeof(T);
  static constexpr int kPack = (kBytes % 16 == 0 ? 16 : kBytes % 8 == 0 ? 8 : 4) / sizeof(T);

  Pack<T, kPack> pack[kN / kPack];

  __device__ void load(const void* from) {
#pragma unroll
    for (int i = 0; i < kN / kPack; ++i) pack[i] = static_cast<const Pack<T, kPack>*>(from)[i];
  }
  __device__ Real<T> at(int i) const { return pack[i / kPack].at(i % kPack); }
  __device__ void set(int i, Real<T> v) { pack[i / kPack].set(i % kPack, from_real<T>(v)); }  // in order
  __device__ void store(void* to) const {
#pragma unroll
    for (int i = 0; i < kN / kPack; ++i) static_cast<Pack<T, kPack>*>(to)[i] = pack[i];
  }
};

// W: of weight and bias. kSeen: k of the state.
template <class T, class W, int kSeen>
__global__ void __launch_bounds__(kThreads)
    conv_packs(const __grid_constant__ Channels p, const __grid_constant__ DeviceRows rows) {
  constexpr int kTaps = kConvMaxWidth;
  const unsigned own = (blockIdx.x * blockDim.x + threadIdx.x) * kC;
  const unsigned c = min(own, p.d - kC);  // whole warps look for their rows
  overlap();
  const auto output = [&](unsigned b) { return p.y + uint64_t(b) * p.y_stride + c * sizeof(T); };
  const auto update = [&](unsigned b, unsigned row) {
    char* const state = p.state + uint64_t(row) * p.state_stride + uint64_t(c) * (kSeen * sizeof(T));
    // Everything is asked for before anything waits.
    Values<T, kC> x, y;
    Values<T, kC * kSeen> seen, moved;
    Values<W, kC * kTaps> weight;
    Values<W, kC> bias;
    seen.load(state);
    x.load(p.x + uint64_t(b) * p.x_stride + c * sizeof(T));
    weight.load(static_cast<const W*>(p.weight) + uint64_t(c) * kTaps);
    bias.load(static_cast<const W*>(p.bias) + c);
#pragma unroll
    for (int i = 0; i < kC; ++i) {
      Real<T> conv = p.has_bias ? Real<T>(bias.at(i)) : Real<T>(0);
#pragma unroll
      for (int k = 0; k + 1 < kTaps; ++k)
        conv += weight.at(kTaps * i + k) * seen.at(kSeen * i + kSeen - (kTaps - 1) + k);
      conv += weight.at(kTaps * i + kTaps - 1) * x.at(i);
      y.set(i, p.silu ? silu(conv) : conv);
#pragma unroll
      for (int k = 0; k < kSeen; ++k)
        moved.set(kSeen * i + k, k + 1 < kSeen ? seen.at(kSeen * i + k + 1) : x.at(i));
    }
    if (own >= p.d) return;
    y.store(output(b));
    moved.store(state);
  };
  const auto fill = [&](unsigned b, Real<T> value) {
    Values<T, kC> y;
#pragma unroll
    for (int i = 0; i < kC; ++i) y.set(i, value);
    if (own < p.d) y.store(output(b));
  };
  for_rows(rows, p.b, update, fill);
}

// Nothing where the packs do not fit, or numbers need more than 32 bits.
template <class T, class W>
std::optional<Channels> in_packs(const ConvUpdate& p, const DeviceRows& rows) {
  const ConvDims& dims = p.conv.dims;
  const View &x = p.conv.x, &y = p.conv.y, &weight = p.conv.weight, &bias = p.conv.bias, &state = p.state;
  const int state_pack =
      p.k == kConvMaxWidth ? Values<T, kC * kConvMaxWidth>::kPack : Values<T, kC*(kConvMaxWidth - 1)>::kPack;
  constexpr int64_t kMost = INT_MAX / sizeof(double);
  const auto fits = [&](const View& v) {
    return v.dtype == x.dtype && packs_align(v, 1, {dims.b}, kC) && v.stride[0] <= kMost;
  };
  const auto is_parameter = [&](const View& v, int dim) {
    return v.dtype == (std::is_same_v<W, T> ? x.dtype : DType::f32) && packs_align(v, dim, {}, 4 * kC);
  };
  const bool fit =
      dims.l == 1 && dims.w == kConvMaxWidth && (p.k == dims.w || p.k == dims.w - 1) && dims.d % kC == 0 &&
      std::max({dims.b, dims.d, rows.states}) <= kMost && fits(x) && fits(y) && weight.stride[0] == dims.w &&
      is_parameter(weight, 1) && (!bias.data || is_parameter(bias, 0)) && state.dtype == x.dtype &&
      state.stride[1] == p.k && packs_align(state, 2, {rows.states}, state_pack) && state.stride[0] <= kMost;
  if (!fit) return std::nullopt;
  const auto bytes = [&](int64_t stride) { return unsigned(stride * sizeof(T)); };
  return Channels{.x = static_cast<char*>(x.data),
                  .y = static_cast<char*>(y.data),
                  .state = static_cast<char*>(state.data),
                  .weight = weight.data,
                  .bias = bias ? bias.data : weight.data,
                  .x_stride = bytes(x.stride[0]),
                  .y_stride = bytes(y.stride[0]),
                  .state_stride = bytes(state.stride[0]),
                  .b = unsigned(dims.b),
                  .d = unsigned(dims.d),
                  .has_bias = bool(bias),
                  .silu = dims.silu};
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
    return dim3(unsigned((owners + threads - 1) / threads), 1, unsigned(std::min(dims.b, kMaxGrid)));
  };
  by_storage(p.conv.x.dtype, [&]<class T>() {
    const auto launched = [&]<class W>() {
      const auto packs = in_packs<T, W>(p, rows);
      if (!packs) return false;
      const auto kernel =
          p.k == dims.w ? conv_packs<T, W, kConvMaxWidth> : conv_packs<T, W, kConvMaxWidth - 1>;
      const int64_t owners = dims.d / kC;
      const int threads = dims.b * owners < kThreads * multiprocessors() ? kFewThreads : kThreads;
      launch_overlapped(kernel, grid(owners, threads), threads, 0, stream, *packs, rows);
      return true;
    };
    if (launched.template operator()<T>()) return;
    if constexpr (sizeof(T) == 2)
      if (launched.template operator()<float>()) return;
    launch_overlapped(conv_any<Real<T>>, grid(dims.d, kThreads), kThreads, 0, stream, p, rows);
  });
  return launch_error();
}

}  // namespace mamba_ops

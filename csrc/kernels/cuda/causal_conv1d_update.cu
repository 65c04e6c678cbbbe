// One token, or a few, of the causal convolution, with the state in place (math: kernels/causal_conv1d.h).
//
// A thread owns a channel of one batch row: it keeps the last w - 1 inputs in registers, walks the tokens,
// and moves the state on. Nothing is shared, no value is summed by two threads: bitwise repeatable. A call
// moves a few bytes per channel: the launch is what it costs, and one latency of the memory, as no load waits
// for another.
#include <algorithm>

#include "kernels/cuda/state_rows.cuh"
#include "kernels/state_update.h"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kThreads = 128;

// T: of all tensors; void: each has its own.
template <class R, class T>
__global__ void __launch_bounds__(kThreads) conv_update(const ConvUpdate p, const DeviceRows rows) {
  constexpr bool kOneType = !std::is_void_v<T>;
  const ConvDims& dims = p.conv.dims;
  const View &x = p.conv.x, &y = p.conv.y, &state = p.state, &weights = p.conv.weight;
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = c < dims.d;  // whole warps look for their rows
  const auto load = [](const View& v, int64_t at) {
    if constexpr (kOneType)
      return to_real(static_cast<const T*>(v.data)[at]);
    else
      return load_one<R>(v, at);
  };
  const auto store = [](const View& v, int64_t at, R value) {
    if constexpr (kOneType)
      static_cast<T*>(v.data)[at] = from_real<T>(value);
    else
      store_one(v, at, value);
  };
  R weight[kConvMaxWidth], bias = 0;
#pragma unroll
  for (int k = 0; k < kConvMaxWidth; ++k)
    weight[k] = inside && k < dims.w ? load(weights, c * weights.stride[0] + k * weights.stride[1]) : R(0);
  if (inside && p.conv.bias.data) bias = load(p.conv.bias, c * p.conv.bias.stride[0]);

  const auto update = [&](int64_t b, int64_t row) {
    if (!inside) return;
    const int64_t at = row * state.stride[0] + c * state.stride[1], step = state.stride[2];
    const auto token = [&](int64_t t) {
      return load(x, b * x.stride[0] + c * x.stride[1] + t * x.stride[2]);
    };
    R seen[kConvMaxWidth];  // seen[k] meets weight[k]
#pragma unroll
    for (int k = 0; k < kConvMaxWidth; ++k)
      seen[k] = k + 1 < dims.w ? load(state, at + (p.k - (dims.w - 1) + k) * step) : R(0);
    for (int64_t t = 0; t < dims.l; ++t) {
      R conv = bias;
#pragma unroll
      for (int k = 0; k < kConvMaxWidth; ++k) {
        if (k + 1 == dims.w) seen[k] = token(t);
        if (k < dims.w) conv += weight[k] * seen[k];
      }
      store(y, b * y.stride[0] + c * y.stride[1] + t * y.stride[2], dims.silu ? silu(conv) : conv);
#pragma unroll
      for (int k = 0; k + 1 < kConvMaxWidth; ++k) seen[k] = seen[k + 1];
    }
    const int64_t known = kOneType ? dims.w - 1 : 0;  // the last ones, in seen
    for (int64_t j = 0; j + known < p.k; ++j)
      if (j + dims.l < p.k)
        store_one(state, at + j * step, load_one<double>(state, at + (j + dims.l) * step));
      else
        store_one(state, at + j * step, token(j + dims.l - p.k));
#pragma unroll
    for (int k = 0; k + 1 < kConvMaxWidth; ++k)
      if (k < known) store(state, at + (p.k - known + k) * step, seen[k]);
  };
  const auto fill = [&](int64_t b, R value) {
    for (int64_t t = 0; inside && t < dims.l; ++t)
      store(y, b * y.stride[0] + c * y.stride[1] + t * y.stride[2], value);
  };
  for_rows(rows, dims.b, update, fill);
}

}  // namespace

}  // namespace gpu

const char* state_update_cuda(const ConvUpdate& p, const DeviceRows& rows, void* stream) {
  using namespace gpu;
  const ConvDims& dims = p.conv.dims;
  if (dims.b * dims.d == 0) return nullptr;
  const dim3 grid(unsigned((dims.d + kThreads - 1) / kThreads), unsigned(std::min<int64_t>(dims.b, 65535)));
  const View *x = &p.conv.x, *bias = &p.conv.bias;
  const bool one_type = x->dtype == p.state.dtype && x->dtype == p.conv.weight.dtype &&
                        (!bias->data || x->dtype == bias->dtype);
  by_storage(x->dtype, [&]<class T>() {
    const auto kernel = one_type ? conv_update<Real<T>, T> : conv_update<Real<T>, void>;
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, rows);
  });
  return launch_error();
}

}  // namespace mamba_ops

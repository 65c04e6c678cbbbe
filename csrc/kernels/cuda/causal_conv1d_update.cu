// One token, or a few, of the causal convolution, with the state in place (math: kernels/causal_conv1d.h).
//
// A thread owns a channel of one batch row: it keeps the last w - 1 inputs in registers, walks the tokens,
// and moves the state on. Nothing is shared, no value is summed by two threads: bitwise repeatable. A call
// moves a few bytes per channel: the launch is what it costs.
#include <algorithm>

#include "kernels/cuda/state_rows.cuh"
#include "kernels/state_update.h"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kThreads = 128;

template <class R>
__global__ void __launch_bounds__(kThreads) conv_update(const ConvUpdate p, const DeviceRows rows) {
  const ConvDims& dims = p.conv.dims;
  const View &x = p.conv.x, &y = p.conv.y, &state = p.state, &weights = p.conv.weight;
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = c < dims.d;  // whole warps look for their rows
  R weight[kConvMaxWidth] = {}, bias = 0;
  for (int k = 0; inside && k < dims.w; ++k)
    weight[k] = load_one<R>(weights, c * weights.stride[0] + k * weights.stride[1]);
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

const char* state_update_cuda(const ConvUpdate& p, const DeviceRows& rows, void* stream) {
  using namespace gpu;
  const ConvDims& dims = p.conv.dims;
  if (dims.b * dims.d == 0) return nullptr;
  const dim3 grid(unsigned((dims.d + kThreads - 1) / kThreads), unsigned(std::min<int64_t>(dims.b, 65535)));
  const auto kernel = p.conv.x.dtype == DType::f64 ? conv_update<double> : conv_update<float>;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, rows);
  return launch_error();
}

}  // namespace mamba_ops

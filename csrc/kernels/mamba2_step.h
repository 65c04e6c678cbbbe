// One token of one sequence through a run of pre-norm Mamba-2 layers, in one launch. For every layer, with
// the stream s and the output o of the layer before (none before the first):
//
//   s <- s + o;   (z, xBC, dt) = W_in norm(s);   xBC <- silu(conv(xBC)), whose state moves on
//   step = clamp(softplus(dt + dt_bias));   h <- exp(-step exp(A_log)) h + step x B;   y = (C h + D x)
//   silu(z) o = W_out norm(y)
//
// norm(v) = v (mean v^2 + eps)^-1/2 w. Roundings are those of norm_linear_conv, ssd_state_update and
// norm_linear, by which a layer takes three launches: s as it is stored; v w before the product, which the
// rest of the norm multiplies; u, y and o. Hopper only, in bfloat16; d_inner = 2 d, one group of B and C.
#pragma once
#include "kernels/view.h"

namespace mamba_ops {

struct Mamba2Step {
  // Contiguous. In bfloat16, but for state, dt_bias, A_log and D, which may be float32.
  struct Layer {
    const void *norm, *in_proj, *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *gate_norm, *out_proj;
    void *conv_state, *state;
  };
  static constexpr int kMaxLayers = 128;

  int64_t layers, d, h, n;
  float eps, gate_eps, dt_min, dt_max;
  DType stream_dtype, state_dtype, dt_bias_dtype, A_dtype, D_dtype;
  bool conv_bias, D_by_channel;
  const void* stream;  // (d): s of the first layer
  void *out, *sum;     // (d): o and s of the last
  void* scratch;       // mamba2_step_scratch(p) bytes
  Layer layer[kMaxLayers];

  constexpr int64_t inner() const { return 2 * d; }
  constexpr int64_t conv_width() const { return inner() + 2 * n; }
  constexpr int64_t rows_in() const { return inner() + conv_width() + h; }
};

// Whether the kernel has room for the sizes and the number of layers, on the current device.
bool mamba2_step_takes(const Mamba2Step& p);
int64_t mamba2_step_scratch(const Mamba2Step& p);
// Returns nullptr, or what CUDA says went wrong; does not wait for the kernel.
const char* mamba2_step_hopper(const Mamba2Step& p, void* stream);

}  // namespace mamba_ops

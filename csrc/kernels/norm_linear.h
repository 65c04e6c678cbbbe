// A projection of few rows, with what stands around it in a layer's step:
//
//   y = W x' + bias;   x' = x, or s (mean s^2 + eps)^-1/2 w  of  s = residual + x, rounded as it is stored,
//                      or v r w  of  v = x silu(z),  or with norm_before_gate  x r w silu(z)
//   y[begin + c] = silu(conv)  for c < d:  a step of a causal convolution of y[begin + c], rounded as y is,
//                      whose state moves on
//
// x' is rounded before the norm's factor of its row multiplies the sums. CUDA only, in bfloat16.
#pragma once
#include "kernels/causal_conv1d.h"

namespace mamba_ops {

// The largest x (b, k) that is worth the kernel: for more rows torch's product is as fast, and wider ones
// find no room on small GPUs.
inline constexpr int64_t kNormLinearRows = 8, kNormLinearWidth = 8192;

struct NormLinear {
  // Columns [begin, begin + d) of y.
  struct Conv {
    int64_t begin, d;
    int w;
    View state;         // (b, d, w - 1), bfloat16; absent: no convolution
    View weight, bias;  // (d, w), (d)
  };
  int64_t b, k, n;
  double eps;
  bool norm_before_gate;
  View x, residual, z;  // (b, k)
  View sum;             // (b, k), contiguous
  View norm;            // (1, k)
  View weight, bias;    // (n, k), (n)
  View y;               // (b, n), contiguous
  Conv conv;
};

// Returns nullptr, or what CUDA says went wrong; does not wait for the kernel.
const char* norm_linear_cuda(const NormLinear& p, void* stream);

}  // namespace mamba_ops

// Residual addition and RMS norm: s = residual + x,  y = s (mean s^2 + eps)^-1/2 w over a row.
#pragma once
#include "kernels/view.h"

namespace mamba_ops {

struct AddNorm {
  int64_t rows, d;
  double eps;
  View x, residual, sum, y;  // (rows, d), contiguous
  View weight;               // (d)
  int64_t units;             // the rows are dealt to so many units of work
};

// Returns nullptr, or what CUDA says went wrong; does not wait for the kernel.
const char* add_rms_norm_cuda(const AddNorm& p, void* stream);

}  // namespace mamba_ops

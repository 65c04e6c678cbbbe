// Residual addition and RMS norm: s = residual + x,  y = s r w with r = (mean s^2 + eps)^-1/2 over a row.
// Backward: q = gy w,  g = gs + r (q - s r^2 mean(q s)) for both summands,  gw = sum_rows gy s r.
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

struct AddNormBwd {
  int64_t rows, d;
  double eps;
  View dy, sum, dsum;    // (rows, d), contiguous; dsum may be absent
  View dresidual, dx;    // the same gradient; dx is absent where it is of the same dtype
  View weight, dweight;  // (d)
  void* partial;         // (units, padded d) in the arithmetic type: sums of dweight
  int64_t units;         // the rows are dealt to so many units of work
};

// They return nullptr, or what CUDA says went wrong, and do not wait for the kernels. `wide`: float64
// arithmetic. The backward wants as many units as it says.
const char* add_rms_norm_cuda(const AddNorm& p, void* stream);
const char* add_rms_norm_bwd_cuda(const AddNormBwd& p, bool wide, void* stream);
int64_t add_rms_norm_bwd_units_cuda(const AddNormBwd& p);

}  // namespace mamba_ops

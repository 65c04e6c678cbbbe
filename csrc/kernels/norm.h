// Gated RMS norm over groups of the last dim (math: v = x or x silu(z), r = (mean v^2 + eps)^-1/2, y = v r w,
// times silu(z) where the norm comes before the gate).
#pragma once
#include "kernels/view.h"

namespace mamba_ops {

struct NormDims {
  int64_t lead[3];    // rows, as the three leading dims of every View
  int64_t d, group;   // a row, and the values in one of its groups
  int64_t tile_rows;  // rows of the innermost leading dim that are in hand at a time
  double eps;
  bool norm_before_gate;

  constexpr int64_t rows() const { return lead[0] * lead[1] * lead[2]; }
  constexpr int64_t groups() const { return d == 0 ? 0 : d / group; }
  int64_t tiles() const { return lead[0] * lead[1] * ((lead[2] + tile_rows - 1) / tile_rows); }
};

struct NormFwd {
  NormDims dims;
  View x, z, y;   // (lead, d)
  View weight;    // (d)
  int64_t units;  // the tiles are dealt to so many units of work
};

struct NormBwd {
  NormFwd fwd;      // y, the rows as the forward gives them, is written where it is there
  View dy, dx, dz;  // (lead, d)
  View dweight;     // (d)
  void* partial;    // (units, d / group, padded group) in the arithmetic type: sums of dweight
};

// CUDA: a unit is a run of rows, `partial` is (units, d) for rms_norm_gated_bwd_units_cuda units. They return
// nullptr, or what CUDA says went wrong, and do not wait for the kernels. `wide`: float64 arithmetic.
const char* rms_norm_gated_fwd_cuda(const NormFwd& p, void* stream);
const char* rms_norm_gated_bwd_cuda(const NormBwd& p, bool wide, void* stream);
int64_t rms_norm_gated_bwd_units_cuda(const NormDims& dims, bool wide);

}  // namespace mamba_ops

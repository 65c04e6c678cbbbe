// The operators as parts of a whole layer: arguments by name, and results where the caller wants them. A
// result that `where` does not name is allocated like its argument; those of absent arguments stay absent.
#pragma once
#include "ops/check.h"

namespace mamba_ops::parts {

struct ConvInputs {
  Tensor x, weight;
  OptTensor bias, initial_state, seq_idx, cu_seqlens;
  bool silu;
};
struct ConvGrads {
  OptTensor x, weight, bias, initial_state;
};
// y and the final state (0 elements where not asked for).
std::tuple<Tensor, Tensor> causal_conv1d_fwd(const ConvInputs& in, bool return_final_state, OptTensor y = {});
ConvGrads causal_conv1d_bwd(const ConvInputs& in, const Tensor& dy, const OptTensor& dfinal_state,
                            ConvGrads where = {});

struct ScanInputs {
  Tensor u, delta, A, B, C;
  OptTensor D, z, delta_bias, initial_state, seq_idx, cu_seqlens;
  bool softplus;
};
struct ScanGrads {
  OptTensor u, delta, A, B, C, D, z, delta_bias, initial_state;
};
// y, the final state and the checkpoints (0 elements where not asked for).
std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(const ScanInputs& in, bool return_final_state,
                                                      bool save_checkpoints, OptTensor y = {});
ScanGrads selective_scan_bwd(const ScanInputs& in, const Tensor& dy, const OptTensor& dfinal_state,
                             Tensor checkpoints, ScanGrads where = {});

struct SsdInputs {
  Tensor x, dt, A, B, C;
  OptTensor D, z, dt_bias, initial_state, seq_idx, cu_seqlens;
  bool softplus;
  double dt_min, dt_max;
  std::optional<int64_t> chunk_size;
  bool tf32;  // on CUDA: factors of products in float32 may be rounded to TF32
};
struct SsdGrads {
  OptTensor x, dt, A, B, C, D, z, dt_bias, initial_state;
};
std::tuple<Tensor, Tensor> ssd_fwd(const SsdInputs& in, bool return_final_state, OptTensor y = {});
SsdGrads ssd_bwd(const SsdInputs& in, const Tensor& dy, const OptTensor& dfinal_state, SsdGrads where = {});

struct NormInputs {
  Tensor x, weight;
  OptTensor z;
  double eps;
  int64_t group_size;
  bool norm_before_gate;
};
struct NormGrads {
  OptTensor x, weight, z;
};
Tensor rms_norm_gated_fwd(const NormInputs& in, OptTensor y = {});
// y: also gets the forward's result.
NormGrads rms_norm_gated_bwd(const NormInputs& in, const Tensor& dy, NormGrads where = {}, OptTensor y = {});

// For the results of an operator: what came of an argument, `like` it unless it is there, or 0 elements.
inline void allocate(OptTensor& where, const OptTensor& like) {
  if (like && !where) where = torch::stable::empty_like(*like);
}
inline Tensor or_none(const OptTensor& t, const Tensor& like) { return t ? *t : none(like); }

}  // namespace mamba_ops::parts

// The host functions behind torch.ops.mamba_ops: one per schema of library.cpp, for CPU and CUDA tensors
// alike.
#pragma once
#include <tuple>

#include "ops/check.h"

namespace mamba_ops {

std::tuple<Tensor, Tensor> causal_conv1d_fwd(Tensor x, Tensor weight, OptTensor bias, OptTensor initial_state,
                                             OptTensor seq_idx, OptTensor cu_seqlens, bool silu,
                                             bool return_final_state);
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(Tensor dy, OptTensor dfinal_state, Tensor x,
                                                             Tensor weight, OptTensor bias,
                                                             OptTensor initial_state, OptTensor seq_idx,
                                                             OptTensor cu_seqlens, bool silu);

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                                      OptTensor D, OptTensor z, OptTensor delta_bias,
                                                      OptTensor initial_state, OptTensor seq_idx,
                                                      OptTensor cu_seqlens, bool delta_softplus,
                                                      bool return_final_state, bool save_checkpoints);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_bwd(
    Tensor dy, OptTensor dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptTensor D,
    OptTensor z, OptTensor delta_bias, OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens,
    Tensor checkpoints, bool delta_softplus);

Tensor rms_norm_gated_fwd(Tensor x, Tensor weight, OptTensor z, double eps, int64_t group_size,
                          bool norm_before_gate);
std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_bwd(Tensor dy, Tensor x, Tensor weight, OptTensor z,
                                                      double eps, int64_t group_size, bool norm_before_gate);

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps);

Tensor causal_conv1d_update(Tensor x, Tensor state, Tensor weight, OptTensor bias, OptTensor state_indices,
                            bool silu);
Tensor selective_state_update(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptTensor D,
                              OptTensor z, OptTensor delta_bias, OptTensor state_indices,
                              bool delta_softplus);
Tensor ssd_state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                        OptTensor z, OptTensor dt_bias, OptTensor state_indices, bool dt_softplus,
                        double dt_min, double dt_max);

std::tuple<Tensor, Tensor> ssd_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                   OptTensor z, OptTensor dt_bias, OptTensor initial_state, OptTensor seq_idx,
                                   OptTensor cu_seqlens, bool dt_softplus, double dt_min, double dt_max,
                                   std::optional<int64_t> chunk_size, bool return_final_state);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_bwd(
    Tensor dy, OptTensor dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
    OptTensor z, OptTensor dt_bias, OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens,
    bool dt_softplus, double dt_min, double dt_max, std::optional<int64_t> chunk_size);

}  // namespace mamba_ops

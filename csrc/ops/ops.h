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
std::tuple<Tensor, Tensor, Tensor> add_rms_norm_bwd(Tensor dy, OptTensor dsum, Tensor sum, Tensor weight,
                                                    double eps);

std::tuple<Tensor, Tensor> norm_linear(Tensor x, OptTensor residual, OptTensor z, OptTensor norm_weight,
                                       Tensor weight, OptTensor bias, double eps, bool norm_before_gate);
std::tuple<Tensor, Tensor> norm_linear_conv(Tensor x, OptTensor residual, OptTensor norm_weight,
                                            Tensor weight, OptTensor bias, Tensor conv_state,
                                            Tensor conv_weight, OptTensor conv_bias, double eps,
                                            int64_t conv_begin);

// One tensor a layer in each list; conv_bias may be empty.
std::tuple<Tensor, Tensor> mamba2_step(Tensor stream, std::vector<Tensor> norm_weight,
                                       std::vector<Tensor> in_proj, std::vector<Tensor> conv_state,
                                       std::vector<Tensor> conv_weight, std::vector<Tensor> conv_bias,
                                       std::vector<Tensor> state, std::vector<Tensor> dt_bias,
                                       std::vector<Tensor> A_log, std::vector<Tensor> D,
                                       std::vector<Tensor> gate_norm_weight, std::vector<Tensor> out_proj,
                                       double eps, double gate_eps, double dt_min, double dt_max);

Tensor causal_conv1d_update(Tensor x, Tensor state, Tensor weight, OptTensor bias, OptTensor state_indices,
                            bool silu);
Tensor selective_state_update(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptTensor D,
                              OptTensor z, OptTensor delta_bias, OptTensor state_indices,
                              bool delta_softplus);
Tensor ssd_state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                        OptTensor z, OptTensor dt_bias, OptTensor state_indices, bool dt_softplus,
                        double dt_min, double dt_max, bool A_is_log);

std::tuple<Tensor, Tensor> ssd_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                   OptTensor z, OptTensor dt_bias, OptTensor initial_state, OptTensor seq_idx,
                                   OptTensor cu_seqlens, bool dt_softplus, double dt_min, double dt_max,
                                   std::optional<int64_t> chunk_size, bool tf32, bool return_final_state);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_bwd(
    Tensor dy, OptTensor dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
    OptTensor z, OptTensor dt_bias, OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens,
    bool dt_softplus, double dt_min, double dt_max, std::optional<int64_t> chunk_size, bool tf32);

std::tuple<Tensor, Tensor, Tensor> mamba_inner_fwd(
    Tensor xz, Tensor conv1d_weight, OptTensor conv1d_bias, Tensor x_proj_weight, Tensor delta_proj_weight,
    Tensor out_proj_weight, OptTensor out_proj_bias, Tensor A, OptTensor B, OptTensor C, OptTensor D,
    OptTensor delta_bias, OptTensor B_proj_bias, OptTensor C_proj_bias, OptTensor b_rms_weight,
    OptTensor c_rms_weight, OptTensor dt_rms_weight, OptTensor conv_state, OptTensor initial_state,
    OptTensor seq_idx, OptTensor cu_seqlens, bool delta_softplus, double rms_eps, bool return_final_states);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
mamba_inner_bwd(OptTensor dout, OptTensor dconv_state, OptTensor dfinal_state, Tensor xz,
                Tensor conv1d_weight, OptTensor conv1d_bias, Tensor x_proj_weight, Tensor delta_proj_weight,
                Tensor out_proj_weight, OptTensor out_proj_bias, Tensor A, OptTensor B, OptTensor C,
                OptTensor D, OptTensor delta_bias, OptTensor B_proj_bias, OptTensor C_proj_bias,
                OptTensor b_rms_weight, OptTensor c_rms_weight, OptTensor dt_rms_weight, OptTensor conv_state,
                OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens, bool delta_softplus,
                double rms_eps, bool x_proj_grad, bool delta_proj_grad, bool out_proj_grad,
                bool out_proj_bias_grad);

std::tuple<Tensor, Tensor, Tensor> mamba_split_conv1d_scan_fwd(
    Tensor zxbcdt, Tensor conv1d_weight, OptTensor conv1d_bias, OptTensor dt_bias, Tensor A, OptTensor D,
    OptTensor rmsnorm_weight, OptTensor outproj_weight, OptTensor outproj_bias, OptTensor conv_state,
    OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens, int64_t headdim, int64_t ngroups,
    bool silu, double dt_min, double dt_max, double rmsnorm_eps, bool norm_before_gate,
    std::optional<int64_t> chunk_size, bool tf32, bool mask_negative, bool return_final_states);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
mamba_split_conv1d_scan_bwd(OptTensor dout, OptTensor dconv_state, OptTensor dfinal_state, Tensor zxbcdt,
                            Tensor conv1d_weight, OptTensor conv1d_bias, OptTensor dt_bias, Tensor A,
                            OptTensor D, OptTensor rmsnorm_weight, OptTensor outproj_weight,
                            OptTensor outproj_bias, OptTensor conv_state, OptTensor initial_state,
                            OptTensor seq_idx, OptTensor cu_seqlens, int64_t headdim, int64_t ngroups,
                            bool silu, double dt_min, double dt_max, double rmsnorm_eps,
                            bool norm_before_gate, std::optional<int64_t> chunk_size, bool tf32,
                            bool mask_negative, bool outproj_weight_grad, bool outproj_bias_grad);

}  // namespace mamba_ops

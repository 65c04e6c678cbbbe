// The host functions behind torch.ops.mamba_ops: one per schema of library.cpp, for CPU and CUDA tensors alike.
#pragma once
#include <tuple>

#include "ops/check.h"

namespace mamba_ops {

std::tuple<Tensor, Tensor> causal_conv1d_fwd(Tensor x, Tensor weight, OptTensor bias, OptTensor initial_state,
                                             OptTensor seq_idx, OptTensor cu_seqlens, bool silu, bool return_final_state);
std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(Tensor dy, OptTensor dfinal_state, Tensor x, Tensor weight,
                                                             OptTensor bias, OptTensor initial_state, OptTensor seq_idx,
                                                             OptTensor cu_seqlens, bool silu);

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptTensor D,
                                                      OptTensor z, OptTensor delta_bias, OptTensor initial_state,
                                                      OptTensor seq_idx, OptTensor cu_seqlens, bool delta_softplus,
                                                      bool return_final_state, bool save_checkpoints);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_bwd(
    Tensor dy, OptTensor dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptTensor D, OptTensor z,
    OptTensor delta_bias, OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens, Tensor checkpoints,
    bool delta_softplus);

}  // namespace mamba_ops

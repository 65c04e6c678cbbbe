// Every schema of torch.ops.mamba_ops. Letters: b batch, l length, d channels, h heads, p head dim, n state,
// g groups, w conv width, s sequences in a pack. Absent outputs have 0 elements.
#include <torch/csrc/stable/library.h>

#include "ops/ops.h"

STABLE_TORCH_LIBRARY(mamba_ops, m) {
  // x (b,d,l); weight (d,w); bias (d); states (b or s, d, w-1)
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx, "
      "Tensor? cu_seqlens, bool silu, bool return_final_state) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, bool silu) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");

  // u, delta, z (b,d,l); A (d,n); B, C (b,g,n,l) or (d,n); D, delta_bias (d); states (b or s, d, n)
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, bool delta_softplus, "
      "bool return_final_state, bool save_checkpoints) -> (Tensor y, Tensor final_state, Tensor "
      "checkpoints)");
  m.def(
      "selective_scan_bwd(Tensor dy, Tensor? dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, "
      "Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, "
      "Tensor checkpoints, bool delta_softplus) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor "
      "dC, "
      "Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)");

  // x, z (b,l,h,p); dt (b,l,h); A, dt_bias (h); B, C (b,l,g,n); D (h) or (h,p); states (b or s, h, p, n)
  m.def(
      "ssd_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
      "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float "
      "dt_max, int? chunk_size, bool tf32, bool return_final_state) -> (Tensor y, Tensor final_state)");
  m.def(
      "ssd_bwd(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? "
      "D, "
      "Tensor? z, Tensor? dt_bias, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, bool "
      "dt_softplus, "
      "float dt_min, float dt_max, int? chunk_size, bool tf32) -> (Tensor dx, Tensor ddt, Tensor dA, Tensor "
      "dB, Tensor "
      "dC, "
      "Tensor dD, Tensor dz, Tensor ddt_bias, Tensor dinitial_state)");

  // x, z (..., d); weight (d); group_size a divisor of d
  m.def(
      "rms_norm_gated_fwd(Tensor x, Tensor weight, Tensor? z, float eps, SymInt group_size, bool "
      "norm_before_gate) -> "
      "Tensor");
  m.def(
      "rms_norm_gated_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? z, float eps, SymInt group_size, "
      "bool norm_before_gate) -> (Tensor dx, Tensor dweight, Tensor dz)");

  // x, residual, y, sum (..., d); weight (d)
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)");
  // dx: 0 elements where it is dresidual
  m.def(
      "add_rms_norm_bwd(Tensor dy, Tensor? dsum, Tensor sum, Tensor weight, float eps) -> (Tensor dresidual, "
      "Tensor dx, Tensor dweight)");

  // xz (b,2d,l); weights (d,w), (r+2n,d), (d,r), (m,d); A, B, C, D, delta_bias and states as for
  // selective_scan
  m.def(
      "mamba_inner_fwd(Tensor xz, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, "
      "Tensor delta_proj_weight, Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, Tensor? B, "
      "Tensor? C, Tensor? D, Tensor? delta_bias, Tensor? B_proj_bias, Tensor? C_proj_bias, "
      "Tensor? b_rms_weight, Tensor? c_rms_weight, Tensor? dt_rms_weight, Tensor? conv_state, "
      "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, bool delta_softplus, float rms_eps, "
      "bool return_final_states) -> (Tensor out, Tensor conv_state, Tensor final_state)");
  m.def(
      "mamba_inner_bwd(Tensor? dout, Tensor? dconv_state, Tensor? dfinal_state, Tensor xz, "
      "Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, Tensor delta_proj_weight, "
      "Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, Tensor? B, Tensor? C, Tensor? D, "
      "Tensor? delta_bias, Tensor? B_proj_bias, Tensor? C_proj_bias, Tensor? b_rms_weight, "
      "Tensor? c_rms_weight, Tensor? dt_rms_weight, Tensor? conv_state, Tensor? initial_state, "
      "Tensor? seq_idx, Tensor? cu_seqlens, bool delta_softplus, float rms_eps, bool x_proj_grad, "
      "bool delta_proj_grad, bool out_proj_grad, bool out_proj_bias_grad) -> (Tensor dxz, "
      "Tensor dconv1d_weight, Tensor dconv1d_bias, Tensor dx_proj_weight, Tensor ddelta_proj_weight, "
      "Tensor dout_proj_weight, Tensor dout_proj_bias, Tensor dA, Tensor dB, Tensor dC, Tensor dD, "
      "Tensor ddelta_bias, Tensor dB_proj_bias, Tensor dC_proj_bias, Tensor db_rms_weight, "
      "Tensor dc_rms_weight, Tensor ddt_rms_weight, Tensor dconv_state_in, Tensor dinitial_state)");

  // zxbcdt (b,l,2k+2d+2gn+h); weights (d+2gn,w), (d), (m,k+d); A, D, dt_bias and states as for ssd
  m.def(
      "mamba_split_conv1d_scan_fwd(Tensor zxbcdt, Tensor conv1d_weight, Tensor? conv1d_bias, "
      "Tensor? dt_bias, Tensor A, Tensor? D, Tensor? rmsnorm_weight, Tensor? outproj_weight, "
      "Tensor? outproj_bias, Tensor? conv_state, Tensor? initial_state, Tensor? seq_idx, "
      "Tensor? cu_seqlens, SymInt headdim, SymInt ngroups, bool silu, float dt_min, float dt_max, "
      "float rmsnorm_eps, bool norm_before_gate, int? chunk_size, bool tf32, bool mask_negative, "
      "bool return_final_states) -> (Tensor out, Tensor conv_state, Tensor final_state)");
  m.def(
      "mamba_split_conv1d_scan_bwd(Tensor? dout, Tensor? dconv_state, Tensor? dfinal_state, Tensor zxbcdt, "
      "Tensor conv1d_weight, Tensor? conv1d_bias, Tensor? dt_bias, Tensor A, Tensor? D, "
      "Tensor? rmsnorm_weight, Tensor? outproj_weight, Tensor? outproj_bias, Tensor? conv_state, "
      "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, SymInt headdim, SymInt ngroups, "
      "bool silu, float dt_min, float dt_max, float rmsnorm_eps, bool norm_before_gate, int? chunk_size, "
      "bool tf32, bool mask_negative, bool outproj_weight_grad, bool outproj_bias_grad) -> (Tensor dzxbcdt, "
      "Tensor dconv1d_weight, Tensor dconv1d_bias, Tensor ddt_bias, Tensor dA, Tensor dD, "
      "Tensor drmsnorm_weight, Tensor doutproj_weight, Tensor doutproj_bias, Tensor dconv_state_in, "
      "Tensor dinitial_state)");

  // x, residual, z, sum (b,k); norm_weight (k); weight (n,k); bias (n); y (b,n). CUDA, bfloat16.
  m.def(
      "norm_linear(Tensor x, Tensor? residual, Tensor? z, Tensor? norm_weight, Tensor weight, Tensor? bias, "
      "float eps, bool norm_before_gate) -> (Tensor y, Tensor sum)");
  // conv_state (b,d,w-1); conv_weight (d,w); conv_bias (d): of columns conv_begin to conv_begin + d - 1 of y
  m.def(
      "norm_linear_conv(Tensor x, Tensor? residual, Tensor? norm_weight, Tensor weight, Tensor? bias, "
      "Tensor(a!) conv_state, Tensor conv_weight, Tensor? conv_bias, float eps, SymInt conv_begin) "
      "-> (Tensor y, Tensor sum)");

  // One token through a run of layers, a tensor of each list for each: stream, out, sum (1,d); norm_weight
  // (d); in_proj (4d+2n+h,d); conv_state (1,2d+2n,3); conv_weight (2d+2n,4); conv_bias (2d+2n) or no tensors;
  // state (1,h,p,n); dt_bias, A_log (h); D (h) or (h,p); gate_norm_weight (2d); out_proj (d,2d). Hopper,
  // bfloat16.
  m.def(
      "mamba2_step(Tensor stream, Tensor[] norm_weight, Tensor[] in_proj, Tensor(a!)[] conv_state, "
      "Tensor[] conv_weight, Tensor[] conv_bias, Tensor(b!)[] state, Tensor[] dt_bias, Tensor[] A_log, "
      "Tensor[] D, Tensor[] gate_norm_weight, Tensor[] out_proj, float eps, float gate_eps, float dt_min, "
      "float dt_max) -> (Tensor out, Tensor sum)");

  // One token, or t of them; state_indices (b): rows of the state, negative for padding.
  // x (b,d[,t]); state (s,d,k); weight (d,w); bias (d)
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? state_indices, "
      "bool silu) "
      "-> Tensor");
  // state (s,d,n); u, delta, z (b,d[,t]); A (d,n); B, C (b[,g],n[,t]); D, delta_bias (d)
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? state_indices, bool delta_softplus) -> Tensor");
  // state (s,h,p,n); x, z (b[,t],h,p); dt (b[,t],h); A, dt_bias (h); B, C (b[,t],g,n); D (h) or (h,p)
  m.def(
      "ssd_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, "
      "Tensor? dt_bias, Tensor? state_indices, bool dt_softplus, float dt_min, float dt_max, "
      "bool A_is_log=False) -> Tensor");
}

// One host function serves both devices.
#define MAMBA_IMPL(name) m.impl(#name, TORCH_BOX(&mamba_ops::name))
#define MAMBA_IMPL_ALL                     \
  MAMBA_IMPL(causal_conv1d_fwd);           \
  MAMBA_IMPL(causal_conv1d_bwd);           \
  MAMBA_IMPL(selective_scan_fwd);          \
  MAMBA_IMPL(selective_scan_bwd);          \
  MAMBA_IMPL(ssd_fwd);                     \
  MAMBA_IMPL(ssd_bwd);                     \
  MAMBA_IMPL(rms_norm_gated_fwd);          \
  MAMBA_IMPL(rms_norm_gated_bwd);          \
  MAMBA_IMPL(add_rms_norm);                \
  MAMBA_IMPL(add_rms_norm_bwd);            \
  MAMBA_IMPL(mamba_inner_fwd);             \
  MAMBA_IMPL(mamba_inner_bwd);             \
  MAMBA_IMPL(mamba_split_conv1d_scan_fwd); \
  MAMBA_IMPL(mamba_split_conv1d_scan_bwd); \
  MAMBA_IMPL(causal_conv1d_update);        \
  MAMBA_IMPL(selective_state_update);      \
  MAMBA_IMPL(ssd_state_update)

STABLE_TORCH_LIBRARY_IMPL(mamba_ops, CPU, m) { MAMBA_IMPL_ALL; }
STABLE_TORCH_LIBRARY_IMPL(mamba_ops, CUDA, m) {
  MAMBA_IMPL_ALL;
  MAMBA_IMPL(norm_linear);
  MAMBA_IMPL(norm_linear_conv);
  MAMBA_IMPL(mamba2_step);
}

// The CPU kernels for one instruction set: compiled with its flags and its name in MAMBA_ISA.
#include "kernels/cpu/add_norm.h"
#include "kernels/cpu/causal_conv1d.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/norm.h"
#include "kernels/cpu/selective_scan_bwd.h"
#include "kernels/cpu/selective_scan_fwd.h"
#include "kernels/cpu/ssd_bwd.h"
#include "kernels/cpu/ssd_fwd.h"
#include "kernels/cpu/state_update.h"

#define MAMBA_STRING_(x) #x
#define MAMBA_STRING(x) MAMBA_STRING_(x)

namespace mamba_ops::MAMBA_ISA {

// Compiled in variant_scan.cpp.
extern template void selective_scan_fwd<float>(const ScanFwd&, int64_t, int64_t, void*);
extern template void selective_scan_fwd<double>(const ScanFwd&, int64_t, int64_t, void*);
extern template void selective_scan_bwd<float>(const ScanBwd&, int64_t, int64_t, void*);
extern template void selective_scan_bwd<double>(const ScanBwd&, int64_t, int64_t, void*);
// Compiled in variant_ssd.cpp.
extern const SsdKernels ssd_f32, ssd_f64, ssd_bf16;

template <class R>
constexpr Kernels<R> kernels() {
  return {
      .causal_conv1d_scratch = conv_scratch_bytes<R>,
      .causal_conv1d_fwd = causal_conv1d_fwd<R>,
      .causal_conv1d_bwd = causal_conv1d_bwd<R>,
      .causal_conv1d_reduce = causal_conv1d_reduce<R>,
      .selective_scan_fwd_scratch = selective_scan_fwd_scratch<R>,
      .selective_scan_bwd_scratch = selective_scan_bwd_scratch<R>,
      .selective_scan_fwd = selective_scan_fwd<R>,
      .selective_scan_bwd = selective_scan_bwd<R>,
      .selective_scan_combine = selective_scan_combine<R>,
      .selective_scan_reduce = selective_scan_reduce<R>,
      .ssd = sizeof(R) == sizeof(float) ? ssd_f32 : ssd_f64,
      .ssd_bf16 = sizeof(R) == sizeof(float) ? ssd_bf16 : ssd_f64,
      .ssd_combine = ssd_combine<R>,
      .ssd_reduce = ssd_reduce<R>,
      .rms_norm_gated_scratch = norm_scratch_bytes<R>,
      .rms_norm_gated_fwd = rms_norm_gated_fwd<R>,
      .rms_norm_gated_bwd = rms_norm_gated_bwd<R>,
      .rms_norm_gated_reduce = rms_norm_gated_reduce<R>,
      .add_rms_norm_scratch = add_norm_scratch_bytes<R>,
      .add_rms_norm = add_rms_norm<R>,
      .add_rms_norm_bwd = add_rms_norm_bwd<R>,
      .add_rms_norm_reduce = add_rms_norm_reduce<R>,
      .causal_conv1d_update = causal_conv1d_update<R>,
      .selective_state_update_scratch = scan_update_scratch_bytes<R>,
      .selective_state_update = selective_state_update<R>,
      .ssd_state_update_scratch = ssd_update_scratch_bytes<R>,
      .ssd_state_update = ssd_state_update<R>,
  };
}

extern const CpuTable table;
constinit const CpuTable table = {MAMBA_STRING(MAMBA_ISA), kernels<float>(), kernels<double>()};

}  // namespace mamba_ops::MAMBA_ISA

// The CPU kernels, compiled once per instruction set and chosen at run time.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/add_norm.h"
#include "kernels/causal_conv1d.h"
#include "kernels/norm.h"
#include "kernels/selective_scan.h"
#include "kernels/ssd.h"
#include "kernels/state_update.h"

namespace mamba_ops {

struct SsdKernels {
  int64_t (*fwd_scratch)(const SsdDims&);
  int64_t (*bwd_scratch)(const SsdDims&, const Pieces&);
  void (*fwd)(const SsdFwd&, int64_t begin, int64_t end, void* scratch);
  void (*bwd)(const SsdBwd&, int64_t begin, int64_t end, void* scratch);
};

// The kernels for one type of arithmetic. Each works on units [begin, end) and needs `scratch`, private to
// the call.
template <class R>
struct Kernels {
  int64_t (*causal_conv1d_scratch)();
  void (*causal_conv1d_fwd)(const ConvFwd&, int64_t begin, int64_t end, void* scratch);
  void (*causal_conv1d_bwd)(const ConvBwd&, int64_t begin, int64_t end, void* scratch);
  void (*causal_conv1d_reduce)(const ConvBwd&);

  int64_t (*selective_scan_fwd_scratch)(const ScanDims&);
  int64_t (*selective_scan_bwd_scratch)(const ScanDims&);
  void (*selective_scan_fwd)(const ScanFwd&, int64_t begin, int64_t end, void* scratch);
  void (*selective_scan_bwd)(const ScanBwd&, int64_t begin, int64_t end, void* scratch);
  void (*selective_scan_combine)(const ScanFwd&, R* states, const R* ends, bool reverse, int64_t begin,
                                 int64_t end);
  void (*selective_scan_reduce)(const ScanBwd&, int64_t begin, int64_t end);

  const SsdKernels& ssd;
  const SsdKernels& ssd_bf16;  // for bfloat16 inputs: their products may be taken in bfloat16
  void (*ssd_combine)(const SsdFwd&, R* states, const R* ends, bool reverse, int64_t begin, int64_t end);
  void (*ssd_reduce)(const SsdBwd&, int64_t begin, int64_t end);

  int64_t (*rms_norm_gated_scratch)(const NormDims&);
  void (*rms_norm_gated_fwd)(const NormFwd&, int64_t begin, int64_t end, void* scratch);
  void (*rms_norm_gated_bwd)(const NormBwd&, int64_t begin, int64_t end, void* scratch);
  void (*rms_norm_gated_reduce)(const NormBwd&);

  int64_t (*add_rms_norm_scratch)(int64_t d);
  void (*add_rms_norm)(const AddNorm&, int64_t begin, int64_t end, void* scratch);
  void (*add_rms_norm_bwd)(const AddNormBwd&, int64_t begin, int64_t end, void* scratch);
  void (*add_rms_norm_reduce)(const AddNormBwd&);

  void (*causal_conv1d_update)(const ConvUpdate&, int64_t begin, int64_t end, void* scratch);
  int64_t (*selective_state_update_scratch)(const ScanUpdate&);
  void (*selective_state_update)(const ScanUpdate&, int64_t begin, int64_t end, void* scratch);
  int64_t (*ssd_state_update_scratch)(const SsdUpdate&);
  void (*ssd_state_update)(const SsdUpdate&, int64_t begin, int64_t end, void* scratch);
};

struct CpuTable {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;

  template <class R>
  const Kernels<R>& kernels() const {
    if constexpr (sizeof(R) == sizeof(float))
      return f32;
    else
      return f64;
  }
};

// The table in use: the widest that this machine runs, or what MAMBA_OPS_CPU_ISA or set_cpu_isa names.
const CpuTable& cpu();
std::vector<std::string> cpu_isas();        // those that this machine runs, narrowest first
void set_cpu_isa(const std::string& name);  // throws std::invalid_argument for one that it does not run

}  // namespace mamba_ops

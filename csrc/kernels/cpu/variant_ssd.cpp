// The SSD for one instruction set, a file of its own for the sake of build time.
#include "kernels/cpu/isa.h"
#include "kernels/cpu/ssd_bwd.h"
#include "kernels/cpu/ssd_fwd.h"

namespace mamba_ops::MAMBA_ISA {

extern const SsdKernels ssd_f32, ssd_f64, ssd_bf16;

template <class R, class T>
constexpr SsdKernels kernels() {
  return {ssd_fwd_scratch<R, T>, ssd_bwd_scratch<R, T>, ssd_fwd<R, T>, ssd_bwd<R, T>};
}
constinit const SsdKernels ssd_f32 = kernels<float, float>();
constinit const SsdKernels ssd_f64 = kernels<double, double>();
#if defined(__AVX512BF16__)
constinit const SsdKernels ssd_bf16 = kernels<float, bf16>();
#else
constinit const SsdKernels ssd_bf16 = kernels<float, float>();
#endif

}  // namespace mamba_ops::MAMBA_ISA

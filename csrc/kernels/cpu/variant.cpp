// The CPU kernels for one instruction set: compiled with its flags and its name in MAMBA_ISA.
#include "kernels/cpu/causal_conv1d.h"
#include "kernels/cpu/isa.h"

#define MAMBA_STRING_(x) #x
#define MAMBA_STRING(x) MAMBA_STRING_(x)

namespace mamba_ops::MAMBA_ISA {

template <class R>
constexpr Kernels<R> kernels() {
  return {
      .causal_conv1d_units = conv_units<R>,
      .causal_conv1d_scratch = conv_scratch_bytes<R>,
      .causal_conv1d_fwd = causal_conv1d_fwd<R>,
      .causal_conv1d_bwd = causal_conv1d_bwd<R>,
      .causal_conv1d_reduce = causal_conv1d_reduce<R>,
  };
}

extern const CpuTable table;
constinit const CpuTable table = {MAMBA_STRING(MAMBA_ISA), kernels<float>(), kernels<double>()};

}  // namespace mamba_ops::MAMBA_ISA

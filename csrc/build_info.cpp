#include "build_info.h"

#include "build_config.h"
#include "kernels/cpu/isa.h"

namespace mamba_ops {

std::map<std::string, std::string> build_info() {
  return {{"version", MAMBA_OPS_VERSION},
          {"compiler", MAMBA_OPS_COMPILER},
#ifdef USE_CUDA
          {"cuda", MAMBA_OPS_CUDA_VERSION},
          {"cuda_architectures", MAMBA_OPS_CUDA_ARCHS},
#else
          {"cuda", ""},
          {"without_cuda_because", MAMBA_OPS_CUDA_VERSION},
#endif
          {"stable_abi", "torch 2.10"}};
}

std::string cpu_isa() { return cpu().name; }
std::vector<std::string> runnable_cpu_isas() { return cpu_isas(); }
void force_cpu_isa(const std::string& name) { set_cpu_isa(name); }

}  // namespace mamba_ops

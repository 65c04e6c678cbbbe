// libmamba_ops.so for C++ programs: what it was built with. The operators themselves are reached through
// torch's dispatcher, as torch.ops.mamba_ops is in Python.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define MAMBA_OPS_API __attribute__((visibility("default")))

namespace mamba_ops {

MAMBA_OPS_API std::map<std::string, std::string> build_info();
MAMBA_OPS_API std::string cpu_isa();
MAMBA_OPS_API std::vector<std::string> runnable_cpu_isas();
MAMBA_OPS_API void force_cpu_isa(const std::string& name);
// "auto": the fastest CUDA kernels that can run a call; "portable": those for any GPU; "small": as they run
// on a GPU with 99 KB of shared memory a block.
MAMBA_OPS_API void force_cuda_path(const std::string& name);
// What a call would run: the kernel and how it cuts the work. Sizes by their letters (b, l, d, h, p, n, g, q,
// w, k).
MAMBA_OPS_API std::map<std::string, std::string> plan(const std::string& op, const std::string& device,
                                                      const std::string& dtype,
                                                      const std::map<std::string, int64_t>& sizes);
// Rows and columns of the largest x of norm_linear that takes its kernel.
MAMBA_OPS_API std::pair<int64_t, int64_t> norm_linear_limits();
// Whether mamba2_step has a kernel for so many layers of these sizes and bytes of a state's value on the
// current device.
MAMBA_OPS_API bool mamba2_step_fits(int64_t layers, int64_t d, int64_t h, int64_t n, int64_t state_bytes);

}  // namespace mamba_ops

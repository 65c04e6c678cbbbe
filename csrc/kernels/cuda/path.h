// Which of an operator's CUDA kernels a call may take. All have portable ones, for any GPU that the build
// targets; some have others for one kind of GPU, and take them where they can.
#pragma once
#include <atomic>

namespace mamba_ops {

inline std::atomic<bool> portable_only = false;  // set by _C.set_cuda_path, for tests and timings

}  // namespace mamba_ops

// Which of an operator's CUDA kernels a call may take. All have portable ones, for any GPU that the build
// targets; some have others for one kind of GPU, and take them where they can.
#pragma once
#include <atomic>

namespace mamba_ops {

// Set by _C.set_cuda_path, for tests and timings.
inline std::atomic<bool> portable_only = false;
inline std::atomic<bool> little_shared_memory = false;  // as if a block had 99 KB, as on small GPUs

}  // namespace mamba_ops

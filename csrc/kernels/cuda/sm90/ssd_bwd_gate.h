// The first launch of the Hopper SSD backward with a gate (ssd_bwd_gate.cu).
#pragma once
#include "kernels/cuda/sm90/ssd_bwd.cuh"
#include "kernels/ssd.h"

namespace mamba_ops::gpu::sm90 {

bool ssd_bwd_gate_takes(const SsdBwd& p, const View& grad_o, const Sequences& seqs);
int64_t ssd_bwd_gate_workspace(const SsdBwd& p, const Sequences& seqs);
// a: of the launches that follow, whose dy is the gradient of o.
const char* ssd_bwd_gate(const SsdBwd& p, const SsdBwdArgs& a, void* workspace, cudaStream_t stream);

}  // namespace mamba_ops::gpu::sm90

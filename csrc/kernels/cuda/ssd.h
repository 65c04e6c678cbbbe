// The CUDA kernels of the SSD, and which of them a call takes. `pieces` of the parameters stay empty: the
// sequences are on the device (sequences.h); `states` is the number of state rows.
//
// A workspace is one piece of device memory of as many bytes as its function says, aligned to 256. Launches
// do not wait for the kernels; they return nullptr, or what went wrong.
#pragma once
#include "kernels/cuda/path.h"
#include "kernels/cuda/sequences.h"
#include "kernels/ssd.h"

namespace mamba_ops {

enum class SsdPath { portable, hopper };

// Portable: every call, on any GPU from sm_80.
int64_t ssd_fwd_portable_workspace(const SsdFwd& p, const Sequences& seqs, int64_t states);
const char* ssd_fwd_portable(const SsdFwd& p, const Sequences& seqs, int64_t states, void* workspace,
                             void* stream);
int64_t ssd_bwd_portable_workspace(const SsdBwd& p, const Sequences& seqs, int64_t states);
const char* ssd_bwd_portable(const SsdBwd& p, const Sequences& seqs, int64_t states, void* workspace,
                             void* stream);

// Hopper: the calls that `takes` names (some data, on the current device). In builds for sm_90a alone.
bool ssd_fwd_hopper_takes(const SsdFwd& p, const Sequences& seqs);
int64_t ssd_fwd_hopper_workspace(const SsdFwd& p, const Sequences& seqs, int64_t states);
const char* ssd_fwd_hopper(const SsdFwd& p, const Sequences& seqs, int64_t states, void* workspace,
                           void* stream);
bool ssd_bwd_hopper_takes(const SsdBwd& p, const Sequences& seqs);
int64_t ssd_bwd_hopper_workspace(const SsdBwd& p, const Sequences& seqs, int64_t states);
const char* ssd_bwd_hopper(const SsdBwd& p, const Sequences& seqs, int64_t states, void* workspace,
                           void* stream);

template <class Params>
struct SsdKernel {
  SsdPath path;
  int64_t (*workspace)(const Params&, const Sequences&, int64_t);
  const char* (*launch)(const Params&, const Sequences&, int64_t, void*, void*);
};

// The kernel that a call takes.
inline SsdKernel<SsdFwd> ssd_kernel(const SsdFwd& p, const Sequences& seqs) {
#ifdef MAMBA_OPS_SM90
  if (!portable_only && p.dims.b * p.dims.l * p.dims.h > 0 && ssd_fwd_hopper_takes(p, seqs))
    return {SsdPath::hopper, ssd_fwd_hopper_workspace, ssd_fwd_hopper};
#endif
  return {SsdPath::portable, ssd_fwd_portable_workspace, ssd_fwd_portable};
}
inline SsdKernel<SsdBwd> ssd_kernel(const SsdBwd& p, const Sequences& seqs) {
#ifdef MAMBA_OPS_SM90
  if (!portable_only && p.fwd.dims.b * p.fwd.dims.l * p.fwd.dims.h > 0 && ssd_bwd_hopper_takes(p, seqs))
    return {SsdPath::hopper, ssd_bwd_hopper_workspace, ssd_bwd_hopper};
#endif
  return {SsdPath::portable, ssd_bwd_portable_workspace, ssd_bwd_portable};
}

}  // namespace mamba_ops

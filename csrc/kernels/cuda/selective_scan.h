// The selective scan on CUDA, for the host: no CUDA headers. Formulas: kernels/selective_scan.h.
//
// The portable kernels take every call: each type, real or complex, any n, any strides, any sequences.
//
// `pieces` of the parameters stay empty, the sequences are on the device; `states` counts the rows of the
// states. Checkpoints are float32 or float64 as the arithmetic, (b, l / kScanCheckpointCuda, parts, n, d);
// every kernel reads and writes the same. The partial sums of ScanBwd are not used: all scratch memory is
// `workspace`, aligned to 256 bytes, of the bytes that the function beside the launch asks for. Launches
// return nullptr, or what CUDA says went wrong, and do not wait for the kernels.
#pragma once
#include "kernels/cuda/path.h"
#include "kernels/cuda/sequences.h"
#include "kernels/selective_scan.h"

namespace mamba_ops {

// Of the size of the states, times the segments that a long sequence of few channels is cut into: at most
// a few dozen MiB beyond the states themselves.
int64_t selective_scan_fwd_portable_workspace(const ScanFwd& p);
const char* selective_scan_fwd_portable(const ScanFwd& p, const Sequences& seqs, int64_t states,
                                        void* workspace, void* stream);

// Twice that, and partial sums: of dA, dD, ddelta_bias (and constant dB, dC) for every row and segment, and
// of dB, dC for every 32 channels and token. The latter are bounded: above kScanPartialBytes the tokens are
// taken in as many launches as it needs, down to one checkpoint's tokens in each.
inline constexpr int64_t kScanPartialBytes = int64_t(256) << 20;
int64_t selective_scan_bwd_portable_workspace(const ScanBwd& p);
const char* selective_scan_bwd_portable(const ScanBwd& p, const Sequences& seqs, int64_t states,
                                        void* workspace, void* stream);

// Tuned kernels for real A with 16 states, B and C that depend on the input, no sequences within a row, one
// storage type other than float64, and tensors of which neighbours along one axis can be moved together.
bool selective_scan_fwd_tuned_takes(const ScanFwd& p, const Sequences& seqs);
int64_t selective_scan_fwd_tuned_workspace(const ScanFwd& p);  // none
const char* selective_scan_fwd_tuned(const ScanFwd& p, const Sequences& seqs, int64_t states, void* workspace,
                                     void* stream);

// A partial sum of dB and dC for every 48 channels and token, bounded likewise; of dA, dD and ddelta_bias for
// every row.
bool selective_scan_bwd_tuned_takes(const ScanBwd& p, const Sequences& seqs);
int64_t selective_scan_bwd_tuned_workspace(const ScanBwd& p);
const char* selective_scan_bwd_tuned(const ScanBwd& p, const Sequences& seqs, int64_t states, void* workspace,
                                     void* stream);

enum class ScanPath { portable, tuned };

template <class Params>
struct ScanKernel {
  ScanPath path;
  int64_t (*workspace)(const Params&);
  const char* (*launch)(const Params&, const Sequences&, int64_t states, void* workspace, void* stream);
};

// The kernel that a call takes.
inline ScanKernel<ScanFwd> scan_kernel(const ScanFwd& p, const Sequences& seqs) {
  if (!portable_only && selective_scan_fwd_tuned_takes(p, seqs))
    return {ScanPath::tuned, selective_scan_fwd_tuned_workspace, selective_scan_fwd_tuned};
  return {ScanPath::portable, selective_scan_fwd_portable_workspace, selective_scan_fwd_portable};
}
inline ScanKernel<ScanBwd> scan_kernel(const ScanBwd& p, const Sequences& seqs) {
  if (!portable_only && selective_scan_bwd_tuned_takes(p, seqs))
    return {ScanPath::tuned, selective_scan_bwd_tuned_workspace, selective_scan_bwd_tuned};
  return {ScanPath::portable, selective_scan_bwd_portable_workspace, selective_scan_bwd_portable};
}

}  // namespace mamba_ops

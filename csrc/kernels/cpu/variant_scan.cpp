// The selective scan for one instruction set, a file of its own for the sake of build time.
#include "kernels/cpu/selective_scan_bwd.h"
#include "kernels/cpu/selective_scan_fwd.h"

namespace mamba_ops::MAMBA_ISA {

template void selective_scan_fwd<float>(const ScanFwd&, int64_t, int64_t, void*);
template void selective_scan_fwd<double>(const ScanFwd&, int64_t, int64_t, void*);
template void selective_scan_bwd<float>(const ScanBwd&, int64_t, int64_t, void*);
template void selective_scan_bwd<double>(const ScanBwd&, int64_t, int64_t, void*);

}  // namespace mamba_ops::MAMBA_ISA

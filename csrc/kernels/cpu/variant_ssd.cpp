// The SSD for one instruction set, a file of its own for the sake of build time.
#include "kernels/cpu/ssd_bwd.h"
#include "kernels/cpu/ssd_fwd.h"

namespace mamba_ops::MAMBA_ISA {

template void ssd_fwd<float>(const SsdFwd&, int64_t, int64_t, void*);
template void ssd_fwd<double>(const SsdFwd&, int64_t, int64_t, void*);
template void ssd_bwd<float>(const SsdBwd&, int64_t, int64_t, void*);
template void ssd_bwd<double>(const SsdBwd&, int64_t, int64_t, void*);

}  // namespace mamba_ops::MAMBA_ISA

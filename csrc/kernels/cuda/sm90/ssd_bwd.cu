#include "kernels/cuda/ssd.h"

namespace mamba_ops {

bool ssd_bwd_hopper_takes(const SsdBwd&, const Sequences&) { return false; }
int64_t ssd_bwd_hopper_workspace(const SsdBwd&, const Sequences&, int64_t) { return 0; }
const char* ssd_bwd_hopper(const SsdBwd&, const Sequences&, int64_t, void*, void*) {
  return "no Hopper kernel yet";
}

}  // namespace mamba_ops

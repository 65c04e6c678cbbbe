// Memory that a later launch will read, to be brought into the L2 cache of the GPU meanwhile.
#pragma once
#include <cstdint>

namespace mamba_ops {

struct Prefetch {
  const char* data = nullptr;
  int64_t bytes = 0;  // both multiples of 16
};

}  // namespace mamba_ops

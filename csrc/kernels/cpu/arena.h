// Hands out parts of a kernel's scratch memory; with base == nullptr it only counts.
#pragma once
#include "kernels/view.h"

namespace mamba_ops::MAMBA_ISA {

template <class R>
struct Arena {
  R* base;
  int64_t used = 0;

  R* take(int64_t count) {
    R* p = base + used;
    used += padded(count);
    return p;
  }
};

}  // namespace mamba_ops::MAMBA_ISA

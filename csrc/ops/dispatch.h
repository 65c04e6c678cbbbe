// From checked arguments to kernels: the type of the arithmetic, threads over units of work, scratch memory.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels/cpu/isa.h"
#include "ops/check.h"

namespace mamba_ops {

// f.template operator()<R>() with the type of the arithmetic for this storage type.
template <class F>
void by_arithmetic(ScalarType storage, F f) {
  if (arithmetic_type(storage) == ScalarType::Double)
    f.template operator()<double>();
  else
    f.template operator()<float>();
}

// Memory of this thread, kept between calls: kernels want a few hundred KiB of it each time.
inline void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t size = 0;
  if (size < bytes) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, size));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

// Runs f(begin, end, scratch) over units [0, n) on torch's threads; units are handed out one by one, as they
// differ in length.
template <class F>
void for_units(int64_t n, size_t scratch_bytes, const F& f) {
  if (n <= 1) {
    if (n == 1) f(int64_t(0), int64_t(1), scratch(scratch_bytes));
    return;
  }
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, std::min<int64_t>(n, torch::stable::get_num_threads()), 1,
                              [&](int64_t, int64_t) {
                                void* memory = scratch(scratch_bytes);
                                for (int64_t unit; (unit = next++) < n;) f(unit, unit + 1, memory);
                              });
}

}  // namespace mamba_ops

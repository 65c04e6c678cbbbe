#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace mamba_ops {

namespace base {
extern const CpuTable table;
}
#ifdef MAMBA_HAS_avx512
namespace avx2 {
extern const CpuTable table;
}
namespace avx512 {
extern const CpuTable table;
}
namespace avx512bf16 {
extern const CpuTable table;
}
#endif

namespace {

std::vector<const CpuTable*> runnable() {
  std::vector<const CpuTable*> tables{&base::table};
#ifdef MAMBA_HAS_avx512
  if (__builtin_cpu_supports("x86-64-v3")) tables.push_back(&avx2::table);
  if (__builtin_cpu_supports("x86-64-v4")) tables.push_back(&avx512::table);
  // Where there is AMX, the bfloat16 dot product of AVX-512 is slower than float32 arithmetic.
  if (__builtin_cpu_supports("avx512bf16") && !__builtin_cpu_supports("amx-bf16"))
    tables.push_back(&avx512bf16::table);
#endif
  return tables;
}

const CpuTable* find(const std::string& name) {
  std::string known;
  for (const CpuTable* table : runnable()) {
    if (name == table->name) return table;
    known += known.empty() ? table->name : std::string(", ") + table->name;
  }
  throw std::invalid_argument("cpu_isa: must be one of " + known + " on this machine, got '" + name + "'");
}

std::atomic<const CpuTable*>& current() {
  static std::atomic<const CpuTable*> table = [] {
    const char* forced = std::getenv("MAMBA_OPS_CPU_ISA");
    return forced && *forced ? find(forced) : runnable().back();
  }();
  return table;
}

}  // namespace

const CpuTable& cpu() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuTable* table : runnable()) names.push_back(table->name);
  return names;
}

void set_cpu_isa(const std::string& name) { current().store(find(name), std::memory_order_relaxed); }

}  // namespace mamba_ops

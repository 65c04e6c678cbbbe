// Catch2 of either version, and the instruction sets that a test runs on.
#pragma once
#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"

// Those of this machine, or the one that MAMBA_OPS_CPU_ISA names.
inline std::vector<std::string> isas() {
  const char* forced = std::getenv("MAMBA_OPS_CPU_ISA");
  return forced && *forced ? std::vector<std::string>{forced} : mamba_ops::cpu_isas();
}

// Repeats the rest of the test case for each of them.
#define FOR_EVERY_ISA()                                                    \
  const std::string isa = GENERATE(Catch::Generators::from_range(isas())); \
  CAPTURE(isa);                                                            \
  mamba_ops::set_cpu_isa(isa)

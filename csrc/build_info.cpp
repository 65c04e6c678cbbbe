#include "build_info.h"

#include <algorithm>
#include <stdexcept>

#include "build_config.h"
#include "kernels/cpu/isa.h"
#include "kernels/plan.h"

namespace mamba_ops {

std::map<std::string, std::string> build_info() {
  return {{"version", MAMBA_OPS_VERSION},
          {"compiler", MAMBA_OPS_COMPILER},
#ifdef USE_CUDA
          {"cuda", MAMBA_OPS_CUDA_VERSION},
          {"cuda_architectures", MAMBA_OPS_CUDA_ARCHS},
#else
          {"cuda", ""},
          {"without_cuda_because", MAMBA_OPS_CUDA_VERSION},
#endif
          {"stable_abi", "torch 2.10"}};
}

std::string cpu_isa() { return cpu().name; }
std::vector<std::string> runnable_cpu_isas() { return cpu_isas(); }
void force_cpu_isa(const std::string& name) { set_cpu_isa(name); }

namespace {

using Plan = std::map<std::string, std::string>;

const std::vector<std::string> kOperators = {"selective_scan",       "ssd",
                                             "causal_conv1d",        "rms_norm_gated",
                                             "causal_conv1d_update", "selective_state_update",
                                             "ssd_state_update"};

void describe(Plan& plan, const Segments& segments, int64_t units) {
  plan["units"] = std::to_string(units);
  plan["pieces"] = std::to_string(segments.count());
  plan["phases"] = segments.split() ? "3" : "1";
}

}  // namespace

Plan plan(const std::string& op, const std::string& device, const std::string& dtype,
          const std::map<std::string, int64_t>& sizes) {
  if (std::find(kOperators.begin(), kOperators.end(), op) == kOperators.end()) {
    std::string known;
    for (const std::string& name : kOperators) known += (known.empty() ? "" : ", ") + name;
    throw std::invalid_argument("plan: op must be one of " + known + ", got '" + op + "'");
  }
  const auto size = [&](const char* letter, int64_t otherwise) {
    const auto found = sizes.find(letter);
    return found == sizes.end() ? otherwise : found->second;
  };
  Plan plan = {{"arithmetic", dtype == "float64" || dtype == "complex128" ? "float64" : "float32"}};
  if (device != "cpu") {
#ifdef USE_CUDA
    plan["kernel"] = op == "causal_conv1d" ? "cuda" : "none: " + op + " has no CUDA kernel in this version";
#else
    plan["kernel"] = std::string("none: built without CUDA (") + MAMBA_OPS_CUDA_VERSION + ")";
#endif
    return plan;
  }
  plan["kernel"] = std::string("cpu ") + cpu().name;
  const int64_t b = size("b", 1), l = size("l", 1), g = size("g", 1);
  if (op == "selective_scan") {
    ScanDims dims{.b = b,
                  .d = size("d", 1),
                  .l = l,
                  .n = size("n", 16),
                  .groups_B = g,
                  .groups_C = g,
                  .complex = false,
                  .softplus = true,
                  .constant_B = false,
                  .constant_C = false};
    const Segments segments(runs_of_rows(b, l), dims);
    describe(plan, segments, segments.list().view().groups * dims.channel_blocks());
    plan["checkpoint"] = std::to_string(kScanCheckpoint);
  } else if (op == "ssd") {
    SsdDims dims{.b = b,
                 .l = l,
                 .h = size("h", 1),
                 .p = size("p", 64),
                 .n = size("n", 128),
                 .groups_B = g,
                 .groups_C = g,
                 .q = size("q", kSsdChunk),
                 .heads = 1,
                 .softplus = true,
                 .D_per_channel = false,
                 .dt_min = 0,
                 .dt_max = 0};
    const Segments segments(runs_of_rows(b, l), dims);
    describe(plan, segments, segments.list().view().groups * dims.head_blocks());
    const bool narrow = dtype == "bfloat16" && std::string(cpu().name) == "avx512bf16";
    plan["products"] = narrow ? "bfloat16" : plan["arithmetic"];
    plan["chunk_size"] = std::to_string(dims.q);
    plan["heads_per_unit"] = std::to_string(dims.heads);
  }
  return plan;
}

}  // namespace mamba_ops

#include "build_info.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "build_config.h"
#include "kernels/cpu/isa.h"
#include "kernels/cuda/path.h"
#include "kernels/norm_linear.h"
#include "kernels/plan.h"
#ifdef USE_CUDA
#include "kernels/cuda/selective_scan.h"
#include "kernels/cuda/ssd.h"
#endif

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
void force_cuda_path(const std::string& name) {
  if (name != "auto" && name != "portable" && name != "small")
    throw std::invalid_argument("set_cuda_path: name must be 'auto', 'portable' or 'small', got '" + name +
                                "'");
  portable_only = name != "auto";
  little_shared_memory = name == "small";
}

namespace {

using Plan = std::map<std::string, std::string>;

const std::vector<std::string> kOperators = {"selective_scan",         "ssd",
                                             "causal_conv1d",          "rms_norm_gated",
                                             "add_rms_norm",           "norm_linear",
                                             "norm_linear_conv",       "causal_conv1d_update",
                                             "selective_state_update", "ssd_state_update"};
const std::vector<std::string> kDtypes = {"float32", "float64",   "bfloat16",
                                          "float16", "complex64", "complex128"};

void check_name(const char* what, const std::string& name, const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), name) != known.end()) return;
  std::string list;
  for (const std::string& each : known) list += (list.empty() ? "" : ", ") + each;
  throw std::invalid_argument(std::string("plan: ") + what + " must be one of " + list + ", got '" + name +
                              "'");
}

// Each a letter of the operators, and a size that a call has.
void check_sizes(const std::string& op, const std::map<std::string, int64_t>& sizes) {
  const std::map<std::string, int64_t> least = {{"b", 0}, {"l", 0}, {"d", 0}, {"h", 0}, {"k", 0},
                                                {"p", 1}, {"n", 1}, {"g", 1}, {"q", 1}, {"w", 1}};
  std::map<std::string, int64_t> most = {{"q", kSsdMaxChunk}, {"w", kConvMaxWidth}};
  if (op == "selective_scan") most["n"] = kScanMaxState;
  if (op == "ssd") most["n"] = most["p"] = kSsdMaxWidth;
  for (const auto& [letter, size] : sizes) {
    if (!least.contains(letter))
      throw std::invalid_argument("plan: sizes are b, l, d, h, k, p, n, g, q and w, got '" + letter + "'");
    if (size < least.at(letter) || (most.contains(letter) && size > most[letter]))
      throw std::invalid_argument("plan: " + letter + " must be " +
                                  (most.contains(letter) ? "in " + std::to_string(least.at(letter)) + ".." +
                                                               std::to_string(most[letter])
                                                         : "at least " + std::to_string(least.at(letter))) +
                                  ", got " + std::to_string(size));
  }
}

void describe(Plan& plan, const Segments& segments, int64_t units) {
  plan["units"] = std::to_string(units);
  plan["pieces"] = std::to_string(segments.count());
  plan["phases"] = std::string(1, segments.split() ? '3' : '1');
}

#ifdef USE_CUDA
DType dtype_of(const std::string& name) {
  return name == "float64"    ? DType::f64
         : name == "bfloat16" ? DType::bf16
         : name == "float16"  ? DType::f16
                              : DType::f32;
}

View contiguous(std::initializer_list<int64_t> sizes, DType dtype) {
  View v{.data = reinterpret_cast<void*>(uintptr_t(256)), .dtype = dtype};
  int64_t i = int64_t(sizes.size()), stride = 1;
  for (auto size = std::rbegin(sizes); size != std::rend(sizes); stride *= *size++) v.stride[--i] = stride;
  return v;
}
DType parameter_type(DType data) { return data == DType::f64 ? data : DType::f32; }

// Which kernels a call with contiguous, aligned tensors takes on the current device.
void describe_cuda(Plan& plan, const ScanDims& dims, DType type) {
  const View data = contiguous({dims.b, dims.d, dims.l}, type),
             B = contiguous({dims.b, dims.groups_B, dims.n, dims.l}, type),
             C = contiguous({dims.b, dims.groups_C, dims.n, dims.l}, type),
             A = contiguous({dims.d, dims.n}, parameter_type(type)),
             parameter = contiguous({dims.d}, parameter_type(type));
  ScanFwd fwd{};
  fwd.dims = dims;
  fwd.u = fwd.delta = fwd.z = fwd.y = data;
  fwd.A = A;
  fwd.B = B;
  fwd.C = C;
  fwd.D = fwd.delta_bias = parameter;
  ScanBwd bwd{};
  bwd.fwd = fwd;
  bwd.fwd.y = {};
  bwd.dy = bwd.du = bwd.ddelta = bwd.dz = data;
  bwd.dA = A;
  bwd.dB = B;
  bwd.dC = C;
  bwd.dD = bwd.ddelta_bias = parameter;
  const auto name = [](ScanPath path) { return path == ScanPath::tuned ? "cuda tuned" : "cuda portable"; };
  plan["kernel"] = name(scan_kernel(fwd, {}).path);
  plan["backward"] = name(scan_kernel(bwd, {}).path);
  plan["checkpoint"] = std::to_string(kScanCheckpointCuda);
}

void describe_cuda(Plan& plan, const SsdDims& dims, DType type) {
  const int64_t b = dims.b, l = dims.l, h = dims.h;
  const View data = contiguous({b, l, h, dims.p}, type), dt = contiguous({b, l, h}, type),
             B = contiguous({b, l, dims.groups_B, dims.n}, type),
             C = contiguous({b, l, dims.groups_C, dims.n}, type),
             parameter = contiguous({h}, parameter_type(type));
  SsdFwd fwd{};
  fwd.dims = dims;
  fwd.x = fwd.y = data;
  fwd.dt = dt;
  fwd.A = fwd.dt_bias = fwd.D = parameter;
  fwd.B = B;
  fwd.C = C;
  SsdBwd bwd{};
  bwd.fwd = fwd;
  bwd.fwd.y = {};
  bwd.dy = bwd.dx = data;
  bwd.ddt = dt;
  bwd.dA = bwd.ddt_bias = bwd.dD = parameter;
  bwd.dB = B;
  bwd.dC = C;
  const auto name = [](SsdPath path) { return path == SsdPath::hopper ? "cuda hopper" : "cuda portable"; };
  plan["kernel"] = name(ssd_kernel(fwd, {}).path);
  plan["backward"] = name(ssd_kernel(bwd, {}).path);
}
#endif

}  // namespace

Plan plan(const std::string& op, const std::string& device, const std::string& dtype,
          const std::map<std::string, int64_t>& sizes) {
  check_name("op", op, kOperators);
  check_name("dtype", dtype, kDtypes);
  const bool on_cpu = device == "cpu";
  if (!on_cpu && device.rfind("cuda", 0) != 0)
    throw std::invalid_argument("plan: device must be cpu or cuda, got '" + device + "'");
  check_sizes(op, sizes);
  const auto size = [&](const char* letter, int64_t otherwise) {
    const auto found = sizes.find(letter);
    return found == sizes.end() ? otherwise : found->second;
  };
  Plan plan = {{"arithmetic", dtype == "float64" || dtype == "complex128" ? "float64" : "float32"}};
  const int64_t b = size("b", 1), l = size("l", 1), g = size("g", 1);
  for (const auto& [name, letter] : {std::pair("selective_scan", "d"), std::pair("ssd", "h")})
    if (op == name && size(letter, 1) % g != 0)
      throw std::invalid_argument(std::string("plan: g must divide ") + letter + " = " +
                                  std::to_string(size(letter, 1)) + ", got " + std::to_string(g));
  ScanDims scan{.b = b,
                .d = size("d", 1),
                .l = l,
                .n = size("n", 16),
                .groups_B = g,
                .groups_C = g,
                .complex = false,
                .softplus = true,
                .constant_B = false,
                .constant_C = false};
  SsdDims ssd{.b = b,
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
              .tf32 = false,
              .dt_min = 0,
              .dt_max = INFINITY};
  // The norm, then torch's product; else a kernel for both.
  const bool by_parts =
      op.rfind("norm_linear", 0) == 0 && (on_cpu || dtype != "bfloat16" || b > kNormLinearRows ||
                                          size("k", 1) < 1 || size("k", 1) > kNormLinearWidth);
  if (!on_cpu) {
#ifdef USE_CUDA
    if (op == "selective_scan")
      describe_cuda(plan, scan, dtype_of(dtype));
    else if (op == "ssd")
      describe_cuda(plan, ssd, dtype_of(dtype));
    else
      plan["kernel"] = by_parts ? "cuda by parts" : "cuda";
#else
    plan["kernel"] = std::string("none: built without CUDA (") + MAMBA_OPS_CUDA_VERSION + ")";
#endif
    return plan;
  }
  plan["kernel"] = std::string("cpu ") + cpu().name + (by_parts ? " by parts" : "");
  if (op == "selective_scan") {
    const Segments segments(runs_of_rows(b, l), scan);
    describe(plan, segments, segments.list().view().groups * scan.channel_blocks());
    plan["checkpoint"] = std::to_string(kScanCheckpoint);
  } else if (op == "ssd") {
    const Segments segments(runs_of_rows(b, l), ssd);
    describe(plan, segments, segments.list().view().groups * ssd.head_blocks());
    const bool narrow = dtype == "bfloat16" && std::string(cpu().name) == "avx512bf16";
    plan["products"] = narrow ? "bfloat16" : plan["arithmetic"];
    plan["chunk_size"] = std::to_string(ssd.q);
    plan["heads_per_unit"] = std::to_string(ssd.heads);
  }
  return plan;
}

std::pair<int64_t, int64_t> norm_linear_limits() { return {kNormLinearRows, kNormLinearWidth}; }

}  // namespace mamba_ops

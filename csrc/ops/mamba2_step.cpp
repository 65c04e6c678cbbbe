#include "kernels/mamba2_step.h"

#include "build_info.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace mamba_ops {

namespace {

using Tensors = std::vector<Tensor>;

// The tensors of one kind, one a layer: checked, with a name for errors such as "in_proj[3]".
class Kind {
 public:
  Kind(const Checker& check, const char* name, const Tensors& tensors, size_t layers)
      : check_(check), name_(name), tensors_(tensors) {
    check.that(tensors.size() == layers, [&] {
      return std::string(name) + " must have one tensor for each of the " + std::to_string(layers) +
             " layers, got " + std::to_string(tensors.size());
    });
  }

  // The common type of all.
  DType all(const char* letters, std::initializer_list<int64_t> dims,
            std::initializer_list<ScalarType> allowed) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const std::string name = std::string(name_) + "[" + std::to_string(i) + "]";
      const Tensor& t = tensors_[i];
      check_.all(name.c_str(), t, letters, dims, allowed);
      check_.that(t.scalar_type() == tensors_[0].scalar_type(), [&] {
        return name + " must have the dtype of the first, " + name_of(tensors_[0].scalar_type()) + ", got " +
               name_of(t.scalar_type());
      });
      check_.that(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0,
                  [&] { return name + " must be contiguous and begin at a multiple of 16 bytes"; });
    }
    return view(tensors_[0]).dtype;
  }
  void* at(size_t i) const { return tensors_[i].data_ptr(); }

 private:
  const Checker& check_;
  const char* name_;
  const Tensors& tensors_;
};

}  // namespace

std::tuple<Tensor, Tensor> mamba2_step(Tensor stream, Tensors norm_weight, Tensors in_proj,
                                       Tensors conv_state, Tensors conv_weight, Tensors conv_bias,
                                       Tensors state, Tensors dt_bias, Tensors A_log, Tensors D,
                                       Tensors gate_norm_weight, Tensors out_proj, double eps,
                                       double gate_eps, double dt_min, double dt_max) {
  const Checker check("mamba2_step", stream);
  const auto half = ScalarType::BFloat16, whole = ScalarType::Float;
  check.all("stream", stream, "(1, d)", {1, -1}, {half, whole});
  const size_t layers = in_proj.size();
  check.that(layers >= 1 && layers <= size_t(Mamba2Step::kMaxLayers), [&] {
    return "in_proj must have 1 to " + std::to_string(Mamba2Step::kMaxLayers) + " layers, got " +
           std::to_string(layers);
  });
  check.that(!state.empty() && state[0].dim() == 4, "state must be (1, h, p, n) for every layer");
  check.that(!D.empty(), "D must be (h) or (h, p) for every layer");
  stream = torch::stable::contiguous(stream);
  const int64_t d = stream.size(1), h = state[0].size(1), p = state[0].size(2), n = state[0].size(3);
  check.that(h * p == 2 * d, [&] {
    return "state must be (1, h, p, n) with h p = 2 d = " + std::to_string(2 * d) + ", got " +
           shape_of(state[0]);
  });
  const int64_t width = 2 * d + 2 * n;
  Tensor out = empty({1, d}, half, stream), sum = empty({1, d}, stream.scalar_type(), stream);
  Mamba2Step params = {.layers = int64_t(layers),
                       .d = d,
                       .h = h,
                       .n = n,
                       .eps = float(eps),
                       .gate_eps = float(gate_eps),
                       .dt_min = float(dt_min),
                       .dt_max = float(dt_max),
                       .stream_dtype = view(stream).dtype,
                       .conv_bias = !conv_bias.empty(),
                       .D_by_channel = D[0].dim() == 2,
                       .stream = stream.data_ptr(),
                       .out = out.data_ptr(),
                       .sum = sum.data_ptr()};
  check.eps(eps);
  check.eps(gate_eps);
  check.step_limits(dt_min, dt_max);
  const Kind norms(check, "norm_weight", norm_weight, layers), ins(check, "in_proj", in_proj, layers),
      conv_states(check, "conv_state", conv_state, layers), taps(check, "conv_weight", conv_weight, layers),
      biases(check, "conv_bias", conv_bias, conv_bias.empty() ? 0 : layers),
      states(check, "state", state, layers), steps(check, "dt_bias", dt_bias, layers),
      rates(check, "A_log", A_log, layers), skips(check, "D", D, layers),
      gates(check, "gate_norm_weight", gate_norm_weight, layers), outs(check, "out_proj", out_proj, layers);
  norms.all("(d)", {d}, {half});
  ins.all("(4 d + 2 n + h, d)", {4 * d + 2 * n + h, d}, {half});
  conv_states.all("(1, 2 d + 2 n, 3)", {1, width, 3}, {half});
  taps.all("(2 d + 2 n, 4)", {width, 4}, {half});
  if (params.conv_bias) biases.all("(2 d + 2 n)", {width}, {half});
  params.state_dtype = states.all("(1, h, p, n)", {1, h, p, n}, {half, whole});
  params.dt_bias_dtype = steps.all("(h)", {h}, {half, whole});
  params.A_dtype = rates.all("(h)", {h}, {half, whole});
  params.D_dtype =
      params.D_by_channel ? skips.all("(h, p)", {h, p}, {half, whole}) : skips.all("(h)", {h}, {half, whole});
  gates.all("(2 d)", {2 * d}, {half});
  outs.all("(d, 2 d)", {d, 2 * d}, {half});
  for (size_t i = 0; i < layers; ++i)
    params.layer[i] = {.norm = norms.at(i),
                       .in_proj = ins.at(i),
                       .conv_weight = taps.at(i),
                       .conv_bias = params.conv_bias ? biases.at(i) : nullptr,
                       .dt_bias = steps.at(i),
                       .A_log = rates.at(i),
                       .D = skips.at(i),
                       .gate_norm = gates.at(i),
                       .out_proj = outs.at(i),
                       .conv_state = conv_states.at(i),
                       .state = states.at(i)};
#if defined(USE_CUDA) && defined(MAMBA_OPS_SM90)
  const CudaCall cuda(check.op(), stream);
  check.that(mamba2_step_takes(params), [&] {
    return "takes d in multiples of 256 up to 2560 and states of 128, 256 or 512 bytes a row, on a Hopper "
           "GPU, got d = " +
           std::to_string(d) + ", state " + shape_of(state[0]);
  });
  Tensor scratch = empty({mamba2_step_scratch(params)}, ScalarType::Byte, stream);
  params.scratch = scratch.data_ptr();
  cuda.launched(mamba2_step_hopper(params, cuda.stream()));
#else
  no_cuda_kernel(check.op());
#endif
  return {out, sum};
}

bool mamba2_step_fits(int64_t layers, int64_t d, int64_t h, int64_t n, int64_t state_bytes) {
#if defined(USE_CUDA) && defined(MAMBA_OPS_SM90)
  Mamba2Step p = {.layers = layers, .d = d, .h = h, .n = n};
  p.state_dtype = state_bytes == 4 ? DType::f32 : DType::bf16;
  return mamba2_step_takes(p);
#else
  return false;
#endif
}

}  // namespace mamba_ops

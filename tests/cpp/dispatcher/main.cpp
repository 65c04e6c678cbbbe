// Calls operators of mamba_ops through torch's dispatcher and compares them with the same sums in plain torch
// operators.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <mamba_ops/mamba_ops.h>

#include <cstdio>

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

template <class F>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

bool close(const char* what, const Tensor& got, const Tensor& want) {
  const double error = (got - want).abs().max().item<double>() / want.abs().max().item<double>();
  std::printf("%s: relative error %.2g\n", what, error);
  return error < 1e-5;
}

bool conv_agrees() {
  const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
                                      const OptTensor&, const OptTensor&, bool, bool)>(
          "mamba_ops::causal_conv1d_fwd");
  const int64_t b = 2, d = 5, l = 100, w = 4;
  const Tensor x = at::randn({b, d, l}), weight = at::randn({d, w}), bias = at::randn({d}),
               init = at::randn({b, d, w - 1});
  const auto [y, final_state] = op.call(x, weight, bias, init, {}, {}, true, true);
  const Tensor input = at::cat({init, x}, 2);
  const Tensor want = at::silu(at::conv1d(input, weight.unsqueeze(1), bias, {1}, at::IntArrayRef{0}, {1}, d));
  return close("causal_conv1d", y, want) && at::equal(final_state, input.slice(2, l));
}

bool scan_agrees() {
  const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
      const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&, bool, bool,
      bool)>("mamba_ops::selective_scan_fwd");
  const int64_t b = 2, d = 6, l = 150, n = 4;
  const Tensor u = at::randn({b, d, l}), delta = at::rand({b, d, l}), A = -at::rand({d, n}),
               D = at::randn({d});
  const Tensor B = at::randn({b, 1, n, l}), C = at::randn({b, 1, n, l}), z = at::randn({b, d, l});
  const auto [y, final_state, checkpoints] =
      op.call(u, delta, A, B, C, D, z, {}, {}, {}, {}, true, true, false);
  Tensor h = at::zeros({b, d, n});
  const Tensor step = at::softplus(delta), want = at::empty({b, d, l});
  for (int64_t t = 0; t < l; ++t) {
    const Tensor dt = step.select(2, t).unsqueeze(2), ut = u.select(2, t).unsqueeze(2);
    h = at::exp(dt * A) * h + dt * ut * B.select(3, t);
    want.select(2, t).copy_((h * C.select(3, t)).sum(2) + D * u.select(2, t));
  }
  return close("selective_scan", y, want * at::silu(z)) && close("its final state", final_state, h);
}

}  // namespace

int main() {
  at::manual_seed(0);
  std::printf("mamba_ops %s on %s\n", mamba_ops::build_info().at("version").c_str(),
              mamba_ops::cpu_isa().c_str());
  return conv_agrees() && scan_agrees() ? 0 : 1;
}

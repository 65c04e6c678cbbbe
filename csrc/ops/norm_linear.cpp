#include "kernels/norm_linear.h"

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace mamba_ops {

namespace {

// Rows of 16-bit values, or beside them of float32: neighbours in memory, as the kernel moves them in packs.
Tensor with_rows(const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

struct Conv {
  Tensor state, weight;
  OptTensor bias;
  int64_t begin;
};

NormLinear::Conv check_conv(const Checker& check, const Conv& conv, int64_t b, int64_t n) {
  check.all("conv_weight", conv.weight, "(d, w)", {-1, -1}, {ScalarType::Float, ScalarType::BFloat16});
  const int64_t d = conv.weight.size(0), w = conv.weight.size(1);
  check.that(w >= 2 && w <= kConvMaxWidth,
             [&] { return "conv_weight must be (d, w) with w in 2..4, got " + shape_of(conv.weight); });
  check.that(conv.begin >= 0 && conv.begin <= n - d, [&] {
    return "the d = " + std::to_string(d) +
           " columns from conv_begin must be among the n = " + std::to_string(n) +
           " of y, got conv_begin = " + std::to_string(conv.begin);
  });
  check.all("conv_state", conv.state, "(b, d, w - 1)", {b, d, w - 1}, {ScalarType::BFloat16});
  for (int64_t i = 0; i < 3; ++i)
    check.that(conv.state.size(i) <= 1 || conv.state.stride(i) != 0, [&] {
      return "conv_state is updated in place: every value needs memory of its own, got stride 0 in dim " +
             std::to_string(i);
    });
  if (conv.bias) check.all("conv_bias", *conv.bias, "(d)", {d}, {ScalarType::Float, ScalarType::BFloat16});
  return {conv.begin, d, int(w), view(conv.state), view(conv.weight), view(conv.bias)};
}

std::tuple<Tensor, Tensor> run(const char* op, Tensor x, OptTensor residual, OptTensor z,
                               const OptTensor& norm_weight, Tensor weight, const OptTensor& bias, double eps,
                               bool norm_before_gate, const Conv* conv) {
  const Checker check(op, x);
  const ScalarType type = x.scalar_type();
  check.dtype("x", x, {ScalarType::BFloat16});
  check.shape("x", x, "(b, k)", {-1, -1});
  const int64_t b = x.size(0), k = x.size(1);
  if (residual) check.all("residual", *residual, "(b, k)", {b, k}, {ScalarType::Float, type});
  if (z) check.all("z", *z, "(b, k)", {b, k}, {type});
  if (norm_weight) check.all("norm_weight", *norm_weight, "(k)", {k}, {ScalarType::Float, type});
  check.that(norm_weight || (!residual && !z), "residual and z are of the norm, but norm_weight is None");
  check.that(!(residual && z), "residual and z exclude one another");
  check.all("weight", weight, "(n, k)", {-1, k}, {type});
  const int64_t n = weight.size(0);
  if (bias) check.all("bias", *bias, "(n)", {n}, {ScalarType::Float, type});
  check.eps(eps);
  x = with_rows(x);
  weight = with_rows(weight);
  if (residual) residual = with_rows(*residual);
  if (z) z = with_rows(*z);
  Tensor y = empty({b, n}, type, x);
  Tensor sum = residual ? empty({b, k}, residual->scalar_type(), x) : none(x);
  NormLinear params = {.b = b,
                       .k = k,
                       .n = n,
                       .eps = eps,
                       .norm_before_gate = norm_before_gate,
                       .x = view(x),
                       .residual = view(residual),
                       .z = view(z),
                       .sum = residual ? view(sum) : View{},
                       .norm = view(norm_weight),
                       .weight = view(weight),
                       .bias = view(bias),
                       .y = view(y),
                       .conv = conv ? check_conv(check, *conv, b, n) : NormLinear::Conv{}};
  params.norm.stride[1] = params.norm.stride[0];
  params.norm.stride[0] = 0;
#ifdef USE_CUDA
  const CudaCall cuda(check.op(), x);
  cuda.launched(norm_linear_cuda(params, cuda.stream()));
#else
  no_cuda_kernel(check.op());
#endif
  return {y, sum};
}

}  // namespace

std::tuple<Tensor, Tensor> norm_linear(Tensor x, OptTensor residual, OptTensor z, OptTensor norm_weight,
                                       Tensor weight, OptTensor bias, double eps, bool norm_before_gate) {
  return run("norm_linear", x, residual, z, norm_weight, weight, bias, eps, norm_before_gate, nullptr);
}

std::tuple<Tensor, Tensor> norm_linear_conv(Tensor x, OptTensor residual, OptTensor norm_weight,
                                            Tensor weight, OptTensor bias, Tensor conv_state,
                                            Tensor conv_weight, OptTensor conv_bias, double eps,
                                            int64_t conv_begin) {
  const Conv conv = {conv_state, conv_weight, conv_bias, conv_begin};
  return run("norm_linear_conv", x, residual, {}, norm_weight, weight, bias, eps, false, &conv);
}

}  // namespace mamba_ops

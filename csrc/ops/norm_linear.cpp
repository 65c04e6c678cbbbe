#include "kernels/norm_linear.h"

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace mamba_ops {

namespace {

// Rows of 16-bit values, or beside them of float32: neighbours in memory, as the kernel moves them in packs.
Tensor with_rows(const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

}  // namespace

std::tuple<Tensor, Tensor> norm_linear(Tensor x, OptTensor residual, OptTensor z, OptTensor norm_weight,
                                       Tensor weight, OptTensor bias, double eps, bool norm_before_gate) {
  const Checker check("norm_linear", x);
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
  check.that(eps >= 0, "eps must be >= 0, got " + std::to_string(eps));
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
                       .y = view(y)};
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

}  // namespace mamba_ops

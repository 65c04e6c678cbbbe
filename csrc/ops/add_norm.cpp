#include "kernels/add_norm.h"

#include <algorithm>

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace mamba_ops {

namespace {

constexpr int64_t kUnitValues = 32768, kMaxUnits = 64;  // fewer values are not worth a thread

Tensor contiguous_like(const Tensor& t) { return torch::stable::new_empty(t, t.sizes(), t.scalar_type()); }

void check_add_norm(const Checker& check, const Tensor& x, const Tensor& residual, const Tensor& weight,
                    double eps) {
  const ScalarType type = check.float_type("x", x);
  const ScalarType wide = arithmetic_type(type);
  check.that(x.dim() > 0, "x must be (..., d), got a tensor without dims");
  check.device("residual", residual);
  check.dtype("residual", residual, {wide, type});
  bool same = residual.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = residual.size(i) == x.size(i);
  check.that(same, "residual must be shaped like x = " + shape_of(x) + ", got " + shape_of(residual));
  check.all("weight", weight, "(d)", {x.size(x.dim() - 1)}, {ScalarType::Float, wide, type});
  check.that(eps >= 0, "eps must be >= 0, got " + std::to_string(eps));
}

}  // namespace

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  const Checker check("add_rms_norm", x);
  check_add_norm(check, x, residual, weight, eps);
  x = torch::stable::contiguous(x);
  residual = torch::stable::contiguous(residual);
  Tensor y = contiguous_like(x), sum = contiguous_like(residual);
  const int64_t values = x.numel(), d = weight.size(0), rows = d == 0 ? 0 : values / d;
  const int64_t units =
      values == 0 ? 0 : std::min(rows, std::clamp<int64_t>(values / kUnitValues, 1, kMaxUnits));
  const AddNorm params = {.rows = rows,
                          .d = d,
                          .eps = eps,
                          .x = view(x),
                          .residual = view(residual),
                          .sum = view(sum),
                          .y = view(y),
                          .weight = view(weight),
                          .units = units};
  if (check.cuda()) {
#ifdef USE_CUDA
    const CudaCall cuda(check.op(), x);
    cuda.launched(add_rms_norm_cuda(params, cuda.stream()));
#else
    no_cuda_kernel(check.op());
#endif
  } else {
    by_arithmetic(x.scalar_type(), [&]<class R>() {
      const Kernels<R>& k = cpu().kernels<R>();
      for_units(units, k.add_rms_norm_scratch(params), [&](int64_t begin, int64_t end, void* memory) {
        k.add_rms_norm(params, begin, end, memory);
      });
    });
  }
  return {y, sum};
}

}  // namespace mamba_ops

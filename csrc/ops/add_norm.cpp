#include "kernels/add_norm.h"

#include <algorithm>

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace mamba_ops {

namespace {

constexpr int64_t kUnitValues = 32768, kMaxUnits = 64;  // fewer values are not worth a thread

Tensor contiguous_like(const Tensor& t) { return torch::stable::new_empty(t, t.sizes(), t.scalar_type()); }

void check_like(const Checker& check, const char* name, const Tensor& t, const char* other, const Tensor& x,
                std::initializer_list<ScalarType> allowed) {
  check.device(name, t);
  check.dtype(name, t, allowed);
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
  if (!same)
    fail(check.op(),
         std::string(name) + " must be shaped like " + other + " = " + shape_of(x) + ", got " + shape_of(t));
}

// x and residual, or in the backward dy and the sum, by their names.
void check_add_norm(const Checker& check, const char* x_name, const Tensor& x, const char* residual_name,
                    const Tensor& residual, const Tensor& weight, double eps) {
  const ScalarType type = check.float_type(x_name, x);
  const ScalarType wide = arithmetic_type(type);
  check.that(x.dim() > 0,
             [&] { return std::string(x_name) + " must be (..., d), got a tensor without dims"; });
  check_like(check, residual_name, residual, x_name, x, {wide, type});
  check.all("weight", weight, "(d)", {x.size(x.dim() - 1)}, {ScalarType::Float, wide, type});
  check.eps(eps);
}

int64_t cpu_units(int64_t rows, int64_t d) {
  return rows == 0 ? 0 : std::min(rows, std::clamp<int64_t>(rows * d / kUnitValues, 1, kMaxUnits));
}

// Few values a row leave over what nearly equal terms differ by: the backward computes them in float64.
ScalarType bwd_arithmetic(const Tensor& x) {
  return x.size(x.dim() - 1) <= 4 ? ScalarType::Double : arithmetic_type(x.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  const Checker check("add_rms_norm", x);
  check_add_norm(check, "x", x, "residual", residual, weight, eps);
  x = torch::stable::contiguous(x);
  residual = torch::stable::contiguous(residual);
  Tensor y = contiguous_like(x), sum = contiguous_like(residual);
  const int64_t d = weight.size(0), rows = d == 0 ? 0 : x.numel() / d;
  const AddNorm params = {.rows = rows,
                          .d = d,
                          .eps = eps,
                          .x = view(x),
                          .residual = view(residual),
                          .sum = view(sum),
                          .y = view(y),
                          .weight = view(weight),
                          .units = cpu_units(rows, d)};
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
      for_units(params.units, k.add_rms_norm_scratch(d), [&](int64_t begin, int64_t end, void* memory) {
        k.add_rms_norm(params, begin, end, memory);
      });
    });
  }
  return {y, sum};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_bwd(Tensor dy, OptTensor dsum, Tensor sum, Tensor weight,
                                                    double eps) {
  const Checker check("add_rms_norm backward", dy);
  check_add_norm(check, "dy", dy, "sum", sum, weight, eps);
  if (dsum) check_like(check, "dsum", *dsum, "sum", sum, {sum.scalar_type()});
  dy = torch::stable::contiguous(dy);
  sum = torch::stable::contiguous(sum);
  if (dsum) dsum = torch::stable::contiguous(*dsum);
  const bool two = dy.scalar_type() != sum.scalar_type();
  Tensor dresidual = contiguous_like(sum), dx = two ? contiguous_like(dy) : none(dy),
         dweight = torch::stable::empty_like(weight);
  const int64_t d = weight.size(0), rows = d == 0 ? 0 : dy.numel() / d;
  AddNormBwd params = {.rows = rows,
                       .d = d,
                       .eps = eps,
                       .dy = view(dy),
                       .sum = view(sum),
                       .dsum = view(dsum),
                       .dresidual = view(dresidual),
                       .dx = two ? view(dx) : View{},
                       .weight = view(weight),
                       .dweight = view(dweight),
                       .partial = nullptr,
                       .units = cpu_units(rows, d)};
  const ScalarType type = bwd_arithmetic(dy);
  const auto allocate = [&] { return empty({params.units, padded(d)}, type, dy); };
  if (check.cuda()) {
#ifdef USE_CUDA
    const CudaCall cuda(check.op(), dy);
    params.units = add_rms_norm_bwd_units_cuda(params);
    const Tensor partial = allocate();
    params.partial = partial.data_ptr();
    cuda.launched(add_rms_norm_bwd_cuda(params, type == ScalarType::Double, cuda.stream()));
#else
    no_cuda_kernel(check.op());
#endif
  } else {
    const Tensor partial = allocate();
    params.partial = partial.data_ptr();
    by_arithmetic(type, [&]<class R>() {
      const Kernels<R>& k = cpu().kernels<R>();
      for_units(params.units, k.add_rms_norm_scratch(d), [&](int64_t begin, int64_t end, void* memory) {
        k.add_rms_norm_bwd(params, begin, end, memory);
      });
      k.add_rms_norm_reduce(params);
    });
  }
  return {dresidual, dx, dweight};
}

}  // namespace mamba_ops

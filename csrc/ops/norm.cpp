#include "kernels/norm.h"

#include <algorithm>

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "ops/parts.h"

namespace mamba_ops {

namespace {

constexpr int64_t kTileValues = 8192, kTileRows = 16;
constexpr int64_t kUnitValues = 32768, kMaxUnits = 64;  // fewer values are not worth a thread

// The leading dims that remain where neighbours are merged, if the strides of all tensors allow it.
struct Lead {
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides;  // per tensor

  explicit Lead(const std::vector<Tensor>& tensors) : strides(tensors.size()) {
    const Tensor& first = tensors.front();
    for (int64_t i = 0; i + 1 < first.dim(); ++i) {
      const int64_t size = first.size(i);
      if (size == 1) continue;
      bool merge = !sizes.empty();
      for (size_t k = 0; merge && k < tensors.size(); ++k)
        merge = strides[k].back() == tensors[k].stride(i) * size;
      if (merge)
        sizes.back() *= size;
      else
        sizes.push_back(size);
      for (size_t k = 0; k < tensors.size(); ++k) {
        if (merge) strides[k].pop_back();
        strides[k].push_back(tensors[k].stride(i));
      }
    }
  }
};

// What forward and backward share. views: of the inputs, x first, then of the outputs.
struct NormCall {
  NormFwd params;
  std::vector<View> views;

  NormCall(const parts::NormInputs& in, std::vector<Tensor> inputs, const std::vector<Tensor>& outputs) {
    const int64_t group = in.group_size;
    const auto all = [&] {
      std::vector<Tensor> tensors = inputs;
      tensors.insert(tensors.end(), outputs.begin(), outputs.end());
      return tensors;
    };
    Lead lead(all());
    if (lead.sizes.size() > 3) {  // more than a View holds; with contiguous tensors every dim merges
      for (Tensor& t : inputs) t = torch::stable::contiguous(t);
      copies = inputs;
      lead = Lead(all());
    }
    NormDims dims{{1, 1, 1}, in.weight.size(0), group, kTileRows, in.eps, in.norm_before_gate};
    const size_t kept = lead.sizes.size();
    std::copy(lead.sizes.begin(), lead.sizes.end(), dims.lead + 3 - kept);
    bool by_rows = true;
    for (const Tensor& t : all()) {
      View v = view(t);
      const std::vector<int64_t>& strides = lead.strides[views.size()];
      const int64_t last = t.stride(t.dim() - 1);
      for (size_t i = 0; i < 4; ++i) v.stride[i] = i == 3 ? last : i < 3 - kept ? 0 : strides[i - (3 - kept)];
      by_rows = by_rows && last == 1;
      views.push_back(v);
    }
    if (by_rows)
      dims.tile_rows = std::clamp<int64_t>(kTileValues / padded(std::max<int64_t>(group, 1)), 1, kTileRows);
    const int64_t values = dims.rows() * dims.d;
    const int64_t units = values == 0 ? 0 : std::clamp<int64_t>(values / kUnitValues, 1, kMaxUnits);
    params = {.dims = dims,
              .x = {},
              .z = {},
              .y = {},
              .weight = view(in.weight),
              .units = std::min(units, dims.tiles())};
  }

 private:
  std::vector<Tensor> copies;
};

void check_like_x(const Checker& check, const char* name, const Tensor& t, const Tensor& x) {
  check.device(name, t);
  check.dtype(name, t, {x.scalar_type()});
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
  if (!same)
    fail(check.op(), std::string(name) + " must be shaped like x = " + shape_of(x) + ", got " + shape_of(t));
}

void check_norm(const Checker& check, const parts::NormInputs& in) {
  const auto& [x, weight, z, eps, group, norm_before_gate] = in;
  const ScalarType type = check.float_type("x", x);
  if (x.dim() == 0) fail(check.op(), "x must be (..., d), got a tensor without dims");
  const int64_t d = x.size(x.dim() - 1);
  check.all("weight", weight, "(d)", {d}, {ScalarType::Float, type});
  if (z) check_like_x(check, "z", *z, x);
  check.eps(eps);
  if (group != d && (group < 1 || d % group != 0))
    fail(check.op(), "group_size must divide d = " + std::to_string(d) + ", got " + std::to_string(group));
}

// The backward of a group of a few values is what nearly equal terms leave over: it computes in float64.
ScalarType bwd_arithmetic(const Tensor& x, int64_t group) {
  return group <= 4 ? ScalarType::Double : arithmetic_type(x.scalar_type());
}

Tensor contiguous_like(const Tensor& t) { return torch::stable::new_empty(t, t.sizes(), t.scalar_type()); }

void forward_cpu(const NormFwd& params, ScalarType type) {
  by_arithmetic(type, [&]<class R>() {
    const Kernels<R>& k = cpu().kernels<R>();
    for_units(
        params.units, params.units ? k.rms_norm_gated_scratch(params.dims) : 0,
        [&](int64_t begin, int64_t end, void* memory) { k.rms_norm_gated_fwd(params, begin, end, memory); });
  });
}

void backward_cpu(NormBwd& params, ScalarType type, const Tensor& x) {
  const NormDims& dims = params.fwd.dims;
  const Tensor partial = empty({params.fwd.units, dims.groups(), padded(dims.group)}, type, x);
  params.partial = partial.data_ptr();
  by_arithmetic(type, [&]<class R>() {
    const Kernels<R>& k = cpu().kernels<R>();
    for_units(
        params.fwd.units, params.fwd.units ? k.rms_norm_gated_scratch(dims) : 0,
        [&](int64_t begin, int64_t end, void* memory) { k.rms_norm_gated_bwd(params, begin, end, memory); });
    if (dims.groups() > 0) k.rms_norm_gated_reduce(params);
  });
}

#ifdef USE_CUDA
void forward_cuda(const Checker& check, const NormFwd& params, const Tensor& x) {
  const CudaCall cuda(check.op(), x);
  cuda.launched(rms_norm_gated_fwd_cuda(params, cuda.stream()));
}

void backward_cuda(const Checker& check, NormBwd& params, ScalarType type, const Tensor& x) {
  const CudaCall cuda(check.op(), x);
  const bool wide = type == ScalarType::Double;
  const NormDims& dims = params.fwd.dims;
  const Tensor partial = empty({rms_norm_gated_bwd_units_cuda(dims, wide), dims.d}, type, x);
  params.partial = partial.data_ptr();
  cuda.launched(rms_norm_gated_bwd_cuda(params, wide, cuda.stream()));
}
#else
void forward_cuda(const Checker& check, const NormFwd&, const Tensor&) { no_cuda_kernel(check.op()); }
void backward_cuda(const Checker& check, NormBwd&, ScalarType, const Tensor&) { no_cuda_kernel(check.op()); }
#endif

}  // namespace

Tensor parts::rms_norm_gated_fwd(const NormInputs& in, OptTensor y) {
  const Checker check("rms_norm_gated", in.x);
  check_norm(check, in);
  if (!y) y = contiguous_like(in.x);
  std::vector<Tensor> inputs{in.x};
  if (in.z) inputs.push_back(*in.z);
  NormCall call(in, inputs, {*y});
  call.params.x = call.views[0];
  if (in.z) call.params.z = call.views[1];
  call.params.y = call.views.back();
  check.cuda() ? forward_cuda(check, call.params, in.x) : forward_cpu(call.params, in.x.scalar_type());
  return *y;
}

parts::NormGrads parts::rms_norm_gated_bwd(const NormInputs& in, const Tensor& dy, NormGrads where,
                                           OptTensor y) {
  const Checker check("rms_norm_gated backward", in.x);
  check_norm(check, in);
  check_like_x(check, "dy", dy, in.x);
  if (!where.x) where.x = contiguous_like(in.x);
  if (in.z && !where.z) where.z = contiguous_like(in.x);
  allocate(where.weight, in.weight);
  std::vector<Tensor> inputs{in.x, dy}, outputs{*where.x};
  if (in.z) {
    inputs.push_back(*in.z);
    outputs.push_back(*where.z);
  }
  if (y) outputs.push_back(*y);
  NormCall call(in, inputs, outputs);
  NormBwd params{.fwd = call.params,
                 .dy = call.views[1],
                 .dx = call.views[in.z ? 3 : 2],
                 .dz = in.z ? call.views[4] : View{},
                 .dweight = view(where.weight),
                 .partial = nullptr};
  params.fwd.x = call.views[0];
  if (in.z) params.fwd.z = call.views[2];
  if (y) params.fwd.y = call.views.back();
  const ScalarType type = bwd_arithmetic(in.x, in.group_size);
  check.cuda() ? backward_cuda(check, params, type, in.x) : backward_cpu(params, type, in.x);
  return where;
}

Tensor rms_norm_gated_fwd(Tensor x, Tensor weight, OptTensor z, double eps, int64_t group_size,
                          bool norm_before_gate) {
  return parts::rms_norm_gated_fwd({x, weight, z, eps, group_size, norm_before_gate});
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_gated_bwd(Tensor dy, Tensor x, Tensor weight, OptTensor z,
                                                      double eps, int64_t group_size, bool norm_before_gate) {
  const auto grads = parts::rms_norm_gated_bwd({x, weight, z, eps, group_size, norm_before_gate}, dy);
  return {*grads.x, *grads.weight, parts::or_none(grads.z, x)};
}

}  // namespace mamba_ops

#include "ops/tensors.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

// Of libtorch_cuda.so, which a torch without CUDA has not: absent, the library must still load.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_baddbmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                                 AtenTensorHandle batch1,
                                                                 AtenTensorHandle batch2, double beta,
                                                                 double alpha);
}

namespace mamba_ops {

namespace {

// (b, l, c) as (b l, c), if its strides allow it.
bool merges(const Tensor& t) {
  return t.size(0) == 1 || t.size(1) == 1 || t.stride(0) == t.stride(1) * t.size(1);
}

Tensor merged(const Tensor& t) {
  return view_of(t, {t.size(0) * t.size(1), t.size(2)}, {t.stride(t.size(1) == 1 ? 0 : 1), t.stride(2)});
}

Tensor rows(const Tensor& t) {
  return merges(t) ? merged(t) : torch::stable::reshape(t, {t.size(0) * t.size(1), t.size(2)});
}

Tensor flipped(const Tensor& matrix) {
  return view_of(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// out = x w + beta start; torch::stable has no product with an `out`.
void product(const Tensor& out, const Tensor& x, const Tensor& w, const Tensor& start, double beta) {
  const bool batch = out.dim() == 3;
  const auto call = out.is_cuda() ? (batch ? aoti_torch_cuda_baddbmm_out : aoti_torch_cuda_addmm_out)
                                  : (batch ? aoti_torch_cpu_baddbmm_out : aoti_torch_cpu_addmm_out);
  if (!call) fail("matrix product", "got CUDA tensors, but this torch or mamba_ops has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(call(out.get(), start.get(), x.get(), w.get(), beta, 1));
}

// The same for every batch row: one product where tokens can be counted through, else a batch of them.
void multiply(const Tensor& out, const Tensor& x, const Tensor& w, const OptTensor& start, double beta) {
  if (merges(x) && merges(out)) {
    const Tensor to = merged(out);
    product(to, merged(x), w, start ? *start : to, beta);
  } else {
    const Tensor factors = view_of(w, {x.size(0), w.size(0), w.size(1)}, {0, w.stride(0), w.stride(1)});
    product(out, x, factors, start ? *start : out, beta);
  }
}

}  // namespace

void check_conv_state(const Checker& check, const OptTensor& state, int64_t rows, const Tensor& weight) {
  if (!state) return;
  check.device("conv_state", *state);
  check.shape("conv_state", *state, "(b or s, channels, w - 1)", {rows, weight.size(0), weight.size(1) - 1});
}

Tensor view_of(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
               int64_t offset) {
  AtenTensorHandle view = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), int64_t(sizes.size()), sizes.begin(),
                                                               strides.begin(), offset, &view));
  return Tensor(view);
}

Tensor columns(const Tensor& t, int64_t begin, int64_t count) {
  return view_of(t, {t.size(0), t.size(1), count}, {t.stride(0), t.stride(1), t.stride(2)},
                 begin * t.stride(2));
}

Tensor transposed(const Tensor& t) {
  return view_of(t, {t.size(0), t.size(2), t.size(1)}, {t.stride(0), t.stride(2), t.stride(1)});
}

Tensor split_columns(const Tensor& t, int64_t groups, int64_t c) {
  return view_of(t, {t.size(0), t.size(1), groups, c},
                 {t.stride(0), t.stride(1), c * t.stride(2), t.stride(2)});
}

Tensor empty_tokens(int64_t b, int64_t l, int64_t c, bool token_last, const Tensor& like) {
  return token_last ? transposed(empty({b, c, l}, like.scalar_type(), like))
                    : empty({b, l, c}, like.scalar_type(), like);
}

void multiply(const Tensor& out, const Tensor& x, const Tensor& w, bool add) {
  multiply(out, x, w, std::nullopt, add ? 1 : 0);
}

void linear(const Tensor& out, const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  if (bias)
    multiply(out, x, flipped(weight), as_type(*bias, out.scalar_type()), 1);
  else
    multiply(out, x, flipped(weight));
}

Tensor weight_grad(const Tensor& dout, const Tensor& x) {
  Tensor grad = empty({dout.size(2), x.size(2)}, x.scalar_type(), x);
  product(grad, flipped(rows(dout)), rows(x), grad, 0);
  return grad;
}

Tensor bias_grad(const Tensor& dout, ScalarType type) {
  const int64_t dims[] = {0, 1};
  return torch::stable::sum(dout, torch::headeronly::IntHeaderOnlyArrayRef(dims, 2), false, type);
}

}  // namespace mamba_ops

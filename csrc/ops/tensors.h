// What the whole layers do with tensors besides calling our operators: views of parts of them, torch's matrix
// products, torch's operators. Letters: b batch, l length, c columns.
#pragma once
#include "ops/check.h"

namespace mamba_ops {

// The state of a layer's convolution, by its name there; rows: of the states.
void check_conv_state(const Checker& check, const OptTensor& state, int64_t rows, const Tensor& weight);

// Memory of t, `offset` elements from its first one.
Tensor view_of(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
               int64_t offset = 0);
// (b, l, c) -> (b, l, count); (b, l, c) -> (b, c, l); (b, l, groups c) -> (b, l, groups, c)
Tensor columns(const Tensor& t, int64_t begin, int64_t count);
Tensor transposed(const Tensor& t);
Tensor split_columns(const Tensor& t, int64_t groups, int64_t c);
inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}
// (b, l, c) with the tokens of a row side by side (token_last), or the columns of a token.
Tensor empty_tokens(int64_t b, int64_t l, int64_t c, bool token_last, const Tensor& like);

// out = x w, or out += x w: out (b, l, o), x (b, l, i), w (i, o), of any strides.
void multiply(const Tensor& out, const Tensor& x, const Tensor& w, bool add = false);
// out = x weight^T + bias: weight (o, i), bias (o).
void linear(const Tensor& out, const Tensor& x, const Tensor& weight, const OptTensor& bias);
// The gradients of weight and bias, from that of out.
Tensor weight_grad(const Tensor& dout, const Tensor& x);
Tensor bias_grad(const Tensor& dout, ScalarType type);

// An operator of torch that returns a tensor and has no Scalar among its arguments.
template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  StableIValue stack[] = {torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace mamba_ops

#include "kernels/causal_conv1d.h"

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace mamba_ops {

namespace {

constexpr int64_t kPieceTokens = 1024;

// Everything that forward and backward check, and the parameters that they share.
struct ConvCall {
  Checker check;
  ConvFwd params;
  PieceList pieces;
  int64_t states;

  ConvCall(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
           const OptTensor& initial_state, const OptTensor& seq_idx, const OptTensor& cu_seqlens, bool silu)
      : check(op, x) {
    const ScalarType type = check.float_type("x", x);
    check.shape("x", x, "(b, d, l)", {-1, -1, -1});
    const int64_t b = x.size(0), d = x.size(1), l = x.size(2);
    check.all("weight", weight, "(d, w)", {d, -1}, {ScalarType::Float, type});
    const int64_t w = weight.size(1);
    check.that(w >= 2 && w <= kConvMaxWidth, "weight must be (d, w) with w in 2..4, got " + shape_of(weight));
    if (bias) check.all("bias", *bias, "(d)", {d}, {ScalarType::Float, type});
    states = check_sequences(check, b, l, seq_idx, cu_seqlens);
    if (initial_state)
      check.all("initial_state", *initial_state, cu_seqlens ? "(s, d, w - 1)" : "(b, d, w - 1)",
                {states, d, w - 1}, {type});
    params = {.dims = {b, d, l, int(w), silu},
              .x = view(x),
              .y = {},
              .weight = view(weight),
              .bias = view(bias),
              .initial_state = view(initial_state),
              .final_state = {},
              .pieces = {}};
    if (check.cuda()) return;
    pieces = cut(sequences(check, b, l, seq_idx, cu_seqlens), kPieceTokens, kMaxGroups);
    params.pieces = pieces.view();
  }
};

void forward_cpu(const ConvCall& call, ScalarType type) {
  by_arithmetic(type, [&]<class R>() {
    const Kernels<R>& k = cpu().kernels<R>();
    for_units(call.params.units(), k.causal_conv1d_scratch(), [&](int64_t begin, int64_t end, void* memory) {
      k.causal_conv1d_fwd(call.params, begin, end, memory);
    });
  });
}

// Allocates the partial sums of dweight and dbias.
Tensor partial_sums(const ConvDims& dims, int64_t groups, const Tensor& x) {
  return empty({groups, dims.w + 1, padded(dims.d)}, arithmetic_type(x.scalar_type()), x);
}

void backward_cpu(const ConvCall& call, ConvBwd& params, const Tensor& x) {
  const Tensor partial = partial_sums(call.params.dims, params.fwd.pieces.groups, x);
  params.partial = partial.data_ptr();
  by_arithmetic(x.scalar_type(), [&]<class R>() {
    const Kernels<R>& k = cpu().kernels<R>();
    for_units(params.fwd.units(), k.causal_conv1d_scratch(), [&](int64_t begin, int64_t end, void* memory) {
      k.causal_conv1d_bwd(params, begin, end, memory);
    });
    k.causal_conv1d_reduce(params);
  });
}

#ifdef USE_CUDA
void forward_cuda(const ConvCall& call, const Tensor& x, const OptTensor& seq_idx,
                  const OptTensor& cu_seqlens) {
  CudaCall cuda(call.check.op(), x);
  const Sequences seqs = cuda.sequences(call.params.dims.l, seq_idx, cu_seqlens, true);
  cuda.launched(causal_conv1d_fwd_cuda(call.params, seqs, call.states, cuda.stream()));
}

void backward_cuda(const ConvCall& call, ConvBwd& params, const Tensor& x, const OptTensor& seq_idx,
                   const OptTensor& cu_seqlens) {
  CudaCall cuda(call.check.op(), x);
  const Sequences seqs = cuda.sequences(call.params.dims.l, seq_idx, cu_seqlens, true);
  const Tensor partial = partial_sums(call.params.dims, causal_conv1d_groups_cuda(params.fwd), x);
  params.partial = partial.data_ptr();
  cuda.launched(causal_conv1d_bwd_cuda(params, seqs, call.states, cuda.stream()));
}
#else
void forward_cuda(const ConvCall& call, const Tensor&, const OptTensor&, const OptTensor&) {
  no_cuda_kernel(call.check.op());
}
void backward_cuda(const ConvCall& call, ConvBwd&, const Tensor&, const OptTensor&, const OptTensor&) {
  no_cuda_kernel(call.check.op());
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> causal_conv1d_fwd(Tensor x, Tensor weight, OptTensor bias, OptTensor initial_state,
                                             OptTensor seq_idx, OptTensor cu_seqlens, bool silu,
                                             bool return_final_state) {
  ConvCall call("causal_conv1d", x, weight, bias, initial_state, seq_idx, cu_seqlens, silu);
  Tensor y = torch::stable::empty_like(x);
  Tensor final_state =
      return_final_state ? empty({call.states, x.size(1), weight.size(1) - 1}, x.scalar_type(), x) : none(x);
  call.params.y = view(y);
  if (return_final_state) call.params.final_state = view(final_state);
  if (call.check.cuda())
    forward_cuda(call, x, seq_idx, cu_seqlens);
  else
    forward_cpu(call, x.scalar_type());
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(Tensor dy, OptTensor dfinal_state, Tensor x,
                                                             Tensor weight, OptTensor bias,
                                                             OptTensor initial_state, OptTensor seq_idx,
                                                             OptTensor cu_seqlens, bool silu) {
  ConvCall call("causal_conv1d backward", x, weight, bias, initial_state, seq_idx, cu_seqlens, silu);
  const ConvDims& dims = call.params.dims;
  call.check.all("dy", dy, "(b, d, l)", {dims.b, dims.d, dims.l}, {x.scalar_type()});
  if (dfinal_state)
    call.check.all("dfinal_state", *dfinal_state, "(b, d, w - 1)", {call.states, dims.d, dims.w - 1},
                   {x.scalar_type()});
  Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(weight);
  Tensor dbias = bias ? torch::stable::empty_like(*bias) : none(x);
  Tensor dinitial = initial_state ? torch::stable::empty_like(*initial_state) : none(x);
  ConvBwd params{.fwd = call.params,
                 .dy = view(dy),
                 .dx = view(dx),
                 .dweight = view(dweight),
                 .dbias = bias ? view(dbias) : View{},
                 .dfinal = view(dfinal_state),
                 .dinitial = initial_state ? view(dinitial) : View{},
                 .partial = nullptr};
  if (call.check.cuda())
    backward_cuda(call, params, x, seq_idx, cu_seqlens);
  else
    backward_cpu(call, params, x);
  return {dx, dweight, dbias, dinitial};
}

}  // namespace mamba_ops

#include "kernels/causal_conv1d.h"

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "ops/parts.h"

namespace mamba_ops {

namespace {

constexpr int64_t kPieceTokens = 1024;

// Everything that forward and backward check, and the parameters that they share.
struct ConvCall {
  Checker check;
  ConvFwd params;
  PieceList pieces;
  int64_t states;

  ConvCall(const char* op, const parts::ConvInputs& in) : check(op, in.x) {
    const auto& [x, weight, bias, initial_state, seq_idx, cu_seqlens, silu] = in;
    const ScalarType type = check.float_type("x", x);
    check.shape("x", x, "(b, d, l)", {-1, -1, -1});
    const int64_t b = x.size(0), d = x.size(1), l = x.size(2);
    check.all("weight", weight, "(d, w)", {d, -1}, {ScalarType::Float, type});
    const int64_t w = weight.size(1);
    check.that(w >= 2 && w <= kConvMaxWidth,
               [&] { return "weight must be (d, w) with w in 2..4, got " + shape_of(weight); });
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
void forward_cuda(const ConvCall& call, const parts::ConvInputs& in) {
  CudaCall cuda(call.check.op(), in.x);
  const Sequences seqs = cuda.sequences(call.params.dims.l, in.seq_idx, in.cu_seqlens, true);
  cuda.launched(causal_conv1d_fwd_cuda(call.params, seqs, call.states, cuda.stream()));
}

void backward_cuda(const ConvCall& call, ConvBwd& params, const parts::ConvInputs& in) {
  CudaCall cuda(call.check.op(), in.x);
  const Sequences seqs = cuda.sequences(call.params.dims.l, in.seq_idx, in.cu_seqlens, true);
  const Tensor partial = partial_sums(call.params.dims, causal_conv1d_groups_cuda(params.fwd), in.x);
  params.partial = partial.data_ptr();
  cuda.launched(causal_conv1d_bwd_cuda(params, seqs, call.states, cuda.stream()));
}
#else
void forward_cuda(const ConvCall& call, const parts::ConvInputs&) { no_cuda_kernel(call.check.op()); }
void backward_cuda(const ConvCall& call, ConvBwd&, const parts::ConvInputs&) {
  no_cuda_kernel(call.check.op());
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> parts::causal_conv1d_fwd(const ConvInputs& in, bool return_final_state,
                                                    OptTensor y) {
  ConvCall call("causal_conv1d", in);
  const ConvDims& dims = call.params.dims;
  allocate(y, in.x);
  Tensor final_state =
      return_final_state ? empty({call.states, dims.d, dims.w - 1}, in.x.scalar_type(), in.x) : none(in.x);
  call.params.y = view(y);
  if (return_final_state) call.params.final_state = view(final_state);
  if (call.check.cuda())
    forward_cuda(call, in);
  else
    forward_cpu(call, in.x.scalar_type());
  return {*y, final_state};
}

parts::ConvGrads parts::causal_conv1d_bwd(const ConvInputs& in, const Tensor& dy,
                                          const OptTensor& dfinal_state, ConvGrads where) {
  ConvCall call("causal_conv1d backward", in);
  const ConvDims& dims = call.params.dims;
  const ScalarType type = in.x.scalar_type();
  call.check.all("dy", dy, "(b, d, l)", {dims.b, dims.d, dims.l}, {type});
  if (dfinal_state)
    call.check.all("dfinal_state", *dfinal_state, "(b, d, w - 1)", {call.states, dims.d, dims.w - 1}, {type});
  allocate(where.x, in.x);
  allocate(where.weight, in.weight);
  allocate(where.bias, in.bias);
  allocate(where.initial_state, in.initial_state);
  ConvBwd params{.fwd = call.params,
                 .dy = view(dy),
                 .dx = view(where.x),
                 .dweight = view(where.weight),
                 .dbias = view(where.bias),
                 .dfinal = view(dfinal_state),
                 .dinitial = view(where.initial_state),
                 .partial = nullptr};
  if (call.check.cuda())
    backward_cuda(call, params, in);
  else
    backward_cpu(call, params, in.x);
  return where;
}

std::tuple<Tensor, Tensor> causal_conv1d_fwd(Tensor x, Tensor weight, OptTensor bias, OptTensor initial_state,
                                             OptTensor seq_idx, OptTensor cu_seqlens, bool silu,
                                             bool return_final_state) {
  return parts::causal_conv1d_fwd({x, weight, bias, initial_state, seq_idx, cu_seqlens, silu},
                                  return_final_state);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(Tensor dy, OptTensor dfinal_state, Tensor x,
                                                             Tensor weight, OptTensor bias,
                                                             OptTensor initial_state, OptTensor seq_idx,
                                                             OptTensor cu_seqlens, bool silu) {
  const auto grads =
      parts::causal_conv1d_bwd({x, weight, bias, initial_state, seq_idx, cu_seqlens, silu}, dy, dfinal_state);
  return {*grads.x, *grads.weight, parts::or_none(grads.bias, x), parts::or_none(grads.initial_state, x)};
}

}  // namespace mamba_ops

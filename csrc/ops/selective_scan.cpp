#include "kernels/selective_scan.h"

#include <algorithm>

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "ops/parts.h"

#ifdef USE_CUDA
#include "kernels/cuda/selective_scan.h"
#endif

namespace mamba_ops {

namespace {

// Everything that forward and backward check, and the parameters that they share.
struct ScanCall {
  Checker check;
  ScalarType type, arithmetic, state_type;
  int64_t states;
  ScanFwd params{};
  std::optional<Segments> segments;

  ScanCall(const char* op, const parts::ScanInputs& in)
      : check(op, in.u), type(check.float_type("u", in.u)), arithmetic(arithmetic_type(type)) {
    const auto& [u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens, softplus] = in;
    check.shape("u", u, "(b, d, l)", {-1, -1, -1});
    const int64_t b = u.size(0), d = u.size(1), l = u.size(2);
    check.all("delta", delta, "(b, d, l)", {b, d, l}, {type, ScalarType::Float});
    if (z) check.all("z", *z, "(b, d, l)", {b, d, l}, {type, ScalarType::Float});
    check.device("A", A);
    const bool complex =
        A.scalar_type() == ScalarType::ComplexFloat || A.scalar_type() == ScalarType::ComplexDouble;
    const ScalarType complex_type =
        arithmetic == ScalarType::Double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
    state_type = complex ? complex_type : arithmetic;
    if (complex)
      check.all("A", A, "(d, n)", {d, -1}, {complex_type});
    else
      check.all("A", A, "(d, n)", {d, -1}, {ScalarType::Float, type});
    const int64_t n = A.size(1);
    check.that(n >= 1 && n <= kScanMaxState, [&] {
      return "A must be (d, n) with n in 1.." + std::to_string(kScanMaxState) + ", got " + shape_of(A);
    });
    params.dims = {.b = b,
                   .d = d,
                   .l = l,
                   .n = n,
                   .groups_B = 1,
                   .groups_C = 1,
                   .complex = complex,
                   .softplus = softplus,
                   .constant_B = B.dim() == 2,
                   .constant_C = C.dim() == 2,
                   .checkpoint = check.cuda() ? kScanCheckpointCuda : kScanCheckpoint};
    for (const auto& [name, factor, groups] :
         {std::tuple("B", &B, &params.dims.groups_B), std::tuple("C", &C, &params.dims.groups_C)}) {
      check.device(name, *factor);
      if (complex)
        check.dtype(name, *factor, {complex_type});
      else
        check.dtype(name, *factor, {type, ScalarType::Float});
      if (factor->dim() == 2) {
        check.shape(name, *factor, "(d, n)", {d, n});
        continue;
      }
      check.shape(name, *factor, "(b, g, n, l)", {b, -1, n, l}, ", or constant (d, n)");
      *groups = factor->size(1);
      check.that(*groups >= 1 && d % *groups == 0, [&] {
        return std::string(name) + " must be (b, g, n, l) with g dividing d = " + std::to_string(d) +
               ", got " + shape_of(*factor);
      });
    }
    if (D) check.all("D", *D, "(d)", {d}, {ScalarType::Float, type});
    if (delta_bias) check.all("delta_bias", *delta_bias, "(d)", {d}, {ScalarType::Float, type});
    states = check_sequences(check, b, l, seq_idx, cu_seqlens);
    if (initial_state)
      check.all("initial_state", *initial_state, cu_seqlens ? "(s, d, n)" : "(b, d, n)", {states, d, n},
                {state_type});
    params.u = view(u);
    params.delta = view(delta);
    params.z = view(z);
    params.A = view(A);
    params.B = view(B);
    params.C = view(C);
    params.D = view(D);
    params.delta_bias = view(delta_bias);
    if (check.cuda()) return;
    segments.emplace(sequences(check, b, l, seq_idx, cu_seqlens), params.dims);
    params.pieces = segments->list().view();
  }

  Tensor rows_of_states(const Tensor& device_of) const {
    return empty({segments->count(), params.dims.d, params.dims.n, params.dims.parts()}, arithmetic,
                 device_of);
  }
};

template <class R>
void run(const ScanFwd& params) {
  const Kernels<R>& k = cpu().kernels<R>();
  for_units(
      params.units(), k.selective_scan_fwd_scratch(params.dims),
      [&](int64_t begin, int64_t end, void* memory) { k.selective_scan_fwd(params, begin, end, memory); });
}

template <class R>
void run(const ScanBwd& params) {
  const Kernels<R>& k = cpu().kernels<R>();
  for_units(
      params.fwd.units(), k.selective_scan_bwd_scratch(params.fwd.dims),
      [&](int64_t begin, int64_t end, void* memory) { k.selective_scan_bwd(params, begin, end, memory); });
}

template <class R>
void combine(const ScanFwd& params, const Tensor& states, const Tensor& ends, bool reverse) {
  constexpr int64_t kChannels = 16;
  const int64_t d = params.dims.d;
  for_units((d + kChannels - 1) / kChannels, 0, [&](int64_t begin, int64_t end, void*) {
    cpu().kernels<R>().selective_scan_combine(params, static_cast<R*>(states.data_ptr()),
                                              static_cast<const R*>(ends.data_ptr()), reverse,
                                              begin * kChannels, std::min(end * kChannels, d));
  });
}

template <class R>
void forward(const ScanCall& call, ScanFwd params, const Tensor& u) {
  const Segments& segments = *call.segments;
  if (!segments.split()) return run<R>(params);
  const Tensor entering = call.rows_of_states(u), ends = call.rows_of_states(u);
  const Tensor sums = empty({segments.count(), params.dims.d}, call.arithmetic, u);
  const PieceList alone = segments.alone(false);
  ScanFwd first = params;
  first.y = first.z = {};
  first.states_in = first.checkpoints = nullptr;
  first.states_out = ends.data_ptr();
  first.delta_sums = sums.data_ptr();
  first.pieces = alone.view();
  run<R>(first);

  const PieceList joined = segments.joined(static_cast<R*>(entering.data_ptr()),
                                           entering.numel() / segments.count(), params.states_in, false);
  combine<R>(first, entering, ends, false);
  params.states_in = entering.data_ptr();
  params.pieces = joined.view();
  run<R>(params);
}

template <class R>
void backward(const ScanCall& call, ScanBwd params, const Tensor& u) {
  const Segments& segments = *call.segments;
  if (!segments.split()) return run<R>(params);
  const Tensor entering = call.rows_of_states(u), ends = call.rows_of_states(u);
  const Tensor sums = empty({segments.count(), params.fwd.dims.d}, call.arithmetic, u);
  const PieceList alone = segments.alone(true);
  ScanBwd first = params;
  first.du = {};
  first.dstates_out = nullptr;
  first.dstates_in = ends.data_ptr();
  first.fwd.delta_sums = sums.data_ptr();
  first.fwd.pieces = alone.view();
  run<R>(first);

  const PieceList joined = segments.joined(static_cast<R*>(entering.data_ptr()),
                                           entering.numel() / segments.count(), params.dstates_out, true);
  combine<R>(first.fwd, entering, ends, true);
  params.dstates_out = entering.data_ptr();
  params.fwd.pieces = joined.view();
  run<R>(params);
}

Tensor checkpoint_rows(const ScanCall& call, const Tensor& u) {
  const ScanDims& dims = call.params.dims;
  return empty({dims.b, dims.l / dims.checkpoint, dims.parts(), dims.n, dims.d}, call.arithmetic, u);
}

void forward_cpu(const ScanCall& call, const ScanFwd& params, const Tensor& u) {
  by_arithmetic(call.type, [&]<class R>() { forward<R>(call, params, u); });
}

void backward_cpu(const ScanCall& call, ScanBwd& params, const Tensor& u) {
  const ScanDims& dims = call.params.dims;
  by_arithmetic(call.type, [&]<class R>() {
    const Kernels<R>& k = cpu().kernels<R>();
    const int64_t groups = params.fwd.pieces.groups, kinds = 1 + dims.constant_B + dims.constant_C;
    const Tensor partial_A =
        empty({groups, kinds * dims.parts() * dims.n, padded(dims.d)}, call.arithmetic, u);
    const Tensor partial_d = empty({groups, 2, padded(dims.d)}, call.arithmetic, u);
    const bool per_step = !dims.constant_B || !dims.constant_C;
    const Tensor partial_BC =
        empty({per_step ? dims.channel_blocks() : 0, dims.b, dims.l, 2 * dims.parts() * padded(dims.n)},
              call.arithmetic, u);
    params.partial_A = partial_A.data_ptr();
    params.partial_d = partial_d.data_ptr();
    params.partial_BC = partial_BC.data_ptr();
    backward<R>(call, params, u);
    for_units(dims.reduce_units(), 0,
              [&](int64_t begin, int64_t end, void*) { k.selective_scan_reduce(params, begin, end); });
  });
}

#ifdef USE_CUDA
void forward_cuda(const ScanCall& call, const ScanFwd& params, const parts::ScanInputs& in) {
  CudaCall cuda(call.check.op(), in.u);
  const Sequences seqs = cuda.sequences(params.dims.l, in.seq_idx, in.cu_seqlens);
  const auto kernel = scan_kernel(params, seqs);
  const Tensor workspace = empty({kernel.workspace(params)}, ScalarType::Byte, in.u);
  cuda.launched(kernel.launch(params, seqs, call.states, workspace.data_ptr(), cuda.stream()));
}

void backward_cuda(const ScanCall& call, const ScanBwd& params, const parts::ScanInputs& in) {
  CudaCall cuda(call.check.op(), in.u);
  const Sequences seqs = cuda.sequences(params.fwd.dims.l, in.seq_idx, in.cu_seqlens);
  const auto kernel = scan_kernel(params, seqs);
  const Tensor workspace = empty({kernel.workspace(params)}, ScalarType::Byte, in.u);
  cuda.launched(kernel.launch(params, seqs, call.states, workspace.data_ptr(), cuda.stream()));
}
#else
void forward_cuda(const ScanCall& call, const ScanFwd&, const parts::ScanInputs&) {
  no_cuda_kernel(call.check.op());
}
void backward_cuda(const ScanCall& call, const ScanBwd&, const parts::ScanInputs&) {
  no_cuda_kernel(call.check.op());
}
#endif

void forward_on_device(const ScanCall& call, const ScanFwd& params, const parts::ScanInputs& in) {
  if (call.check.cuda())
    forward_cuda(call, params, in);
  else
    forward_cpu(call, params, in.u);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> parts::selective_scan_fwd(const ScanInputs& in, bool return_final_state,
                                                             bool save_checkpoints, OptTensor y) {
  ScanCall call("selective_scan", in);
  const ScanDims& dims = call.params.dims;
  allocate(y, in.u);
  Tensor final_state = return_final_state ? empty({call.states, dims.d, dims.n}, call.state_type, in.u)
                                          : empty({0}, call.state_type, in.u);
  Tensor checkpoints = save_checkpoints ? checkpoint_rows(call, in.u) : empty({0}, call.arithmetic, in.u);
  OptTensor initial_state;
  if (in.initial_state) initial_state = torch::stable::contiguous(*in.initial_state);
  ScanFwd params = call.params;
  params.y = view(y);
  params.states_in = initial_state ? initial_state->data_ptr() : nullptr;
  params.states_out = return_final_state ? final_state.data_ptr() : nullptr;
  params.checkpoints = save_checkpoints ? checkpoints.data_ptr() : nullptr;
  forward_on_device(call, params, in);
  return {*y, final_state, checkpoints};
}

parts::ScanGrads parts::selective_scan_bwd(const ScanInputs& in, const Tensor& dy,
                                           const OptTensor& dfinal_state, Tensor checkpoints,
                                           ScanGrads where) {
  ScanCall call("selective_scan backward", in);
  const ScanDims& dims = call.params.dims;
  call.check.all("dy", dy, "(b, d, l)", {dims.b, dims.d, dims.l}, {call.type});
  if (dfinal_state)
    call.check.all("dfinal_state", *dfinal_state, "(b, d, n)", {call.states, dims.d, dims.n},
                   {call.state_type});
  OptTensor initial_state, leaving;
  if (in.initial_state) initial_state = torch::stable::contiguous(*in.initial_state);
  if (dfinal_state) leaving = torch::stable::contiguous(*dfinal_state);
  allocate(where.u, in.u);
  allocate(where.delta, in.delta);
  allocate(where.A, in.A);
  allocate(where.B, in.B);
  allocate(where.C, in.C);
  allocate(where.D, in.D);
  allocate(where.z, in.z);
  allocate(where.delta_bias, in.delta_bias);
  allocate(where.initial_state, initial_state);

  ScanBwd params{};
  params.fwd = call.params;
  params.fwd.states_in = initial_state ? initial_state->data_ptr() : nullptr;
  if (checkpoints.numel() == 0) {  // the forward was not told that there would be a backward
    checkpoints = checkpoint_rows(call, in.u);
    if (checkpoints.numel() > 0) {
      Tensor y = torch::stable::empty_like(in.u);
      ScanFwd again = params.fwd;
      again.checkpoints = checkpoints.data_ptr();
      again.y = view(y);
      forward_on_device(call, again, in);
    }
  }
  call.check.all("checkpoints", checkpoints, "(b, l / checkpoint, parts, n, d)",
                 {dims.b, dims.l / dims.checkpoint, dims.parts(), dims.n, dims.d}, {call.arithmetic});
  checkpoints = torch::stable::contiguous(checkpoints);
  params.fwd.checkpoints = checkpoints.data_ptr();
  params.dy = view(dy);
  params.du = view(where.u);
  params.ddelta = view(where.delta);
  params.dz = view(where.z);
  params.dA = view(where.A);
  params.dB = view(where.B);
  params.dC = view(where.C);
  params.dD = view(where.D);
  params.ddelta_bias = view(where.delta_bias);
  params.dstates_out = leaving ? leaving->data_ptr() : nullptr;
  params.dstates_in = initial_state ? where.initial_state->data_ptr() : nullptr;
  if (call.check.cuda())
    backward_cuda(call, params, in);
  else
    backward_cpu(call, params, in.u);
  return where;
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                                      OptTensor D, OptTensor z, OptTensor delta_bias,
                                                      OptTensor initial_state, OptTensor seq_idx,
                                                      OptTensor cu_seqlens, bool delta_softplus,
                                                      bool return_final_state, bool save_checkpoints) {
  return parts::selective_scan_fwd(
      {u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens, delta_softplus},
      return_final_state, save_checkpoints);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_bwd(
    Tensor dy, OptTensor dfinal_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptTensor D,
    OptTensor z, OptTensor delta_bias, OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens,
    Tensor checkpoints, bool delta_softplus) {
  const auto grads = parts::selective_scan_bwd(
      {u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens, delta_softplus}, dy,
      dfinal_state, checkpoints);
  const auto kept = [&](const OptTensor& grad) { return parts::or_none(grad, u); };
  return {*grads.u,
          *grads.delta,
          *grads.A,
          *grads.B,
          *grads.C,
          kept(grads.D),
          kept(grads.z),
          kept(grads.delta_bias),
          kept(grads.initial_state)};
}

}  // namespace mamba_ops

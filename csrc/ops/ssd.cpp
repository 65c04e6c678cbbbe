#include "kernels/ssd.h"

#include <algorithm>

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "ops/parts.h"
#ifdef USE_CUDA
#include "kernels/cuda/ssd.h"
#endif

namespace mamba_ops {

namespace {

// Everything that forward and backward check, and the parameters that they share.
struct SsdCall {
  Checker check;
  ScalarType type, arithmetic;
  int64_t states;
  SsdFwd params{};
  std::optional<Segments> segments;

  SsdCall(const char* op, const parts::SsdInputs& in)
      : check(op, in.x), type(check.float_type("x", in.x)), arithmetic(arithmetic_type(type)) {
    const auto& [x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens, softplus, dt_min, dt_max,
                 chunk_size, tf32] = in;
    check.shape("x", x, "(b, l, h, p)", {-1, -1, -1, -1});
    const int64_t b = x.size(0), l = x.size(1), h = x.size(2), p = x.size(3);
    check.that(p >= 1 && p <= kSsdMaxWidth, [&] {
      return "x must be (b, l, h, p) with p in 1.." + std::to_string(kSsdMaxWidth) + ", got " + shape_of(x);
    });
    check.all("dt", dt, "(b, l, h)", {b, l, h}, {type, ScalarType::Float});
    check.all("A", A, "(h)", {h}, {ScalarType::Float, type});
    check.device("B", B);
    check.that(B.dim() == 4, [&] { return "B must be (b, l, g, n), got " + shape_of(B); });
    const int64_t n = B.size(3);
    for (const auto& [name, factor] : {std::pair("B", &B), std::pair("C", &C)}) {
      check.all(name, *factor, "(b, l, g, n)", {b, l, -1, n}, {type, ScalarType::Float});
      const int64_t g = factor->size(2);
      check.that(g >= 1 && h % g == 0, [&] {
        return std::string(name) + " must be (b, l, g, n) with g dividing h = " + std::to_string(h) +
               ", got " + shape_of(*factor);
      });
    }
    check.that(n >= 1 && n <= kSsdMaxWidth, [&] {
      return "B must be (b, l, g, n) with n in 1.." + std::to_string(kSsdMaxWidth) + ", got " + shape_of(B);
    });
    if (D) {
      check.device("D", *D);
      check.dtype("D", *D, {ScalarType::Float, type});
      if (D->dim() == 2)
        check.shape("D", *D, "(h, p)", {h, p});
      else
        check.shape("D", *D, "(h)", {h}, " or (h, p)");
    }
    if (z) check.all("z", *z, "(b, l, h, p)", {b, l, h, p}, {type, ScalarType::Float});
    if (dt_bias) check.all("dt_bias", *dt_bias, "(h)", {h}, {ScalarType::Float, type});
    check.step_limits(dt_min, dt_max);
    check.that(!chunk_size || (*chunk_size >= 1 && *chunk_size <= kSsdMaxChunk), [&] {
      return "chunk_size must be None or in 1.." + std::to_string(kSsdMaxChunk) + ", got " +
             std::to_string(chunk_size.value_or(0));
    });
    states = check_sequences(check, b, l, seq_idx, cu_seqlens);
    if (initial_state)
      check.all("initial_state", *initial_state, cu_seqlens ? "(s, h, p, n)" : "(b, h, p, n)",
                {states, h, p, n}, {arithmetic});
    params.dims = {.b = b,
                   .l = l,
                   .h = h,
                   .p = p,
                   .n = n,
                   .groups_B = B.size(2),
                   .groups_C = C.size(2),
                   .q = chunk_size.value_or(kSsdChunk),
                   .heads = 1,
                   .softplus = softplus,
                   .D_per_channel = D && D->dim() == 2,
                   .tf32 = tf32,
                   .dt_min = dt_min,
                   .dt_max = dt_max};
    params.x = view(x);
    params.dt = view(dt);
    params.z = view(z);
    params.A = view(A);
    params.dt_bias = view(dt_bias);
    params.B = view(B);
    params.C = view(C);
    params.D = view(D);
    if (check.cuda()) return;
    segments.emplace(sequences(check, b, l, seq_idx, cu_seqlens), params.dims);
    params.pieces = segments->list().view();
  }

  Tensor rows_of_states(const Tensor& device_of) const {
    return empty({segments->count(), params.dims.h, params.dims.p, params.dims.n}, arithmetic, device_of);
  }
};

template <class R>
const SsdKernels& kernels_for(const SsdFwd& params) {
  const Kernels<R>& k = cpu().kernels<R>();
  const bool bf16 =
      params.x.dtype == DType::bf16 && params.B.dtype == DType::bf16 && params.C.dtype == DType::bf16;
  return bf16 ? k.ssd_bf16 : k.ssd;
}

template <class R>
void run(const SsdFwd& params) {
  const SsdKernels& k = kernels_for<R>(params);
  for_units(params.units(), k.fwd_scratch(params.dims),
            [&](int64_t begin, int64_t end, void* memory) { k.fwd(params, begin, end, memory); });
}

template <class R>
void run(const SsdBwd& params) {
  const SsdKernels& k = kernels_for<R>(params.fwd);
  for_units(params.fwd.units(), k.bwd_scratch(params.fwd.dims, params.fwd.pieces),
            [&](int64_t begin, int64_t end, void* memory) { k.bwd(params, begin, end, memory); });
}

template <class R>
void combine(const SsdFwd& params, const Tensor& states, const Tensor& ends, bool reverse) {
  for_units(params.dims.h, 0, [&](int64_t begin, int64_t end, void*) {
    cpu().kernels<R>().ssd_combine(params, static_cast<R*>(states.data_ptr()),
                                   static_cast<const R*>(ends.data_ptr()), reverse, begin, end);
  });
}

// The states that enter every segment, and the pieces that start from them.
template <class R>
PieceList join_states(const SsdCall& call, SsdFwd& params, const Tensor& entering, const Tensor& x) {
  const Segments& segments = *call.segments;
  const Tensor ends = call.rows_of_states(x),
               logs = empty({segments.count(), params.dims.h}, call.arithmetic, x);
  const PieceList alone = segments.alone(false);
  SsdFwd first = params;
  first.y = first.z = {};
  first.states_in = nullptr;
  first.states_out = ends.data_ptr();
  first.log_decays = logs.data_ptr();
  first.pieces = alone.view();
  run<R>(first);
  PieceList joined = segments.joined(static_cast<R*>(entering.data_ptr()),
                                     entering.numel() / segments.count(), params.states_in, false);
  combine<R>(first, entering, ends, false);
  params.states_in = entering.data_ptr();
  return joined;
}

template <class R>
void forward(const SsdCall& call, SsdFwd params, const Tensor& x) {
  if (!call.segments->split()) return run<R>(params);
  const Tensor entering = call.rows_of_states(x);
  const PieceList joined = join_states<R>(call, params, entering, x);
  params.pieces = joined.view();
  run<R>(params);
}

template <class R>
void backward(const SsdCall& call, SsdBwd params, const Tensor& x) {
  const Segments& segments = *call.segments;
  if (!segments.split()) return run<R>(params);
  const Tensor entering = call.rows_of_states(x), leaving = call.rows_of_states(x),
               ends = call.rows_of_states(x);
  const Tensor logs = empty({segments.count(), params.fwd.dims.h}, call.arithmetic, x);
  PieceList joined = join_states<R>(call, params.fwd, entering, x);

  const PieceList alone = segments.alone(true);
  SsdBwd first = params;
  first.dx = {};
  first.dstates_out = nullptr;
  first.dstates_in = ends.data_ptr();
  first.fwd.log_decays = logs.data_ptr();
  first.fwd.pieces = alone.view();
  run<R>(first);
  const PieceList reversed = segments.joined(static_cast<R*>(leaving.data_ptr()),
                                             leaving.numel() / segments.count(), params.dstates_out, true);
  combine<R>(first.fwd, leaving, ends, true);
  // A piece enters with its row of `entering`; its gradient comes from its row of `leaving`; the run's first
  // piece returns the gradient of the run's initial state.
  for (int64_t k = 0; k < segments.count(); ++k) joined.pieces[k].state_out = reversed.pieces[k].state_out;
  params.dstates_out = leaving.data_ptr();
  const Tensor returned = call.rows_of_states(x);
  void* wanted = params.dstates_in;
  params.dstates_in = returned.data_ptr();
  params.fwd.pieces = joined.view();
  run<R>(params);
  if (!wanted) return;
  const int64_t size = params.fwd.dims.h * params.fwd.dims.p * params.fwd.dims.n;
  for (int64_t k = 0; k < segments.count(); ++k) {
    const int64_t row = segments.list().pieces[k].state_in;
    if (row >= 0)
      std::copy_n(static_cast<const R*>(returned.data_ptr()) + k * size, size,
                  static_cast<R*>(wanted) + row * size);
  }
}

void forward_cpu(const SsdCall& call, const SsdFwd& params, const Tensor& x) {
  by_arithmetic(call.type, [&]<class R>() { forward<R>(call, params, x); });
}

void backward_cpu(const SsdCall& call, SsdBwd params, const Tensor& x) {
  const SsdDims& dims = call.params.dims;
  const Tensor partial_BC =
      empty({dims.head_blocks(), dims.b, dims.l, 2 * padded(dims.n)}, call.arithmetic, x);
  const Tensor partial_h =
      empty({params.fwd.pieces.groups, dims.h, padded(2) + padded(dims.p)}, call.arithmetic, x);
  params.partial_BC = partial_BC.data_ptr();
  params.partial_h = partial_h.data_ptr();
  by_arithmetic(call.type, [&]<class R>() {
    const Kernels<R>& k = cpu().kernels<R>();
    backward<R>(call, params, x);
    for_units(dims.reduce_units(), 0,
              [&](int64_t begin, int64_t end, void*) { k.ssd_reduce(params, begin, end); });
  });
}

#ifdef USE_CUDA
template <class Params>
void run_cuda(const SsdCall& call, const Params& params, const parts::SsdInputs& in) {
  CudaCall cuda(call.check.op(), in.x);
  const Sequences seqs = cuda.given_sequences(in.seq_idx, in.cu_seqlens);
  const SsdKernel<Params> kernel = ssd_kernel(params, seqs);
  const Tensor workspace = empty({kernel.workspace(params, seqs, call.states)}, ScalarType::Byte, in.x);
  cuda.launched(kernel.launch(params, seqs, call.states, workspace.data_ptr(), cuda.stream()));
}
#else
template <class Params>
void run_cuda(const SsdCall& call, const Params&, const parts::SsdInputs&) {
  no_cuda_kernel(call.check.op());
}
#endif

}  // namespace

std::tuple<Tensor, Tensor> parts::ssd_fwd(const SsdInputs& in, bool return_final_state, OptTensor y) {
  SsdCall call("ssd", in);
  const SsdDims& dims = call.params.dims;
  allocate(y, in.x);
  Tensor final_state = return_final_state
                           ? empty({call.states, dims.h, dims.p, dims.n}, call.arithmetic, in.x)
                           : empty({0}, call.arithmetic, in.x);
  OptTensor initial_state;
  if (in.initial_state) initial_state = torch::stable::contiguous(*in.initial_state);
  SsdFwd params = call.params;
  params.y = view(y);
  params.states_in = initial_state ? initial_state->data_ptr() : nullptr;
  params.states_out = return_final_state ? final_state.data_ptr() : nullptr;
  if (call.check.cuda())
    run_cuda(call, params, in);
  else
    forward_cpu(call, params, in.x);
  return {*y, final_state};
}

parts::SsdGrads parts::ssd_bwd(const SsdInputs& in, const Tensor& dy, const OptTensor& dfinal_state,
                               SsdGrads where) {
  SsdCall call("ssd backward", in);
  const SsdDims& dims = call.params.dims;
  call.check.all("dy", dy, "(b, l, h, p)", {dims.b, dims.l, dims.h, dims.p}, {call.type});
  OptTensor initial_state, leaving;
  if (dfinal_state) {
    call.check.all("dfinal_state", *dfinal_state, "(b, h, p, n)", {call.states, dims.h, dims.p, dims.n},
                   {call.arithmetic});
    leaving = torch::stable::contiguous(*dfinal_state);
  }
  if (in.initial_state) initial_state = torch::stable::contiguous(*in.initial_state);
  allocate(where.x, in.x);
  allocate(where.dt, in.dt);
  allocate(where.A, in.A);
  allocate(where.B, in.B);
  allocate(where.C, in.C);
  allocate(where.D, in.D);
  allocate(where.z, in.z);
  allocate(where.dt_bias, in.dt_bias);
  allocate(where.initial_state, initial_state);

  SsdBwd params{};
  params.fwd = call.params;
  params.fwd.states_in = initial_state ? initial_state->data_ptr() : nullptr;
  params.dy = view(dy);
  params.dx = view(where.x);
  params.dz = view(where.z);
  params.ddt = view(where.dt);
  params.dA = view(where.A);
  params.ddt_bias = view(where.dt_bias);
  params.dB = view(where.B);
  params.dC = view(where.C);
  params.dD = view(where.D);
  params.dstates_out = leaving ? leaving->data_ptr() : nullptr;
  params.dstates_in = initial_state ? where.initial_state->data_ptr() : nullptr;
  if (call.check.cuda())
    run_cuda(call, params, in);
  else
    backward_cpu(call, params, in.x);
  return where;
}

std::tuple<Tensor, Tensor> ssd_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                                   OptTensor z, OptTensor dt_bias, OptTensor initial_state, OptTensor seq_idx,
                                   OptTensor cu_seqlens, bool dt_softplus, double dt_min, double dt_max,
                                   std::optional<int64_t> chunk_size, bool tf32, bool return_final_state) {
  return parts::ssd_fwd({x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens, dt_softplus,
                         dt_min, dt_max, chunk_size, tf32},
                        return_final_state);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_bwd(
    Tensor dy, OptTensor dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
    OptTensor z, OptTensor dt_bias, OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens,
    bool dt_softplus, double dt_min, double dt_max, std::optional<int64_t> chunk_size, bool tf32) {
  const auto grads = parts::ssd_bwd({x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens,
                                     dt_softplus, dt_min, dt_max, chunk_size, tf32},
                                    dy, dfinal_state);
  const auto kept = [&](const OptTensor& grad) { return parts::or_none(grad, x); };
  return {*grads.x,
          *grads.dt,
          *grads.A,
          *grads.B,
          *grads.C,
          kept(grads.D),
          kept(grads.z),
          kept(grads.dt_bias),
          kept(grads.initial_state)};
}

}  // namespace mamba_ops

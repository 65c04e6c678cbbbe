#include "kernels/state_update.h"

#include <algorithm>

#include "ops/cuda.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace mamba_ops {

namespace {

constexpr int64_t kThreadValues = 32768;  // a thread is worth so many values of the state, times tokens

// f(begin, end, scratch) over units of `values` each, as many at once as a thread is worth.
template <class F>
void for_updates(int64_t units, int64_t values, int64_t scratch_bytes, const F& f) {
  const int64_t at_once =
      std::clamp<int64_t>(kThreadValues / std::max<int64_t>(values, 1), 1, std::max<int64_t>(units, 1));
  for_units((units + at_once - 1) / at_once, scratch_bytes, [&](int64_t begin, int64_t end, void* memory) {
    f(begin * at_once, std::min(units, end * at_once), memory);
  });
}

// Whether the input has a dim of tokens beside its `dims` others.
bool has_tokens(const Checker& check, const char* name, const Tensor& x, int64_t dims, const char* letters) {
  if (x.dim() != dims && x.dim() != dims + 1)
    fail(check.op(), std::string(name) + " must be " + letters + ", got " + shape_of(x));
  return x.dim() != dims;
}

// The view with its dims in another order; -1: a dim that the tensor does not have.
View reordered(const View& from, std::initializer_list<int> dims) {
  View to{from.data, from.dtype, {}};
  int i = 0;
  for (const int dim : dims) to.stride[i++] = dim < 0 ? 0 : from.stride[dim];
  return to;
}

void check_rows(const Checker& check, const Tensor& state, int64_t b, const OptTensor& indices) {
  for (int64_t i = 0; i < state.dim(); ++i)
    if (state.size(i) > 1 && state.stride(i) == 0)
      fail(check.op(),
           "state is updated in place: every value needs memory of its own, got stride 0 in dim " +
               std::to_string(i));
  if (indices) check.all("state_indices", *indices, "(b)", {b}, {ScalarType::Int, ScalarType::Long});
}

// The row of the state for each of b batch rows, on the CPU; empty: each its own.
std::vector<int64_t> state_rows(const Checker& check, const Tensor& state, int64_t b,
                                const OptTensor& indices) {
  std::vector<int64_t> rows(indices ? b : 0);
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t at = int64_t(i) * indices->stride(0);
    rows[i] = indices->scalar_type() == ScalarType::Int
                  ? static_cast<const int32_t*>(indices->data_ptr())[at]
                  : static_cast<const int64_t*>(indices->data_ptr())[at];
    if (rows[i] >= state.size(0))
      fail(check.op(), "state_indices must be below s = " + std::to_string(state.size(0)) + ", got " +
                           std::to_string(rows[i]) + " at position " + std::to_string(i));
  }
  return rows;
}

// Updates the state on CUDA, or as on_cpu() says, which finds the rows of the state in params.
template <class Params, class OnCpu>
void update(const Checker& check, Params& params, const Tensor& x, const Tensor& state,
            const OptTensor& indices, OnCpu on_cpu) {
  if (!check.cuda()) {
    const std::vector<int64_t> rows = state_rows(check, state, x.size(0), indices);
    params.rows = rows.empty() ? nullptr : rows.data();
    on_cpu();
    return;
  }
#ifdef USE_CUDA
  const CudaCall cuda(check.op(), x);
  const DeviceRows rows{indices ? index_view(*indices) : IndexView{}, state.size(0)};
  cuda.launched(state_update_cuda(params, rows, cuda.stream()));
#else
  no_cuda_kernel(check.op());
#endif
}

// Groups of a tensor whose dim `dim` counts them (-1: one), which must divide `count`.
int64_t groups_of(const Checker& check, const char* name, const Tensor& t, int64_t dim, const char* letter,
                  int64_t count) {
  const int64_t g = dim < 0 ? 1 : t.size(dim);
  if (g < 1 || count % g != 0)
    fail(check.op(), std::string(name) + " must have groups g that divide " + letter + " = " +
                         std::to_string(count) + ", got " + shape_of(t));
  return g;
}

// Of the state and the inputs, whichever computes in the wider type.
ScalarType wider(const Tensor& state, ScalarType type) {
  return arithmetic_type(state.scalar_type()) == ScalarType::Double ? ScalarType::Double : type;
}

// On CUDA a row of n states, each of `parts` real numbers, must fit into shared memory.
void check_row_size(const Checker& check, int64_t n, ScalarType type, int64_t parts) {
  const int64_t bytes = parts * (arithmetic_type(type) == ScalarType::Double ? 8 : 4);
  if (check.cuda() && n > kUpdateRowBytesCuda / bytes)
    fail(check.op(), "state must have n <= " + std::to_string(kUpdateRowBytesCuda / bytes) +
                         " on CUDA, got n = " + std::to_string(n));
}

}  // namespace

Tensor causal_conv1d_update(Tensor x, Tensor state, Tensor weight, OptTensor bias, OptTensor state_indices,
                            bool silu) {
  const Checker check("causal_conv1d_update", x);
  const ScalarType type = check.float_type("x", x);
  const bool tokens = has_tokens(check, "x", x, 2, "(b, d) or (b, d, t)");
  const int64_t b = x.size(0), d = x.size(1);
  check.all("weight", weight, "(d, w)", {d, -1}, {ScalarType::Float, type});
  const int64_t w = weight.size(1);
  if (w < 2 || w > kConvMaxWidth)
    fail(check.op(), "weight must be (d, w) with w in 2..4, got " + shape_of(weight));
  if (bias) check.all("bias", *bias, "(d)", {d}, {ScalarType::Float, type});
  check.float_type("state", state);
  check.shape("state", state, state_indices ? "(s, d, k)" : "(b, d, k)", {state_indices ? -1 : b, d, -1});
  if (state.size(2) < w - 1)
    fail(check.op(),
         "state must be (s, d, k) with k >= w - 1 = " + std::to_string(w - 1) + ", got " + shape_of(state));
  check_rows(check, state, b, state_indices);
  Tensor y = torch::stable::empty_like(x);
  const auto with_tokens = [&](const Tensor& t) { return reordered(view(t), {0, 1, tokens ? 2 : -1}); };
  ConvUpdate params{.conv = {.dims = {b, d, tokens ? x.size(2) : 1, int(w), silu},
                             .x = with_tokens(x),
                             .y = with_tokens(y),
                             .weight = view(weight),
                             .bias = view(bias),
                             .initial_state = {},
                             .final_state = {},
                             .pieces = {}},
                    .state = view(state),
                    .k = state.size(2),
                    .rows = nullptr};
  update(check, params, x, state, state_indices, [&] {
    by_arithmetic(type, [&]<class R>() {
      const Kernels<R>& k = cpu().kernels<R>();
      for_updates((d + kUpdateRows - 1) / kUpdateRows, b * params.conv.dims.l * kUpdateRows * w,
                  k.causal_conv1d_scratch(), [&](int64_t begin, int64_t end, void* memory) {
                    k.causal_conv1d_update(params, begin, end, memory);
                  });
    });
  });
  return y;
}

Tensor selective_state_update(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, OptTensor D,
                              OptTensor z, OptTensor delta_bias, OptTensor state_indices,
                              bool delta_softplus) {
  const Checker check("selective_state_update", u);
  const ScalarType type = check.float_type("u", u);
  const bool tokens = has_tokens(check, "u", u, 2, "(b, d) or (b, d, t)");
  const int64_t b = u.size(0), d = u.size(1), t = tokens ? u.size(2) : 1;
  const auto like_u = [&](const char* name, const Tensor& x) {
    tokens ? check.all(name, x, "(b, d, t)", {b, d, t}, {type})
           : check.all(name, x, "(b, d)", {b, d}, {type});
  };
  like_u("delta", delta);
  if (z) like_u("z", *z);
  check.device("A", A);
  const bool complex =
      A.scalar_type() == ScalarType::ComplexFloat || A.scalar_type() == ScalarType::ComplexDouble;
  const ScalarType number = !complex                                      ? type
                            : arithmetic_type(type) == ScalarType::Double ? ScalarType::ComplexDouble
                                                                          : ScalarType::ComplexFloat;
  check.all("A", A, "(d, n)", {d, -1}, {complex ? ScalarType::ComplexFloat : ScalarType::Float, number});
  const int64_t n = A.size(1);
  const auto groups = [&](const char* name, const Tensor& m) {
    const bool grouped = m.dim() == (tokens ? 4 : 3);
    if (tokens)
      grouped ? check.all(name, m, "(b, g, n, t)", {b, -1, n, t}, {number})
              : check.all(name, m, "(b, n, t)", {b, n, t}, {number});
    else
      grouped ? check.all(name, m, "(b, g, n)", {b, -1, n}, {number})
              : check.all(name, m, "(b, n)", {b, n}, {number});
    return groups_of(check, name, m, grouped ? 1 : -1, "d", d);
  };
  const int64_t groups_B = groups("B", B), groups_C = groups("C", C);
  if (D) check.all("D", *D, "(d)", {d}, {ScalarType::Float, type});
  if (delta_bias) check.all("delta_bias", *delta_bias, "(d)", {d}, {ScalarType::Float, type});
  check.device("state", state);
  if (complex)
    check.dtype("state", state, {ScalarType::ComplexFloat, ScalarType::ComplexDouble});
  else
    check.float_type("state", state);
  check.shape("state", state, state_indices ? "(s, d, n)" : "(b, d, n)", {state_indices ? -1 : b, d, n});
  check_row_size(check, n, wider(state, type), complex ? 2 : 1);
  check_rows(check, state, b, state_indices);
  Tensor y = torch::stable::empty_like(u);
  const auto channels = [&](const View& v) { return reordered(v, {0, 1, tokens ? 2 : -1}); };
  const auto states = [&](const Tensor& m) {
    return m.dim() == (tokens ? 4 : 3) ? reordered(view(m), {0, 1, 2, tokens ? 3 : -1})
                                       : reordered(view(m), {0, -1, 1, tokens ? 2 : -1});
  };
  ScanUpdate params{.dims = {b, d, n, t, groups_B, groups_C, complex, delta_softplus},
                    .state = view(state),
                    .u = channels(view(u)),
                    .delta = channels(view(delta)),
                    .z = channels(view(z)),
                    .y = channels(view(y)),
                    .A = view(A),
                    .B = states(B),
                    .C = states(C),
                    .D = view(D),
                    .delta_bias = view(delta_bias),
                    .rows = nullptr};
  update(check, params, u, state, state_indices, [&] {
    by_arithmetic(wider(state, type), [&]<class R>() {
      const Kernels<R>& k = cpu().kernels<R>();
      for_updates((d + kUpdateRows - 1) / kUpdateRows, b * t * kUpdateRows * n,
                  k.selective_state_update_scratch(params), [&](int64_t begin, int64_t end, void* memory) {
                    k.selective_state_update(params, begin, end, memory);
                  });
    });
  });
  return y;
}

Tensor ssd_state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, OptTensor D,
                        OptTensor z, OptTensor dt_bias, OptTensor state_indices, bool dt_softplus,
                        double dt_min, double dt_max, bool A_is_log) {
  const Checker check("ssd_state_update", x);
  const ScalarType type = check.float_type("x", x);
  const bool tokens = has_tokens(check, "x", x, 3, "(b, h, p) or (b, t, h, p)");
  const int64_t b = x.size(0), t = tokens ? x.size(1) : 1, h = x.size(tokens ? 2 : 1),
                p = x.size(tokens ? 3 : 2);
  tokens ? check.all("dt", dt, "(b, t, h)", {b, t, h}, {type})
         : check.all("dt", dt, "(b, h)", {b, h}, {type});
  if (z)
    tokens ? check.all("z", *z, "(b, t, h, p)", {b, t, h, p}, {type})
           : check.all("z", *z, "(b, h, p)", {b, h, p}, {type});
  check.all("A", A, "(h)", {h}, {ScalarType::Float, type});
  check.float_type("state", state);
  check.shape("state", state, state_indices ? "(s, h, p, n)" : "(b, h, p, n)",
              {state_indices ? -1 : b, h, p, -1});
  const int64_t n = state.size(3);
  const auto groups = [&](const char* name, const Tensor& m) {
    tokens ? check.all(name, m, "(b, t, g, n)", {b, t, -1, n}, {type})
           : check.all(name, m, "(b, g, n)", {b, -1, n}, {type});
    return groups_of(check, name, m, tokens ? 2 : 1, "h", h);
  };
  const int64_t groups_B = groups("B", B), groups_C = groups("C", C);
  if (D && D->dim() == 2)
    check.all("D", *D, "(h, p)", {h, p}, {ScalarType::Float, type});
  else if (D)
    check.all("D", *D, "(h)", {h}, {ScalarType::Float, type});
  if (dt_bias) check.all("dt_bias", *dt_bias, "(h)", {h}, {ScalarType::Float, type});
  check.step_limits(dt_min, dt_max);
  check_row_size(check, n, wider(state, type), 1);
  check_rows(check, state, b, state_indices);
  Tensor y = torch::stable::empty_like(x);
  const auto with_tokens = [&](const View& v) { return tokens ? v : reordered(v, {0, -1, 1, 2}); };
  SsdUpdate params{.dims = {b, h, p, n, t, groups_B, groups_C, dt_softplus, dt_min, dt_max, A_is_log},
                   .state = view(state),
                   .x = with_tokens(view(x)),
                   .z = with_tokens(view(z)),
                   .y = with_tokens(view(y)),
                   .dt = with_tokens(view(dt)),
                   .A = view(A),
                   .dt_bias = view(dt_bias),
                   .B = with_tokens(view(B)),
                   .C = with_tokens(view(C)),
                   .D = D ? reordered(view(*D), {0, D->dim() == 2 ? 1 : -1}) : View{},
                   .rows = nullptr};
  update(check, params, x, state, state_indices, [&] {
    by_arithmetic(wider(state, type), [&]<class R>() {
      const Kernels<R>& k = cpu().kernels<R>();
      for_updates(h * ((p + kUpdateRows - 1) / kUpdateRows), b * t * std::min(p, kUpdateRows) * n,
                  k.ssd_state_update_scratch(params), [&](int64_t begin, int64_t end, void* memory) {
                    k.ssd_state_update(params, begin, end, memory);
                  });
    });
  });
  return y;
}

}  // namespace mamba_ops

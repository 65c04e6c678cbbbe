// All of a Mamba-1 layer behind its input projection:
//
//   x, z = xz;  u = silu(conv(x));  dt, B, C = x_proj(u);  delta = delta_proj(dt)
//   out = out_proj(selective_scan(u, norm(delta), A, norm(B), norm(C), D, z, delta_bias))
//
// Sizes: d channels, rank r of the steps, width n of B and C (2 n where A is complex: real and imaginary
// parts in turns). Whatever has tokens lies in memory as xz does, columns of a token or tokens of a column
// side by side, and is handled as (b, l, columns). The backward gets the arguments alone and computes what
// lies before and in the scan again; gradients are written into their halves of xz's and columns of x_proj's.
#include "ops/ops.h"
#include "ops/parts.h"
#include "ops/tensors.h"

namespace mamba_ops {

namespace {

constexpr const char* kName = "mamba_inner";

struct Arguments {
  Tensor xz, conv1d_weight;
  OptTensor conv1d_bias;
  Tensor x_proj_weight, delta_proj_weight, out_proj_weight;
  OptTensor out_proj_bias;
  Tensor A;
  OptTensor B, C, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight;
  OptTensor conv_state, initial_state, seq_idx, cu_seqlens;
  bool delta_softplus;
  double rms_eps;
};

// B or C: given, or columns of the projection with a bias and a norm.
struct Factor {
  const char *name, *rms_name;
  OptTensor given, bias, rms_weight;
  int64_t column;

  Tensor of(const Tensor& projected, int64_t width) const { return columns(projected, column, width); }
};

// What lies between xz and the scan.
struct Inside {
  Tensor u, conv_state, projected;
  Tensor delta;    // before its norm
  OptTensor B, C;  // likewise, where projected
  parts::ScanInputs scan;
};

struct Layer {
  explicit Layer(const Arguments& arguments) : a(arguments), check(kName, a.xz) {
    type = check.float_type("xz", a.xz);
    check.shape("xz", a.xz, "(b, 2 d, l)", {-1, -1, -1});
    check.device("A", a.A);
    check.shape("A", a.A, "(d, n)", {-1, -1});
    check.that(a.A.size(1) >= 1, [&] { return "A must be (d, n) with n >= 1, got " + shape_of(a.A); });
    b = a.xz.size(0), l = a.xz.size(2), d = a.A.size(0);
    complex = a.A.scalar_type() == ScalarType::ComplexFloat || a.A.scalar_type() == ScalarType::ComplexDouble;
    width = a.A.size(1) * (complex ? 2 : 1);
    token_last = a.xz.stride(1) > a.xz.stride(2);
    check.shape("xz", a.xz, "(b, 2 d, l)", {-1, 2 * d, -1});
    check.all("delta_proj_weight", a.delta_proj_weight, "(d, r)", {d, -1}, {type});
    check.all("x_proj_weight", a.x_proj_weight, "(r + 2 n, d)", {-1, d}, {type});
    check.all("out_proj_weight", a.out_proj_weight, "(m, d)", {-1, d}, {type});
    r = a.delta_proj_weight.size(1), projected_columns = a.x_proj_weight.size(0);
    m = a.out_proj_weight.size(0);
    if (a.out_proj_bias) check.all("out_proj_bias", *a.out_proj_bias, "(m)", {m}, {ScalarType::Float, type});
    const int64_t factors = !a.B + !a.C, rows = (projected_columns - r) / width;
    check.that(projected_columns == r + rows * width && factors <= rows && rows <= 2, [&] {
      return "x_proj_weight must have r + 2 n = " + std::to_string(r + 2 * width) + " rows, got " +
             std::to_string(projected_columns);
    });
    B = {"B", "b_rms_weight", a.B, a.B_proj_bias, a.b_rms_weight, r};
    C = {"C", "c_rms_weight", a.C, a.C_proj_bias, a.c_rms_weight, projected_columns - width};
    unwritten = rows > factors;
    for (const Factor* f : {&B, &C}) {
      if (f->bias)
        check.all((std::string(f->name) + "_proj_bias").c_str(), *f->bias, "(n)", {width},
                  {ScalarType::Float, type});
      if (f->rms_weight) check.all(f->rms_name, *f->rms_weight, "(n)", {width}, {ScalarType::Float, type});
      check.that(!f->given || (!f->bias && !f->rms_weight), [&] {
        return std::string("the bias and norm of ") + f->name + " need it projected, got " + f->name + " too";
      });
      check.that(!complex || !f->rms_weight,
                 [&] { return std::string(f->rms_name) + " needs a real A, got a complex one"; });
    }
    if (a.dt_rms_weight) check.all("dt_rms_weight", *a.dt_rms_weight, "(d)", {d}, {ScalarType::Float, type});
    check.all("conv1d_weight", a.conv1d_weight, "(d, w)", {d, -1}, {ScalarType::Float, type});
    check_conv_state(check, a.conv_state, check_sequences(check, b, l, a.seq_idx, a.cu_seqlens),
                     a.conv1d_weight);
  }

  Tensor tokens(int64_t width) const { return empty_tokens(b, l, width, token_last, a.xz); }
  // x or z (b, d, l), or its gradient.
  Tensor half(const Tensor& xz, int64_t which) const {
    return view_of(xz, {b, d, l}, {xz.stride(0), xz.stride(1), xz.stride(2)}, which * d * xz.stride(1));
  }

  parts::ConvInputs convolution() const {
    return {.x = half(a.xz, 0),
            .weight = a.conv1d_weight,
            .bias = a.conv1d_bias,
            .initial_state = a.conv_state,
            .seq_idx = a.seq_idx,
            .cu_seqlens = a.cu_seqlens,
            .silu = true};
  }
  parts::NormInputs norm(const Tensor& x, const Tensor& weight) const {
    return {.x = x,
            .weight = weight,
            .z = {},
            .eps = a.rms_eps,
            .group_size = x.size(2),
            .norm_before_gate = false};
  }
  Tensor normed(const Tensor& x, const OptTensor& weight) const {
    return weight ? parts::rms_norm_gated_fwd(norm(x, *weight), tokens(x.size(2))) : x;
  }

  // (b, l, n) as the scan takes it, (b, 1, n, l), and back.
  Tensor matrix(const Tensor& t) const {
    return view_of(t, {b, 1, t.size(2), l}, {t.stride(0), t.stride(0), t.stride(2), t.stride(1)});
  }
  Tensor columns_of(const Tensor& matrix) const {
    return view_of(matrix, {b, l, matrix.size(2)}, {matrix.stride(0), matrix.stride(3), matrix.stride(2)});
  }
  Tensor complex_matrix() const { return matrix(empty({b, l, width / 2}, a.A.scalar_type(), a.xz)); }
  // Copies between (b, l, 2 n) and a complex matrix.
  void to_complex(Tensor matrix, const Tensor& t) const {
    Tensor parts = call("aten::view_as_real", "", columns_of(matrix));
    torch::stable::copy_(parts, split_columns(t, width / 2, 2));
  }
  void from_complex(const Tensor& t, const Tensor& matrix) const {
    Tensor parts = split_columns(t, width / 2, 2);
    torch::stable::copy_(parts, call("aten::view_as_real", "", columns_of(matrix)));
  }

  OptTensor project(const Factor& f, const Tensor& projected) const {
    if (f.given) return std::nullopt;
    const Tensor part = f.of(projected, width);
    if (!f.bias) return part;
    return torch::stable::subtract(part, as_type(*f.bias, type), -1);  // torch::stable has no sum of two
  }
  Tensor scan_argument(const Factor& f, const OptTensor& projected) const {
    if (f.given) return *f.given;
    if (!complex) return matrix(normed(*projected, f.rms_weight));
    Tensor out = complex_matrix();
    to_complex(out, *projected);
    return out;
  }
  // Where the scan writes the gradient of its argument: right into the projection's, if that is all.
  OptTensor scan_gradient(const Factor& f, const Tensor& dprojected) const {
    if (f.given) return std::nullopt;
    if (complex) return complex_matrix();
    return matrix(f.rms_weight ? tokens(width) : f.of(dprojected, width));
  }
  // From there into dprojected; the gradients of the bias and the norm's weight.
  std::pair<OptTensor, OptTensor> finish(const Factor& f, const Tensor& dmatrix, const OptTensor& projected,
                                         const Tensor& dprojected) const {
    OptTensor dbias, dweight;
    if (f.given) return {};
    const Tensor to = f.of(dprojected, width);
    if (complex) from_complex(to, dmatrix);
    if (f.rms_weight)
      dweight =
          parts::rms_norm_gated_bwd(norm(*projected, *f.rms_weight), columns_of(dmatrix), {.x = to}).weight;
    if (f.bias) dbias = bias_grad(to, f.bias->scalar_type());
    return {dbias, dweight};
  }

  Inside inside(bool return_final_state) const {
    const Tensor u = tokens(d), projected = tokens(projected_columns), delta = tokens(d);
    const auto [_, conv_state] = parts::causal_conv1d_fwd(convolution(), return_final_state, transposed(u));
    linear(projected, u, a.x_proj_weight, std::nullopt);
    linear(delta, columns(projected, 0, r), a.delta_proj_weight, std::nullopt);
    const OptTensor B_projected = project(B, projected), C_projected = project(C, projected);
    return {.u = u,
            .conv_state = conv_state,
            .projected = projected,
            .delta = delta,
            .B = B_projected,
            .C = C_projected,
            .scan = {.u = transposed(u),
                     .delta = transposed(normed(delta, a.dt_rms_weight)),
                     .A = a.A,
                     .B = scan_argument(B, B_projected),
                     .C = scan_argument(C, C_projected),
                     .D = a.D,
                     .z = half(a.xz, 1),
                     .delta_bias = a.delta_bias,
                     .initial_state = a.initial_state,
                     .seq_idx = a.seq_idx,
                     .cu_seqlens = a.cu_seqlens,
                     .softplus = a.delta_softplus}};
  }

  const Arguments& a;
  const Checker check;
  ScalarType type;
  bool complex, token_last, unwritten;
  int64_t b, l, d, width, r, m, projected_columns;
  Factor B, C;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mamba_inner_fwd(
    Tensor xz, Tensor conv1d_weight, OptTensor conv1d_bias, Tensor x_proj_weight, Tensor delta_proj_weight,
    Tensor out_proj_weight, OptTensor out_proj_bias, Tensor A, OptTensor B, OptTensor C, OptTensor D,
    OptTensor delta_bias, OptTensor B_proj_bias, OptTensor C_proj_bias, OptTensor b_rms_weight,
    OptTensor c_rms_weight, OptTensor dt_rms_weight, OptTensor conv_state, OptTensor initial_state,
    OptTensor seq_idx, OptTensor cu_seqlens, bool delta_softplus, double rms_eps, bool return_final_states) {
  const Arguments a{xz,
                    conv1d_weight,
                    conv1d_bias,
                    x_proj_weight,
                    delta_proj_weight,
                    out_proj_weight,
                    out_proj_bias,
                    A,
                    B,
                    C,
                    D,
                    delta_bias,
                    B_proj_bias,
                    C_proj_bias,
                    b_rms_weight,
                    c_rms_weight,
                    dt_rms_weight,
                    conv_state,
                    initial_state,
                    seq_idx,
                    cu_seqlens,
                    delta_softplus,
                    rms_eps};
  const Layer layer(a);
  const Inside inside = layer.inside(return_final_states);
  const Tensor y = layer.tokens(layer.d);
  const auto [_, state, checkpoints] =
      parts::selective_scan_fwd(inside.scan, return_final_states, false, transposed(y));
  Tensor out = empty({layer.b, layer.l, layer.m}, layer.type, xz);
  linear(out, y, out_proj_weight, out_proj_bias);
  return {out, inside.conv_state, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
mamba_inner_bwd(OptTensor dout, OptTensor dconv_state, OptTensor dfinal_state, Tensor xz,
                Tensor conv1d_weight, OptTensor conv1d_bias, Tensor x_proj_weight, Tensor delta_proj_weight,
                Tensor out_proj_weight, OptTensor out_proj_bias, Tensor A, OptTensor B, OptTensor C,
                OptTensor D, OptTensor delta_bias, OptTensor B_proj_bias, OptTensor C_proj_bias,
                OptTensor b_rms_weight, OptTensor c_rms_weight, OptTensor dt_rms_weight, OptTensor conv_state,
                OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens, bool delta_softplus,
                double rms_eps, bool x_proj_grad, bool delta_proj_grad, bool out_proj_grad,
                bool out_proj_bias_grad) {
  const Arguments a{xz,
                    conv1d_weight,
                    conv1d_bias,
                    x_proj_weight,
                    delta_proj_weight,
                    out_proj_weight,
                    out_proj_bias,
                    A,
                    B,
                    C,
                    D,
                    delta_bias,
                    B_proj_bias,
                    C_proj_bias,
                    b_rms_weight,
                    c_rms_weight,
                    dt_rms_weight,
                    conv_state,
                    initial_state,
                    seq_idx,
                    cu_seqlens,
                    delta_softplus,
                    rms_eps};
  const Layer layer(a);
  const int64_t b = layer.b, l = layer.l, d = layer.d, r = layer.r;
  if (dout)
    layer.check.all("dout", *dout, "(b, l, m)", {b, l, layer.m}, {layer.type});
  else
    dout = torch::stable::new_zeros(xz, {b, l, layer.m});
  const Inside inside = layer.inside(false);
  const Tensor dxz = transposed(layer.tokens(2 * d)), ddelta = layer.tokens(d);
  Tensor dprojected = layer.tokens(layer.projected_columns);
  if (layer.unwritten) torch::stable::zero_(dprojected);
  OptTensor dx_proj, ddelta_proj, dout_proj, dout_proj_bias, ddt_rms;

  const Tensor y = layer.tokens(d), dy = layer.tokens(d);
  const auto [_, state, checkpoints] = parts::selective_scan_fwd(inside.scan, false, true, transposed(y));
  if (out_proj_grad) dout_proj = weight_grad(*dout, y);
  if (out_proj_bias && out_proj_bias_grad) dout_proj_bias = bias_grad(*dout, out_proj_bias->scalar_type());
  multiply(dy, *dout, out_proj_weight);
  const Tensor& du = y;  // in its memory: nothing reads y any more
  const auto scan_grads = parts::selective_scan_bwd(inside.scan, transposed(dy), dfinal_state, checkpoints,
                                                    {.u = transposed(du),
                                                     .delta = transposed(ddelta),
                                                     .B = layer.scan_gradient(layer.B, dprojected),
                                                     .C = layer.scan_gradient(layer.C, dprojected),
                                                     .z = layer.half(dxz, 1)});

  Tensor dsteps = ddelta;
  if (dt_rms_weight) {
    dsteps = layer.tokens(d);
    ddt_rms =
        parts::rms_norm_gated_bwd(layer.norm(inside.delta, *dt_rms_weight), ddelta, {.x = dsteps}).weight;
  }
  if (delta_proj_grad) ddelta_proj = weight_grad(dsteps, columns(inside.projected, 0, r));
  multiply(columns(dprojected, 0, r), dsteps, delta_proj_weight);
  const auto [dB_bias, db_rms] = layer.finish(layer.B, *scan_grads.B, inside.B, dprojected);
  const auto [dC_bias, dc_rms] = layer.finish(layer.C, *scan_grads.C, inside.C, dprojected);
  if (x_proj_grad) dx_proj = weight_grad(dprojected, inside.u);
  multiply(du, dprojected, x_proj_weight, true);
  const auto conv_grads =
      parts::causal_conv1d_bwd(layer.convolution(), transposed(du), dconv_state, {.x = layer.half(dxz, 0)});

  const auto kept = [&](const OptTensor& grad) { return parts::or_none(grad, xz); };
  return {dxz,
          *conv_grads.weight,
          kept(conv_grads.bias),
          kept(dx_proj),
          kept(ddelta_proj),
          kept(dout_proj),
          kept(dout_proj_bias),
          *scan_grads.A,
          B ? *scan_grads.B : none(xz),
          C ? *scan_grads.C : none(xz),
          kept(scan_grads.D),
          kept(scan_grads.delta_bias),
          kept(dB_bias),
          kept(dC_bias),
          kept(db_rms),
          kept(dc_rms),
          kept(ddt_rms),
          kept(conv_grads.initial_state),
          kept(scan_grads.initial_state)};
}

}  // namespace mamba_ops

// All of a Mamba-2 layer behind its input projection:
//
//   z0, x0, z, xBC, dt = zxbcdt;  x, B, C = act(conv(xBC));  y = ssd(x, dt, A, B, C, D)
//   out = outproj([silu(z0) x0, norm(y silu(z))])
//
// Sizes: h heads of p channels, d = h p; the convolution has d + 2 g n channels, z0 and x0 have k. The
// backward gets the arguments alone and computes convolution, scan and norm again; every gradient of zxbcdt's
// columns is written into those columns.
#include "ops/ops.h"
#include "ops/parts.h"
#include "ops/tensors.h"

namespace mamba_ops {

namespace {

constexpr const char* kName = "mamba_split_conv1d_scan";

struct Arguments {
  Tensor zxbcdt, conv1d_weight;
  OptTensor conv1d_bias, dt_bias;
  Tensor A;
  OptTensor D, rmsnorm_weight, outproj_weight, outproj_bias, conv_state, initial_state, seq_idx, cu_seqlens;
  int64_t headdim, ngroups;
  bool silu;
  double dt_min, dt_max, rmsnorm_eps;
  bool norm_before_gate;
  std::optional<int64_t> chunk_size;
  bool tf32, mask_negative;
};

// The columns of zxbcdt, or of its gradient.
struct Columns {
  Tensor z0, x0, z, xBC, dt;
};

struct Layer {
  explicit Layer(const Arguments& arguments) : a(arguments), check(kName, a.zxbcdt) {
    type = check.float_type("zxbcdt", a.zxbcdt);
    check.shape("zxbcdt", a.zxbcdt, "(b, l, 2 k + 2 d + 2 g n + h)", {-1, -1, -1});
    check.device("A", a.A);
    check.shape("A", a.A, "(h)", {-1});
    check.device("conv1d_weight", a.conv1d_weight);
    check.shape("conv1d_weight", a.conv1d_weight, "(d + 2 g n, w)", {-1, -1});
    b = a.zxbcdt.size(0), l = a.zxbcdt.size(1), h = a.A.size(0), conv = a.conv1d_weight.size(0);
    const auto text = [](int64_t value) { return std::to_string(value); };
    check.that(a.headdim >= 1 && a.ngroups >= 1 && h % a.ngroups == 0, [&] {
      return "headdim must be positive and ngroups divide h = " + text(h) + ", got " + text(a.headdim) +
             " and " + text(a.ngroups);
    });
    d = h * a.headdim;
    check.that(conv > d && (conv - d) % (2 * a.ngroups) == 0, [&] {
      return "conv1d_weight must have d + 2 g n rows with d = " + text(d) + " and g = " + text(a.ngroups) +
             ", got " + text(conv);
    });
    const int64_t width = a.zxbcdt.size(2), rest = width - d - conv - h;
    check.that(rest >= 0 && rest % 2 == 0, [&] {
      return "zxbcdt must have 2 k + 2 d + 2 g n + h = 2 k + " + text(d + conv + h) + " columns, got " +
             text(width);
    });
    k = rest / 2;
    if (a.rmsnorm_weight)
      check.all("rmsnorm_weight", *a.rmsnorm_weight, "(d)", {d}, {ScalarType::Float, type});
    if (a.outproj_weight) check.all("outproj_weight", *a.outproj_weight, "(m, k + d)", {-1, k + d}, {type});
    m = a.outproj_weight ? a.outproj_weight->size(0) : k + d;
    if (a.outproj_bias) {
      check.that(a.outproj_weight.has_value(), "outproj_bias needs outproj_weight");
      check.all("outproj_bias", *a.outproj_bias, "(m)", {m}, {ScalarType::Float, type});
    }
    check_conv_state(check, a.conv_state, check_sequences(check, b, l, a.seq_idx, a.cu_seqlens),
                     a.conv1d_weight);
  }

  Tensor tokens(int64_t width) const { return empty({b, l, width}, type, a.zxbcdt); }
  Tensor by_heads(const Tensor& t) const { return split_columns(t, h, a.headdim); }
  Columns split(const Tensor& t) const {
    return {.z0 = columns(t, 0, k),
            .x0 = columns(t, k, k),
            .z = columns(t, 2 * k, d),
            .xBC = columns(t, 2 * k + d, conv),
            .dt = columns(t, 2 * k + d + conv, h)};
  }

  parts::ConvInputs convolution() const {
    return {.x = transposed(split(a.zxbcdt).xBC),
            .weight = a.conv1d_weight,
            .bias = a.conv1d_bias,
            .initial_state = a.conv_state,
            .seq_idx = a.seq_idx,
            .cu_seqlens = a.cu_seqlens,
            .silu = a.silu};
  }
  // x, B and C (b, l, conv), and the convolution's state.
  std::tuple<Tensor, Tensor> convolve(bool return_final_state) const {
    Tensor xBC = tokens(conv);
    Tensor state = std::get<1>(parts::causal_conv1d_fwd(convolution(), return_final_state, transposed(xBC)));
    mask(xBC);
    return {xBC, state};
  }
  // Zeros where a token is padding.
  void mask(const Tensor& t) const {
    if (!a.mask_negative || !a.seq_idx) return;
    const Tensor negative = call("aten::signbit", "", *a.seq_idx);
    const Tensor padding = view_of(negative, {b, l, 1}, {negative.stride(0), negative.stride(1), 0});
    call("aten::where", "self_out", padding, torch::stable::new_zeros(t, {}), t, t);
  }

  // x (b, l, h, p), B and C (b, l, g, n) in the columns that the convolution gives, or their gradients.
  std::tuple<Tensor, Tensor, Tensor> factors(const Tensor& xBC) const {
    const int64_t each = (conv - d) / 2;
    const int64_t n = each / a.ngroups;
    return {by_heads(columns(xBC, 0, d)), split_columns(columns(xBC, d, each), a.ngroups, n),
            split_columns(columns(xBC, d + each, each), a.ngroups, n)};
  }
  parts::SsdInputs scan(const Tensor& xBC) const {
    const auto [x, B, C] = factors(xBC);
    const Columns in = split(a.zxbcdt);
    return {.x = x,
            .dt = in.dt,
            .A = a.A,
            .B = B,
            .C = C,
            .D = a.D,
            .z = a.rmsnorm_weight ? OptTensor() : by_heads(in.z),
            .dt_bias = a.dt_bias,
            .initial_state = a.initial_state,
            .seq_idx = a.seq_idx,
            .cu_seqlens = a.cu_seqlens,
            .softplus = true,
            .dt_min = a.dt_min,
            .dt_max = a.dt_max,
            .chunk_size = a.chunk_size,
            .tf32 = a.tf32};
  }

  parts::NormInputs norm(const Tensor& y) const {
    return {.x = y,
            .weight = *a.rmsnorm_weight,
            .z = split(a.zxbcdt).z,
            .eps = a.rmsnorm_eps,
            .group_size = d / a.ngroups,
            .norm_before_gate = a.norm_before_gate};
  }

  // silu(z0) x0
  void gated_mlp(const Tensor& to) const {
    const Columns in = split(a.zxbcdt);
    call("aten::silu", "out", in.z0, to);
    call("aten::mul", "out", to, in.x0, to);
  }
  void gated_mlp_grads(const Tensor& dout, const Columns& grads) const {
    const Columns in = split(a.zxbcdt);
    const Tensor part = tokens(k);
    call("aten::mul", "out", dout, in.x0, part);
    call("aten::silu_backward", "grad_input", part, in.z0, grads.z0);
    call("aten::silu", "out", in.z0, part);
    call("aten::mul", "out", dout, part, grads.x0);
  }

  const Arguments& a;
  const Checker check;
  ScalarType type;
  int64_t b, l, h, d, conv, k, m;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mamba_split_conv1d_scan_fwd(
    Tensor zxbcdt, Tensor conv1d_weight, OptTensor conv1d_bias, OptTensor dt_bias, Tensor A, OptTensor D,
    OptTensor rmsnorm_weight, OptTensor outproj_weight, OptTensor outproj_bias, OptTensor conv_state,
    OptTensor initial_state, OptTensor seq_idx, OptTensor cu_seqlens, int64_t headdim, int64_t ngroups,
    bool silu, double dt_min, double dt_max, double rmsnorm_eps, bool norm_before_gate,
    std::optional<int64_t> chunk_size, bool tf32, bool mask_negative, bool return_final_states) {
  const Arguments a{zxbcdt,
                    conv1d_weight,
                    conv1d_bias,
                    dt_bias,
                    A,
                    D,
                    rmsnorm_weight,
                    outproj_weight,
                    outproj_bias,
                    conv_state,
                    initial_state,
                    seq_idx,
                    cu_seqlens,
                    headdim,
                    ngroups,
                    silu,
                    dt_min,
                    dt_max,
                    rmsnorm_eps,
                    norm_before_gate,
                    chunk_size,
                    tf32,
                    mask_negative};
  const Layer layer(a);
  const auto [xBC, conv_end] = layer.convolve(return_final_states);
  Tensor inner = layer.tokens(layer.k + layer.d);
  const Tensor gated = columns(inner, layer.k, layer.d), y = rmsnorm_weight ? layer.tokens(layer.d) : gated;
  const auto [_, state] = parts::ssd_fwd(layer.scan(xBC), return_final_states, layer.by_heads(y));
  if (rmsnorm_weight) parts::rms_norm_gated_fwd(layer.norm(y), gated);
  if (layer.k > 0) layer.gated_mlp(columns(inner, 0, layer.k));
  if (!outproj_weight) return {inner, conv_end, state};
  Tensor out = layer.tokens(layer.m);
  linear(out, inner, *outproj_weight, outproj_bias);
  return {out, conv_end, state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
mamba_split_conv1d_scan_bwd(OptTensor dout, OptTensor dconv_state, OptTensor dfinal_state, Tensor zxbcdt,
                            Tensor conv1d_weight, OptTensor conv1d_bias, OptTensor dt_bias, Tensor A,
                            OptTensor D, OptTensor rmsnorm_weight, OptTensor outproj_weight,
                            OptTensor outproj_bias, OptTensor conv_state, OptTensor initial_state,
                            OptTensor seq_idx, OptTensor cu_seqlens, int64_t headdim, int64_t ngroups,
                            bool silu, double dt_min, double dt_max, double rmsnorm_eps,
                            bool norm_before_gate, std::optional<int64_t> chunk_size, bool tf32,
                            bool mask_negative, bool outproj_weight_grad, bool outproj_bias_grad) {
  const Arguments a{zxbcdt,
                    conv1d_weight,
                    conv1d_bias,
                    dt_bias,
                    A,
                    D,
                    rmsnorm_weight,
                    outproj_weight,
                    outproj_bias,
                    conv_state,
                    initial_state,
                    seq_idx,
                    cu_seqlens,
                    headdim,
                    ngroups,
                    silu,
                    dt_min,
                    dt_max,
                    rmsnorm_eps,
                    norm_before_gate,
                    chunk_size,
                    tf32,
                    mask_negative};
  const Layer layer(a);
  const int64_t b = layer.b, l = layer.l, d = layer.d, k = layer.k, m = layer.m;
  if (dout)
    layer.check.all("dout", *dout, "(b, l, m)", {b, l, m}, {layer.type});
  else
    dout = torch::stable::new_zeros(zxbcdt, {b, l, m});
  Tensor dzxbcdt = layer.tokens(zxbcdt.size(2));
  const Columns grads = layer.split(dzxbcdt);

  Tensor dy = *dout;
  if (outproj_weight) {
    dy = layer.tokens(k + d);
    multiply(dy, *dout, *outproj_weight);
  }
  if (k > 0) {
    layer.gated_mlp_grads(columns(dy, 0, k), grads);
    dy = columns(dy, k, d);
  }
  const Tensor xBC = std::get<0>(layer.convolve(false));
  const parts::SsdInputs scan = layer.scan(xBC);
  const bool weight = outproj_weight && outproj_weight_grad;
  OptTensor drmsnorm_weight, doutproj_weight, doutproj_bias;
  if (rmsnorm_weight || weight) {
    const OptTensor inner =
        weight ? OptTensor(layer.tokens(k + d)) : std::nullopt;  // as the projection got it
    const OptTensor gated = weight ? OptTensor(columns(*inner, k, d)) : std::nullopt;
    const Tensor y = rmsnorm_weight ? layer.tokens(d) : *gated;
    parts::ssd_fwd(scan, false, layer.by_heads(y));
    if (rmsnorm_weight) {
      const auto norm_grads = parts::rms_norm_gated_bwd(layer.norm(y), dy, {.z = grads.z}, gated);
      drmsnorm_weight = norm_grads.weight;
      dy = *norm_grads.x;
    }
    if (weight && k > 0) layer.gated_mlp(columns(*inner, 0, k));
    if (weight) doutproj_weight = weight_grad(*dout, *inner);
  }
  if (outproj_bias && outproj_bias_grad) doutproj_bias = bias_grad(*dout, outproj_bias->scalar_type());

  const Tensor dxBC = layer.tokens(layer.conv);
  const auto [dx, dB, dC] = layer.factors(dxBC);
  const auto scan_grads = parts::ssd_bwd(
      scan, layer.by_heads(dy), dfinal_state,
      {.x = dx, .dt = grads.dt, .B = dB, .C = dC, .z = scan.z ? layer.by_heads(grads.z) : OptTensor()});
  layer.mask(dxBC);
  const auto conv_grads = parts::causal_conv1d_bwd(layer.convolution(), transposed(dxBC), dconv_state,
                                                   {.x = transposed(grads.xBC)});
  const auto kept = [&](const OptTensor& grad) { return parts::or_none(grad, zxbcdt); };
  return {dzxbcdt,
          *conv_grads.weight,
          kept(conv_grads.bias),
          kept(scan_grads.dt_bias),
          *scan_grads.A,
          kept(scan_grads.D),
          kept(drmsnorm_weight),
          kept(doutproj_weight),
          kept(doutproj_bias),
          kept(conv_grads.initial_state),
          kept(scan_grads.initial_state)};
}

}  // namespace mamba_ops

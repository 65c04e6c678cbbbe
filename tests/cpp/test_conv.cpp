// causal_conv1d of every instruction set against a double loop over its formula.
#include "tensor.h"

namespace mamba_ops {

namespace {

struct Case {
  int64_t b, d, l;
  int w;
  bool silu, options;  // options: bias, initial and final states
  std::vector<int32_t> cu_seqlens;
  int layout;  // 0 (b, d, l); 1 channels last; 2 with holes

  std::vector<Run> runs() const {
    return cu_seqlens.empty() ? runs_of_rows(b, l)
                              : runs_of_cu_seqlens(cu_seqlens.data(), 1, int64_t(cu_seqlens.size()) - 1);
  }
  int64_t rows() const { return int64_t(runs().size()); }
};

struct Args {
  Values x, weight, bias, init, dy, dfinal;
};

struct Result {
  Values y, final_state;
};

// c_t = bias + sum_k W_k x~_{t+k}, x~ = [init, sequence]; y = silu(c) or c; final: the last w - 1 of x~
Result reference(const Case& c, const Args& args) {
  Result out{Values(args.x.size()), Values(args.dfinal.size())};
  for (const Run& run : c.runs())
    for (int64_t i = 0; i < c.d; ++i) {
      const auto input = [&](int64_t t) {  // t < run.begin: the initial state
        if (t >= run.begin) return args.x[(run.row * c.d + i) * c.l + t];
        return args.init.empty() ? 0
                                 : args.init[(run.state_in * c.d + i) * (c.w - 1) + t - run.begin + c.w - 1];
      };
      for (int64_t t = run.begin; t < run.end; ++t) {
        double sum = args.bias.empty() ? 0 : args.bias[i];
        for (int k = 0; k < c.w; ++k) sum += args.weight[i * c.w + k] * input(t - (c.w - 1) + k);
        out.y[(run.row * c.d + i) * c.l + t] = c.silu ? sum / (1 + std::exp(-sum)) : sum;
      }
      for (int k = 0; k < c.w - 1 && c.options; ++k)
        out.final_state[(run.state_out * c.d + i) * (c.w - 1) + k] = input(run.end - (c.w - 1) + k);
    }
  return out;
}

double loss(const Case& c, const Args& args) {
  const Result out = reference(c, args);
  return dot(out.y, args.dy) + dot(out.final_state, args.dfinal);
}

struct Tensors {
  Tensor x, y, dy, dx, weight, bias, dweight, dbias, init, final_state, dinit, dfinal;
  PieceList pieces;
  Guarded scratch, partial;

  template <class R>
  Tensors(const Case& c, const Args& args, DType dtype, int64_t max_tokens, R)
      : x(tokens(c, dtype)),
        y(tokens(c, dtype)),
        dy(tokens(c, dtype)),
        dx(tokens(c, dtype)),
        weight(dtype, {c.d, c.w}),
        bias(dtype, {c.d}),
        dweight(dtype, {c.d, c.w}),
        dbias(dtype, {c.d}),
        init(states(c, dtype)),
        final_state(states(c, dtype)),
        dinit(states(c, dtype)),
        dfinal(states(c, dtype)),
        pieces(cut(c.runs(), max_tokens, 3)),
        scratch(cpu().kernels<R>().causal_conv1d_scratch()),
        partial(pieces.view().groups * (c.w + 1) * padded(c.d) * int64_t(sizeof(R))) {
    x.set(args.x);
    dy.set(args.dy);
    weight.set(args.weight);
    if (c.options) bias.set(args.bias), init.set(args.init), dfinal.set(args.dfinal);
  }

  static Tensor tokens(const Case& c, DType dtype) {
    return Tensor(dtype, {c.b, c.d, c.l}, c.layout == 1 ? std::vector<int>{0, 2, 1} : std::vector<int>{},
                  c.layout == 2 ? 2 : 1);
  }
  static Tensor states(const Case& c, DType dtype) { return Tensor(dtype, {c.rows(), c.d, c.w - 1}); }

  ConvFwd params(const Case& c, bool forward) const {
    const auto given = [&](const Tensor& t) { return c.options ? t.view() : View{}; };
    return {.dims = {c.b, c.d, c.l, c.w, c.silu},
            .x = x,
            .y = forward ? y.view() : View{},
            .weight = weight,
            .bias = given(bias),
            .initial_state = given(init),
            .final_state = forward ? given(final_state) : View{},
            .pieces = pieces.view()};
  }
  // The arguments as they are stored.
  Args stored(const Case& c) const {
    Args args{x.values(), weight.values(), {}, {}, dy.values(), {}};
    if (c.options) args.bias = bias.values(), args.init = init.values(), args.dfinal = dfinal.values();
    return args;
  }
  bool intact() const {
    for (const Tensor* t :
         {&x, &y, &dy, &dx, &weight, &bias, &dweight, &dbias, &init, &final_state, &dinit, &dfinal})
      if (!t->intact()) return false;
    return scratch.intact() && partial.intact();
  }
};

template <class R>
void check(const Case& c, DType dtype, int64_t max_tokens) {
  Random random(unsigned(c.d * 1000 + c.l));
  Args args{
      random.values(c.b * c.d * c.l), random.values(c.d * c.w), {}, {}, random.values(c.b * c.d * c.l), {}};
  if (c.options) {
    args.bias = random.values(c.d);
    args.init = random.values(c.rows() * c.d * (c.w - 1));
    args.dfinal = random.values(c.rows() * c.d * (c.w - 1));
  }
  Tensors t(c, args, dtype, max_tokens, R());
  args = t.stored(c);
  const Kernels<R>& k = cpu().kernels<R>();
  const ConvFwd fwd = t.params(c, true);
  k.causal_conv1d_fwd(fwd, 0, fwd.units(), t.scratch.data());
  const Result want = reference(c, args);
  CHECK(error(t.y.values(), want.y) < tolerance(dtype));
  if (c.options) CHECK(error(t.final_state.values(), want.final_state) == 0);

  ConvBwd bwd{.fwd = t.params(c, false),
              .dy = t.dy,
              .dx = t.dx,
              .dweight = t.dweight,
              .dbias = {},
              .dfinal = {},
              .dinitial = {},
              .partial = t.partial.data()};
  if (c.options) bwd.dbias = t.dbias, bwd.dfinal = t.dfinal, bwd.dinitial = t.dinit;
  for (int64_t unit = bwd.fwd.units(); unit-- > 0;)
    k.causal_conv1d_bwd(bwd, unit, unit + 1, t.scratch.data());  // in any order
  k.causal_conv1d_reduce(bwd);
  const auto f = [&](const Args& a) { return loss(c, a); };
  const double slope = std::max(tolerance(dtype), 1e-9);
  CHECK(slope_error(args, &Args::x, t.dx.values(), f) < slope);
  CHECK(slope_error(args, &Args::weight, t.dweight.values(), f) < slope);
  if (c.options) {
    CHECK(slope_error(args, &Args::bias, t.dbias.values(), f) < slope);
    CHECK(slope_error(args, &Args::init, t.dinit.values(), f) < slope);
  }
  CHECK(t.intact());
}

const std::vector<Case> kCases = {
    {1, 1, 1, 4, true, true, {}, 0},
    {2, 3, 5, 2, false, true, {}, 0},
    {1, 65, 130, 4, true, true, {}, 0},
    {2, 70, 67, 3, true, true, {}, 1},
    {1, 5, 2, 4, false, false, {}, 1},
    {1, 33, 64, 4, true, false, {}, 2},
    {1, 9, 300, 4, true, true, {0, 0, 1, 3, 63, 66, 130, 131, 299, 300, 300}, 0},
    {1, 17, 140, 3, false, true, {0, 65, 66, 129, 140}, 1},
};

}  // namespace

TEST_CASE("causal_conv1d: forward, gradients, no stray writes") {
  FOR_EVERY_ISA();
  const DType dtype = GENERATE(DType::f64, DType::f32, DType::bf16, DType::f16);
  for (size_t i = 0; i < kCases.size(); ++i)
    for (const int64_t max_tokens : {64, 100, 100000}) {
      CAPTURE(int(dtype), i, max_tokens);
      dtype == DType::f64 ? check<double>(kCases[i], dtype, max_tokens)
                          : check<float>(kCases[i], dtype, max_tokens);
    }
}

TEST_CASE("causal_conv1d: strides beyond 2^31 elements") {
  FOR_EVERY_ISA();
  // Two channels 2^31 + 64 elements apart, in pages that are reserved but, but for a few, never touched.
  const int64_t l = 40, stride = (int64_t(1) << 31) + 64, bytes = (stride + l) * 4;
  const Case c{1, 2, l, 4, true, false, {}, 0};
  Reserved from(bytes), to(bytes);
  REQUIRE(from.data());
  REQUIRE(to.data());
  Random random(1);
  const Args args{random.values(2 * l), random.values(2 * 4), {}, {}, {}, {}};
  Tensor weight(DType::f32, {2, 4});
  weight.set(args.weight);
  float *x = static_cast<float*>(from.data()), *y = static_cast<float*>(to.data());
  for (int64_t t = 0; t < 2 * l; ++t) x[t / l * stride + t % l] = float(args.x[t]);
  const PieceList pieces = cut(c.runs(), 1024, 16);
  ConvFwd p{.dims = {1, 2, l, 4, true},
            .x = {x, DType::f32, {0, stride, 1}},
            .y = {y, DType::f32, {0, stride, 1}},
            .weight = weight,
            .bias = {},
            .initial_state = {},
            .final_state = {},
            .pieces = pieces.view()};
  Guarded scratch(cpu().f32.causal_conv1d_scratch());
  cpu().f32.causal_conv1d_fwd(p, 0, p.units(), scratch.data());
  Values got(2 * l);
  for (int64_t t = 0; t < 2 * l; ++t) got[t] = y[t / l * stride + t % l];
  CHECK(error(got, reference(c, args).y) < tolerance(DType::f32));
}

}  // namespace mamba_ops

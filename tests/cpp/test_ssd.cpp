// The SSD of every instruction set, whole and in segments, against the recurrence written token by token.
#include "tensor.h"

namespace mamba_ops {

namespace {

struct Case {
  int64_t b, l, h, p, n, groups_B, groups_C, q;
  bool softplus, D_per_channel, options;  // options: D, z, bias, limits, initial and final states
  std::vector<int32_t> cu_seqlens;
  std::vector<int> order;  // of x, z, y: the dims from the slowest to the fastest

  double low() const { return options ? 0.05 : -1e30; }
  double high() const { return options ? 0.6 : 1e30; }
  SsdDims dims() const {
    return {.b = b,
            .l = l,
            .h = h,
            .p = p,
            .n = n,
            .groups_B = groups_B,
            .groups_C = groups_C,
            .q = q,
            .heads = 0,
            .softplus = softplus,
            .D_per_channel = D_per_channel,
            .dt_min = low(),
            .dt_max = high()};
  }
  std::vector<Run> runs() const {
    return cu_seqlens.empty() ? runs_of_rows(b, l)
                              : runs_of_cu_seqlens(cu_seqlens.data(), 1, int64_t(cu_seqlens.size()) - 1);
  }
  int64_t states() const { return int64_t(runs().size()) * h * p * n; }
};

struct Args {
  Values x, dt, z, A, B, C, D, bias, init, dy, dfinal;
};

struct Result {
  Values y, final_state;
};

double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

Result reference(const Case& c, const Args& args) {
  Result out{Values(args.x.size()), Values(args.dfinal.size())};
  for (const Run& run : c.runs())
    for (int64_t head = 0; head < c.h; ++head) {
      Values S(c.p * c.n);
      for (int64_t i = 0; i < c.p * c.n && c.options; ++i)
        S[i] = args.init[(run.state_in * c.h + head) * c.p * c.n + i];
      for (int64_t t = run.begin; t < run.end; ++t) {
        const int64_t token = run.row * c.l + t;
        double dt = args.dt[token * c.h + head] + (c.options ? args.bias[head] : 0);
        if (c.softplus) dt = softplus(dt);
        dt = std::clamp(dt, c.low(), c.high());
        const double* B = &args.B[(token * c.groups_B + head / (c.h / c.groups_B)) * c.n];
        const double* C = &args.C[(token * c.groups_C + head / (c.h / c.groups_C)) * c.n];
        for (int64_t i = 0; i < c.p; ++i) {
          const int64_t at = (token * c.h + head) * c.p + i;
          double o = c.options ? args.D[c.D_per_channel ? head * c.p + i : head] * args.x[at] : 0;
          for (int64_t j = 0; j < c.n; ++j) {
            double& s = S[i * c.n + j];
            s = std::exp(dt * args.A[head]) * s + dt * args.x[at] * B[j];
            o += s * C[j];
          }
          out.y[at] = c.options ? o * args.z[at] / (1 + std::exp(-args.z[at])) : o;
        }
      }
      for (int64_t i = 0; i < c.p * c.n && c.options; ++i)
        out.final_state[(run.state_out * c.h + head) * c.p * c.n + i] = S[i];
    }
  return out;
}

double loss(const Case& c, const Args& args) {
  const Result out = reference(c, args);
  return dot(out.y, args.dy) + dot(out.final_state, args.dfinal);
}

Args draw(const Case& c) {
  Random random(unsigned(c.h * 1000 + c.l));
  const int64_t tokens = c.b * c.l, values = tokens * c.h * c.p;
  Args args{.x = random.values(values),
            .dt = random.values(tokens * c.h, 0.01, 0.5),
            .z = {},
            .A = random.values(c.h, -3, -0.05),
            .B = random.values(tokens * c.groups_B * c.n),
            .C = random.values(tokens * c.groups_C * c.n),
            .D = {},
            .bias = {},
            .init = {},
            .dy = random.values(values),
            .dfinal = {}};
  if (c.softplus) args.dt = random.values(tokens * c.h, -4, 1);
  if (c.options) {
    args.z = random.values(values, -3, 3);
    args.D = random.values(c.D_per_channel ? c.h * c.p : c.h);
    args.bias = random.values(c.h, -0.1, 0.1);
    for (int64_t i = 0; i < tokens * c.h; ++i) {  // no step at a limit, where it has no derivative
      const auto at_limit = [&](double limit) {
        return std::fabs(softplus(args.dt[i] + args.bias[i % c.h]) - limit) < 0.01;
      };
      while (at_limit(c.low()) || at_limit(c.high())) args.dt[i] = random.uniform(-4, 1);
    }
    args.init = random.values(c.states());
    args.dfinal = random.values(c.states());
  }
  return args;
}

// Every tensor of a call, in storage type `dtype`; states and parameters in the arithmetic type R.
template <class R>
struct Call {
  static constexpr DType kReal = sizeof(R) == 8 ? DType::f64 : DType::f32;
  const Case& c;
  const Kernels<R>& k = cpu().kernels<R>();
  const SsdKernels& ssd;
  SsdDims dims = c.dims();
  Segments segments{c.runs(), dims};
  std::vector<Tensor> all;
  std::vector<std::unique_ptr<Guarded>> memory;

  Call(const Case& c, const Args& args, DType dtype) : c(c), ssd(dtype == DType::bf16 ? k.ssd_bf16 : k.ssd) {
    const std::vector<int64_t> D = c.D_per_channel ? std::vector{c.h, c.p} : std::vector{c.h};
    for (int copy = 0; copy < 2; ++copy) {  // the arguments, then their gradients
      all.push_back(Tensor(dtype, {c.b, c.l, c.h, c.p}, c.order));
      all.push_back(Tensor(dtype, {c.b, c.l, c.h}));
      all.push_back(Tensor(dtype, {c.b, c.l, c.h, c.p}, c.order));
      all.push_back(Tensor(kReal, {c.h}));
      all.push_back(Tensor(dtype, {c.b, c.l, c.groups_B, c.n}));
      all.push_back(Tensor(dtype, {c.b, c.l, c.groups_C, c.n}, {}, 2));
      all.push_back(Tensor(kReal, D));
      all.push_back(Tensor(kReal, {c.h}));
      all.push_back(Tensor(kReal, {c.states()}));
      all.push_back(Tensor(dtype, {c.b, c.l, c.h, c.p}, c.order));  // dy, y
      all.push_back(Tensor(kReal, {c.states()}));                   // dfinal, final_state
    }
    for (size_t i = 0; i < kMembers.size(); ++i)
      if (!(args.*kMembers[i]).empty()) all[i].set(args.*kMembers[i]);
  }

  static constexpr std::array kMembers = {&Args::x,    &Args::dt, &Args::z,     &Args::A,
                                          &Args::B,    &Args::C,  &Args::D,     &Args::bias,
                                          &Args::init, &Args::dy, &Args::dfinal};
  enum { x, dt, z, A, B, C, D, bias, init, dy, dfinal, kGradients };

  void* fresh(int64_t bytes) {
    memory.push_back(std::make_unique<Guarded>(bytes));
    return memory.back()->data();
  }
  // The views of the arguments, or (from = kGradients) of their gradients.
  SsdFwd params(int from) const {
    SsdFwd p{};
    p.dims = dims;
    p.x = all[from + x], p.dt = all[from + dt], p.A = all[from + A], p.B = all[from + B], p.C = all[from + C];
    if (c.options) p.z = all[from + z], p.D = all[from + D], p.dt_bias = all[from + bias];
    p.pieces = segments.list().view();
    return p;
  }
  void* state(int which) const { return c.options ? all[which].view().data : nullptr; }
  int64_t state_size() const { return c.h * c.p * c.n; }
  R* rows() { return static_cast<R*>(fresh(segments.count() * state_size() * int64_t(sizeof(R)))); }
  void* logs() { return fresh(segments.count() * c.h * int64_t(sizeof(R))); }

  void run(const SsdFwd& p) {
    void* scratch = fresh(ssd.fwd_scratch(dims));
    for (int64_t unit = p.units(); unit-- > 0;) ssd.fwd(p, unit, unit + 1, scratch);  // in any order
  }
  void run(const SsdBwd& p) {
    void* scratch = fresh(ssd.bwd_scratch(dims, p.fwd.pieces));
    for (int64_t unit = p.fwd.units(); unit-- > 0;) ssd.bwd(p, unit, unit + 1, scratch);
  }

  // The states that enter every segment go to p.states_in.
  PieceList join(SsdFwd& p) {
    SsdFwd first = p;
    R *ends = rows(), *entering = rows();
    const PieceList alone = segments.alone(false);
    first.y = first.z = {};
    first.states_in = nullptr;
    first.states_out = ends;
    first.log_decays = logs();
    first.pieces = alone.view();
    run(first);
    PieceList joined = segments.joined(entering, state_size(), p.states_in, false);
    k.ssd_combine(first, entering, ends, false, 0, c.h);
    p.states_in = entering;
    return joined;
  }

  void forward() {
    SsdFwd p = params(0);
    p.y = all[kGradients + dy];
    p.states_in = state(init);
    p.states_out = state(kGradients + dfinal);
    if (!segments.split()) return run(p);
    const PieceList joined = join(p);
    p.pieces = joined.view();
    run(p);
  }

  void backward() {
    const SsdFwd g = params(kGradients);
    SsdBwd p{.fwd = params(0),
             .dy = all[dy],
             .dx = g.x,
             .dz = g.z,
             .ddt = g.dt,
             .dA = g.A,
             .ddt_bias = g.dt_bias,
             .dB = g.B,
             .dC = g.C,
             .dD = g.D,
             .dstates_out = state(dfinal),
             .dstates_in = state(kGradients + init),
             .partial_BC = fresh(dims.head_blocks() * c.b * c.l * 2 * padded(c.n) * int64_t(sizeof(R))),
             .partial_h =
                 fresh(segments.list().view().groups * c.h * (padded(2) + padded(c.p)) * int64_t(sizeof(R)))};
    p.fwd.states_in = state(init);
    if (segments.split()) {
      PieceList joined = join(p.fwd);
      SsdBwd first = p;
      R *ends = rows(), *leaving = rows(), *returned = rows();
      const PieceList alone = segments.alone(true);
      first.dx = {};
      first.dstates_out = nullptr;
      first.dstates_in = ends;
      first.fwd.log_decays = logs();
      first.fwd.pieces = alone.view();
      run(first);
      const PieceList reversed = segments.joined(leaving, state_size(), p.dstates_out, true);
      k.ssd_combine(first.fwd, leaving, ends, true, 0, c.h);
      for (int64_t i = 0; i < segments.count(); ++i)
        joined.pieces[i].state_out = reversed.pieces[i].state_out;
      p.dstates_out = leaving;
      p.dstates_in = returned;
      p.fwd.pieces = joined.view();
      run(p);
      for (int64_t i = 0; i < segments.count(); ++i) {
        const int64_t row = segments.list().pieces[i].state_in;
        if (row >= 0 && c.options)
          std::copy_n(returned + i * state_size(), state_size(),
                      static_cast<R*>(state(kGradients + init)) + row * state_size());
      }
    } else {
      run(p);
    }
    for (int64_t unit = dims.reduce_units(); unit-- > 0;) k.ssd_reduce(p, unit, unit + 1);
  }

  bool intact() const {
    return std::all_of(all.begin(), all.end(), [](const Tensor& t) { return t.intact(); }) &&
           std::all_of(memory.begin(), memory.end(), [](const auto& m) { return m->intact(); });
  }
};

template <class R>
void check(const Case& c, DType dtype) {
  using T = Call<R>;
  Args args = draw(c);
  Call<R> call(c, args, dtype);
  for (size_t i = 0; i < T::kMembers.size(); ++i)  // as they are stored
    if (!(args.*T::kMembers[i]).empty()) args.*T::kMembers[i] = call.all[i].values();
  call.forward();
  const Result want = reference(c, args);
  const double rounding = tolerance(dtype);
  CHECK(error(call.all[T::kGradients + T::dy].values(), want.y) < rounding);
  if (c.options) CHECK(error(call.all[T::kGradients + T::dfinal].values(), want.final_state) < rounding);

  call.backward();
  const auto f = [&](const Args& a) { return loss(c, a); };
  for (int argument = 0; argument < T::dy; ++argument) {
    const auto member = T::kMembers[argument];
    CAPTURE(argument);
    if (!(args.*member).empty())
      CHECK(slope_error(args, member, call.all[T::kGradients + argument].values(), f) <
            std::max(rounding, 1e-9));
  }
  CHECK(call.intact());
}

const std::vector<Case> kCases = {
    {1, 1, 1, 1, 1, 1, 1, 64, true, false, true, {}, {}},
    {2, 70, 6, 5, 3, 2, 3, 64, true, true, true, {}, {}},
    {1, 131, 3, 17, 16, 1, 1, 64, true, false, true, {}, {0, 2, 1, 3}},
    {2, 65, 4, 8, 33, 4, 1, 16, false, false, false, {}, {0, 1, 3, 2}},
    {1, 40, 9, 3, 4, 1, 1, 7, true, true, true, {}, {}},
    {1, 300, 2, 4, 5, 1, 2, 256, true, false, true, {}, {}},
    {1, 400, 2, 3, 4, 1, 1, 64, true, false, true, {0, 0, 1, 63, 64, 128, 191, 399, 400, 400}, {}},
    {1, 2300, 1, 3, 2, 1, 1, 64, true, true, true, {}, {}},  // segments; spans of 32 chunks
    {1, 2500, 2, 2, 3, 2, 1, 48, true, false, true, {0, 1100, 1100, 2500}, {}},  // segments of packed
                                                                                 // sequences
};

}  // namespace

TEST_CASE("ssd: forward, gradients, no stray writes") {
  FOR_EVERY_ISA();
  const DType dtype = GENERATE(DType::f64, DType::f32, DType::bf16, DType::f16);
  for (size_t i = 0; i < kCases.size(); ++i) {
    CAPTURE(int(dtype), i);
    dtype == DType::f64 ? check<double>(kCases[i], dtype) : check<float>(kCases[i], dtype);
  }
  const Case& long_one = kCases[kCases.size() - 2];
  SsdDims dims = long_one.dims();
  CHECK(Segments(long_one.runs(), dims).split());  // or the case above would not test what it says
}

}  // namespace mamba_ops

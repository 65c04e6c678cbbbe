// The vector functions, 16-bit floats, transposes and tiles of every instruction set.
#include "primitives.h"
#include "tensor.h"

namespace mamba_ops {

namespace base {
extern const PrimitiveTable primitives;
}
#ifdef MAMBA_HAS_avx512
namespace avx2 {
extern const PrimitiveTable primitives;
}
namespace avx512 {
extern const PrimitiveTable primitives;
}
namespace avx512bf16 {
extern const PrimitiveTable primitives;
}
#endif

namespace {

const PrimitiveTable& table(const std::string& isa) {
#ifdef MAMBA_HAS_avx512
  if (isa == "avx2") return avx2::primitives;
  if (isa == "avx512") return avx512::primitives;
  if (isa == "avx512bf16") return avx512bf16::primitives;
#endif
  REQUIRE(isa == "base");
  return base::primitives;
}

// `count` values from low to high, both included.
template <class R>
std::vector<R> grid(double low, double high, int64_t count) {
  std::vector<R> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = R(low + (high - low) * double(i) / double(count - 1));
  return x;
}

// The largest error of f over [low, high], relative to |truth| + floor.
template <class R, class Truth>
double worst(typename Primitives<R>::Map f, double low, double high, double floor, Truth truth) {
  const std::vector<R> x = grid<R>(low, high, 1 << 14);
  std::vector<R> y(x.size());
  f(y.data(), x.data(), int64_t(x.size()));
  double error = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = truth(double(x[i]));
    error = std::max(error, std::fabs(double(y[i]) - want) / (std::fabs(want) + floor));
  }
  return error;
}

template <class R>
R at(typename Primitives<R>::Map f, R x) {
  std::vector<R> in(16, x), out(16);
  f(out.data(), in.data(), 16);
  for (R y : out) CHECK(std::memcmp(&y, &out[0], sizeof(R)) == 0);  // every lane alike
  return out[0];
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double softplus(double x) { return x > 20 ? x : std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }
double softplus_grad(double x) { return x > 20 ? 1 : sigmoid(x); }
double silu_grad(double x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }

template <class R>
void check_functions(const Primitives<R>& p) {
  const double eps = std::numeric_limits<R>::epsilon();
  const auto exp = [](double x) { return std::exp(x); };
  CHECK(worst<R>(p.exp2, -125, 127, 0, [](double x) { return std::exp2(x); }) < 2 * eps);
  // exp(x) = 2^(x log2 e) carries the rounding of a product of size |x| log2 e.
  CHECK(worst<R>(p.exp, -1, 1, 0, exp) < 2 * eps);
  CHECK(worst<R>(p.exp, -87, 88, 0, exp) < 70 * eps);
  CHECK(worst<R>(p.log1p_unit, 0, 1, 0, [](double x) { return std::log1p(x); }) < 2 * eps);
  CHECK(worst<R>(p.softplus, -10, 40, 0, softplus) < 8 * eps);
  CHECK(worst<R>(p.softplus_grad, -10, 40, 0, softplus_grad) < 8 * eps);
  CHECK(worst<R>(p.sigmoid, -80, 80, 0, sigmoid) < 70 * eps);
  CHECK(worst<R>(p.silu, -10, 40, 0, [](double x) { return x * sigmoid(x); }) < 8 * eps);
  CHECK(worst<R>(p.silu_grad, -20, 40, 1, silu_grad) < 8 * eps);
  CHECK(worst<R>(p.sin, -100, 100, 1, [](double x) { return std::sin(x); }) < 2 * eps);
  CHECK(worst<R>(p.cos, -100, 100, 1, [](double x) { return std::cos(x); }) < 2 * eps);
  CHECK(worst<R>(p.sin, -1e6, 1e6, 1, [](double x) { return std::sin(x); }) < 2 * eps);

  const R inf = std::numeric_limits<R>::infinity();
  CHECK(at<R>(p.exp2, 0) == 1);
  CHECK(at<R>(p.exp2, -3) == R(0.125));
  CHECK(at<R>(p.exp, inf) == inf);
  CHECK(at<R>(p.exp, -inf) < R(2e-38));
  CHECK(at<R>(p.softplus, inf) == inf);
  CHECK(at<R>(p.softplus, R(20.5)) == R(20.5));
  CHECK(at<R>(p.sigmoid, inf) == 1);
  CHECK(at<R>(p.sigmoid, -1000) < R(2e-38));
  CHECK(at<R>(p.softplus_grad, 21) == 1);

  std::vector<R> x = grid<R>(1, p.width, p.width);
  CHECK(p.sum(x.data()) == R(p.width * (p.width + 1) / 2));
}

template <class R, class Bits>
void check_nan(const Primitives<R>& p, std::initializer_list<Bits> patterns) {
  for (const Bits bits : patterns) {
    R nan;
    std::memcpy(&nan, &bits, sizeof(R));
    CAPTURE(bits);
    for (const auto f :
         {p.exp2, p.exp, p.softplus, p.softplus_grad, p.sigmoid, p.silu, p.silu_grad, p.sin, p.cos})
      CHECK(std::isnan(at<R>(f, nan)));
  }
}

}  // namespace

TEST_CASE("vector functions are accurate and right at their ends") {
  FOR_EVERY_ISA();
  SECTION("float32") { check_functions(table(isa).f32); }
  SECTION("float64") { check_functions(table(isa).f64); }
}

TEST_CASE("NaN of any payload stays NaN") {
  FOR_EVERY_ISA();
  check_nan<float, uint32_t>(table(isa).f32,
                             {0x7fc00000, 0xffc00000, 0x7fc00001, 0x7fffffff, 0xffffffff, 0x7f800001});
  check_nan<double, uint64_t>(table(isa).f64, {0x7ff8000000000000, 0xffffffffffffffff});
}

TEST_CASE("16-bit floats are read exactly") {
  FOR_EVERY_ISA();
  const DType dtype = GENERATE(DType::bf16, DType::f16);
  const int mantissa = dtype == DType::bf16 ? 7 : 10;
  CAPTURE(mantissa);
  std::vector<uint16_t> bits(1 << 16);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = uint16_t(i);
  std::vector<float> vectors(bits.size()), scalars(bits.size());
  const auto load = table(isa).f32.load_row;
  load(vectors.data(), {bits.data(), dtype, {}}, int64_t(bits.size()));
  for (size_t i = 0; i < bits.size(); ++i) load(&scalars[i], {&bits[i], dtype, {}}, 1);
  const auto wrong = [&](const std::vector<float>& got) {
    int64_t count = 0;
    for (size_t i = 0; i < bits.size(); ++i) {
      const double want = value_of(bits[i], mantissa);
      count += std::isnan(want) ? !std::isnan(got[i])
                                : !(got[i] == want && std::signbit(got[i]) == std::signbit(want));
    }
    return count;
  };
  CHECK(wrong(vectors) == 0);
  CHECK(wrong(scalars) == 0);
}

TEST_CASE("16-bit floats are written to nearest, ties to even") {
  FOR_EVERY_ISA();
  const DType dtype = GENERATE(DType::bf16, DType::f16);
  const int mantissa = dtype == DType::bf16 ? 7 : 10;
  CAPTURE(mantissa);
  // Every value, the midpoints to its neighbours, and the floats beside those; overflow, denormals, infinity,
  // NaN.
  std::vector<float> x = {0x1p-149f,     -0x1p-149f,
                          65519.996f,    65520.f,
                          3.3961e38f,    std::numeric_limits<float>::max(),
                          1e-30f,        std::numeric_limits<float>::infinity(),
                          std::nanf(""), -std::nanf("")};
  for (int64_t i = 0; i < 1 << 16; ++i) {
    const double here = value_of(uint16_t(i), mantissa), next = value_of(uint16_t(i + 1), mantissa);
    if (!std::isfinite(here) || !std::isfinite(next)) continue;
    const float middle = float((here + next) / 2);
    x.insert(x.end(), {float(here), middle, std::nextafter(middle, 1e38f), std::nextafter(middle, -1e38f)});
  }
  for (uint32_t payload : {0x7f800001u, 0x7fffffffu, 0xffffffffu}) {
    x.push_back(0);
    std::memcpy(&x.back(), &payload, 4);
  }
  std::vector<uint16_t> vectors(x.size()), scalars(x.size());
  const auto store = table(isa).f32.store_row;
  store({vectors.data(), dtype, {}}, x.data(), int64_t(x.size()));
  for (size_t i = 0; i < x.size(); ++i) store({&scalars[i], dtype, {}}, &x[i], 1);
  const auto wrong = [&](const std::vector<uint16_t>& got) {
    int64_t count = 0;
    for (size_t i = 0; i < x.size(); ++i)
      count += std::isnan(x[i]) ? !std::isnan(value_of(got[i], mantissa)) : got[i] != nearest(x[i], mantissa);
    return count;
  };
  CHECK(wrong(vectors) == 0);
  CHECK(wrong(scalars) == 0);
}

TEMPLATE_TEST_CASE("a matrix is transposed", "", float, double) {
  using R = TestType;
  FOR_EVERY_ISA();
  const int64_t rows = 48, cols = 32, ld = 56, dst_ld = 64;
  Guarded from(rows * ld * sizeof(R)), to(cols * dst_ld * sizeof(R));
  for (int64_t i = 0; i < rows * ld; ++i) from.as<R>()[i] = R(i);
  table(isa).of<R>().transpose(to.as<R>(), dst_ld, from.as<R>(), ld, rows, cols);
  int64_t wrong = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) wrong += to.as<R>()[j * dst_ld + i] != R(i * ld + j);
  CHECK(wrong == 0);
  CHECK(to.intact());
}

TEMPLATE_TEST_CASE("tiles of every size, layout and dtype", "", float, double) {
  using R = TestType;
  FOR_EVERY_ISA();
  const DType dtype = GENERATE(DType::f32, DType::f64, DType::bf16, DType::f16);
  const bool rows_first = GENERATE(true, false);
  const int64_t gap = GENERATE(1, 2);
  const auto& p = table(isa).of<R>();
  for (const int64_t rows : {1, 3, 7, 8, 17, 64, 256})
    for (const int64_t cols : {1, 2, 15, 16, 33, 64}) {
      CAPTURE(int(dtype), rows_first, gap, rows, cols);
      const std::vector<int> order = rows_first ? std::vector<int>{0, 1} : std::vector<int>{1, 0};
      // One more row before the tile: its offset is not zero.
      Tensor from(dtype, {rows + 1, cols}, order, gap), to(dtype, {rows + 1, cols}, order, gap);
      for (int64_t i = 0; i < from.numel(); ++i) from.set(i, double((i * 37) % 251) - 125);
      const View &src = from, &dst = to;
      const int64_t ld = padded(cols) + kPad;
      Guarded tile(rows * ld * sizeof(R));
      R* t = tile.as<R>();
      for (int64_t i = 0; i < rows * ld; ++i) t[i] = R(77);
      p.load_tile(t, ld, src, src.stride[0], rows, src.stride[0], cols, src.stride[1]);
      int64_t wrong = 0;
      const int64_t vectors = (cols + p.width - 1) / p.width * p.width;  // zero beyond the columns
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < vectors; ++j) wrong += t[i * ld + j] != (j < cols ? R(from(i + 1, j)) : R(0));
        for (int64_t j = padded(cols); j < ld; ++j) wrong += t[i * ld + j] != R(77);
      }
      CHECK(wrong == 0);
      CHECK(tile.intact());
      p.store_tile(dst, dst.stride[0], rows, dst.stride[0], cols, dst.stride[1], t, ld);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) wrong += to(i + 1, j) != from(i + 1, j);
      for (int64_t j = 0; j < cols; ++j)
        wrong += !std::isnan(to(0, j));  // the row before the tile is left alone
      CHECK(wrong == 0);
      CHECK(from.intact());
      CHECK(to.intact());
    }
}

}  // namespace mamba_ops

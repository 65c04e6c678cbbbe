// Small tensors in memory that notices stray writes, 16-bit floats from their definition, and comparisons.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "catch.h"
#include "kernels/plan.h"
#include "kernels/view.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n)
#define ASAN_UNPOISON_MEMORY_REGION(p, n)
#endif

using mamba_ops::DType;
using mamba_ops::View;

// ---- 16-bit floats with so many mantissa bits, from their definition
// -----------------------------------------
inline int exponent_bias(int mantissa) { return (1 << (14 - mantissa)) - 1; }

inline double value_of(uint16_t bits, int mantissa) {
  const int exponent = (bits & 0x7fff) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  const int bias = exponent_bias(mantissa);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 2 * bias + 1)
    return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  const double significand = exponent ? fraction + (1 << mantissa) : fraction;
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias - mantissa);
}

// To nearest, ties to even.
inline uint16_t nearest(double x, int mantissa) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0, infinity = ((1 << (15 - mantissa)) - 1) << mantissa;
  if (std::isnan(x)) return sign | infinity | 1 << (mantissa - 1);
  if (std::isinf(x)) return sign | infinity;
  if (x == 0) return sign;
  const int bias = exponent_bias(mantissa), exponent = std::max(std::ilogb(x), 1 - bias);
  const double steps =
      std::nearbyint(std::ldexp(std::fabs(x), mantissa - exponent));  // 2^(mantissa + 1) carries over
  return sign | uint16_t(std::min<double>(steps + double(exponent + bias - 1) * (1 << mantissa), infinity));
}

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// ---- memory
// ---------------------------------------------------------------------------------------------------- Bytes
// between two guards that nobody may read (the address sanitizer) or change (intact()).
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : bytes_(bytes) {
    const int64_t whole = kGuard + (bytes + kGuard - 1) / kGuard * kGuard + kGuard;
    base_ = static_cast<unsigned char*>(std::aligned_alloc(kGuard, whole));
    end_ = base_ + whole;
    std::memset(base_, kMark, whole);
    std::memset(base_ + kGuard, 0xff, bytes);  // NaN in every float type
    ASAN_POISON_MEMORY_REGION(base_, kGuard);
    ASAN_POISON_MEMORY_REGION(base_ + kGuard + bytes_, end_ - base_ - kGuard - bytes_);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    ASAN_UNPOISON_MEMORY_REGION(base_, end_ - base_);
    std::free(base_);
  }

  void* data() const { return base_ + kGuard; }
  template <class R>
  R* as() const {
    return static_cast<R*>(data());
  }
  bool intact() const {
    ASAN_UNPOISON_MEMORY_REGION(base_, end_ - base_);
    const auto marked = [](unsigned char byte) { return byte == kMark; };
    const unsigned char* after = base_ + kGuard + bytes_;
    const bool ok = std::all_of(base_, base_ + kGuard, marked) &&
                    std::all_of(after, static_cast<const unsigned char*>(end_), marked);
    ASAN_POISON_MEMORY_REGION(base_, kGuard);
    ASAN_POISON_MEMORY_REGION(base_ + kGuard + bytes_, end_ - base_ - kGuard - bytes_);
    return ok;
  }

  static constexpr unsigned char kMark = 0xa5;

 private:
  static constexpr int64_t kGuard = 4096;
  int64_t bytes_;
  unsigned char *base_, *end_;
};

// Address space whose pages cost nothing until they are touched; data() is null where the system refuses.
class Reserved {
 public:
  explicit Reserved(int64_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                   0)) {}
  Reserved(const Reserved&) = delete;
  ~Reserved() {
    if (data()) munmap(data_, bytes_);
  }
  void* data() const { return data_ == MAP_FAILED ? nullptr : data_; }

 private:
  int64_t bytes_;
  void* data_;
};

// A strided tensor of up to 4 dims. `order` lists its dims from the slowest to the fastest; `gap` is the
// stride of the fastest one: 2 leaves holes, which stay untouched as the guards do.
class Tensor {
 public:
  Tensor(DType dtype, std::vector<int64_t> sizes, std::vector<int> order = {}, int64_t gap = 1)
      : sizes_(sizes), dims_(int(sizes.size())) {
    if (order.empty())
      for (int k = 0; k < dims_; ++k) order.push_back(k);
    view_.dtype = dtype;
    for (int k = dims_ - 1; k >= 0; --k) {
      view_.stride[order[k]] = gap;
      gap *= sizes_[order[k]];
    }
    sizes_.resize(4, 1);
    memory_ = std::make_shared<Guarded>(gap * size_of(dtype));
    view_.data = memory_->data();
    if (gap > numel()) {  // holes, and NaN in the elements
      std::memset(view_.data, Guarded::kMark, gap * size_of(dtype));
      for (int64_t i = 0; i < numel(); ++i) std::memset(address(i), 0xff, size_of(dtype));
    }
    storage_ = gap;
  }

  const View& view() const { return view_; }
  operator const View&() const { return view_; }
  int64_t size(int k) const { return sizes_[k]; }
  int64_t numel() const { return sizes_[0] * sizes_[1] * sizes_[2] * sizes_[3]; }

  // Elements by number, in the order of the dims.
  double get(int64_t i) const {
    const void* p = address(i);
    switch (view_.dtype) {
      case DType::f32:
        return *static_cast<const float*>(p);
      case DType::f64:
        return *static_cast<const double*>(p);
      case DType::bf16:
        return value_of(*static_cast<const uint16_t*>(p), 7);
      case DType::f16:
        return value_of(*static_cast<const uint16_t*>(p), 10);
    }
    std::abort();
  }
  void set(int64_t i, double x) {
    void* p = address(i);
    switch (view_.dtype) {
      case DType::f32:
        *static_cast<float*>(p) = float(x);
        return;
      case DType::f64:
        *static_cast<double*>(p) = x;
        return;
      case DType::bf16:
        *static_cast<uint16_t*>(p) = nearest(x, 7);
        return;
      case DType::f16:
        *static_cast<uint16_t*>(p) = nearest(x, 10);
        return;
    }
  }
  double operator()(int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) const {
    return get(((i0 * sizes_[1] + i1) * sizes_[2] + i2) * sizes_[3] + i3);
  }
  Tensor& set(const std::vector<double>& values) {
    for (int64_t i = 0; i < numel(); ++i) set(i, values[i]);
    return *this;
  }
  std::vector<double> values() const {
    std::vector<double> all(numel());
    for (int64_t i = 0; i < numel(); ++i) all[i] = get(i);
    return all;
  }

  bool intact() const {
    if (storage_ > numel()) {
      std::vector<bool> element(storage_ * size_of(view_.dtype));
      const unsigned char* begin = static_cast<const unsigned char*>(view_.data);
      for (int64_t i = 0; i < numel(); ++i)
        std::fill_n(element.begin() + (static_cast<const unsigned char*>(address(i)) - begin),
                    size_of(view_.dtype), true);
      for (size_t byte = 0; byte < element.size(); ++byte)
        if (!element[byte] && begin[byte] != Guarded::kMark) return false;
    }
    return memory_->intact();
  }

 private:
  void* address(int64_t i) const {
    int64_t offset = 0;
    for (int k = 3; k >= 0; --k) {
      offset += i % sizes_[k] * view_.stride[k];
      i /= sizes_[k];
    }
    return static_cast<unsigned char*>(view_.data) + offset * size_of(view_.dtype);
  }

  View view_;
  std::vector<int64_t> sizes_;
  int dims_;
  int64_t storage_;
  std::shared_ptr<Guarded> memory_;
};

// ---- values, slopes, errors
// --------------------------------------------------------------------------------------
using Values = std::vector<double>;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double uniform(double low, double high) { return low + (high - low) * (double(engine_()) / 4294967296.0); }
  Values values(int64_t n, double low = -1, double high = 1) {
    Values all(n);
    for (double& x : all) x = uniform(low, high);
    return all;
  }

 private:
  std::mt19937 engine_;
};

inline double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The largest difference, relative to the largest value. NaN counts as infinite.
inline double error(const Values& got, const Values& want) {
  REQUIRE(got.size() == want.size());
  double difference = 0, size = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = std::fabs(got[i] - want[i]);
    difference = d <= difference ? difference : std::isnan(d) ? std::numeric_limits<double>::infinity() : d;
    size = std::max(size, std::fabs(want[i]));
  }
  return difference / size;
}

// What storage in this type and arithmetic in float32 (float64 for f64) may cost.
inline double tolerance(DType dtype) {
  return dtype == DType::f64 ? 1e-11 : dtype == DType::f32 ? 2e-5 : dtype == DType::bf16 ? 6e-3 : 1e-3;
}

// How far <gradient, direction> is from the central difference (of fourth order) of `loss` along a random
// direction of args.*member.
template <class Args, class Loss>
double slope_error(Args args, Values Args::* member, const Values& gradient, const Loss& loss) {
  const double step = 2e-4;
  Values& at = args.*member;
  REQUIRE(gradient.size() == at.size());
  const Values from = at, direction = Random(unsigned(at.size())).values(int64_t(at.size()));
  const auto along = [&](double t) {
    for (size_t i = 0; i < at.size(); ++i) at[i] = from[i] + t * direction[i];
    return loss(args);
  };
  const double want = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step);
  const double got = dot(gradient, direction);
  double size = std::fabs(want);  // of the terms: their sum may cancel
  for (size_t i = 0; i < at.size(); ++i) size += std::fabs(gradient[i] * direction[i]);
  return std::isnan(got) ? got : std::fabs(got - want) / (size + 1e-30);
}

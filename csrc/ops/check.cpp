#include "ops/check.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

namespace mamba_ops {

namespace {

std::string tuple(const int64_t* sizes, size_t n) {
  std::string out = "(";
  for (size_t i = 0; i < n; ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + (n == 1 ? ",)" : ")");
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// "(b, l, g, n)" with the known sizes in place of their letters.
std::string filled(const char* letters, std::initializer_list<int64_t> dims) {
  std::string out;
  auto dim = dims.begin();
  for (const char* c = letters; *c; ++c) {
    if (*c == '(' || *c == ' ' || *c == ',' || *c == ')') {
      out += *c;
      continue;
    }
    std::string word;
    while (*c && *c != ',' && *c != ')') word += *c++;
    --c;
    out += dim != dims.end() && *dim >= 0 ? std::to_string(*dim) : word;
    if (dim != dims.end()) ++dim;
  }
  return out;
}

}  // namespace

std::string shape_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return tuple(sizes.data(), sizes.size());
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

void fail(const char* op, const std::string& message) {
  throw std::runtime_error(std::string(op) + ": " + message);
}

void no_cuda_kernel(const char* op) {
  fail(
      op,
      "got CUDA tensors, but mamba_ops was built without CUDA; run `python -m mamba_ops doctor` to see why, "
      "then reinstall with MAMBA_OPS_WITH_CUDA=ON (nvcc on the PATH) or MAMBA_OPS_WITH_CUDA=WHEEL (nvcc from "
      "PyPI)");
}

Checker::Checker(const char* op, const Tensor& first) : op_(op) {
  if (!first.defined()) fail(op, "the first tensor is not optional, got None");
  cuda_ = first.is_cuda();
  device_ = first.get_device();
  if (!cuda_ && !first.is_cpu()) fail(op, "tensors must be on the CPU or a CUDA GPU, got another device");
}

void Checker::shape(const char* name, const Tensor& t, const char* letters,
                    std::initializer_list<int64_t> dims, const char* also) const {
  bool ok = t.dim() == int64_t(dims.size());
  int64_t i = 0;
  for (const int64_t want : dims) {
    if (!ok) break;
    ok = want < 0 || t.size(i) == want;
    ++i;
  }
  if (ok) return;
  const std::string sizes = filled(letters, dims);
  fail(op_, std::string(name) + " must be " + letters + (sizes == letters ? "" : " = " + sizes) + also +
                ", got " + shape_of(t));
}

void Checker::dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) const {
  std::string list;
  for (auto type = allowed.begin(); type != allowed.end(); ++type) {
    if (t.scalar_type() == *type) return;
    if (std::find(allowed.begin(), type, *type) == type)
      list += (list.empty() ? "" : " or ") + std::string(name_of(*type));
  }
  fail(op_, std::string(name) + " must be " + list + ", got " + name_of(t.scalar_type()));
}

void Checker::device(const char* name, const Tensor& t) const {
  if (!t.defined()) fail(op_, std::string(name) + " is not optional, got None");
  if (t.is_cuda() != cuda_ || t.is_cpu() == cuda_ || t.get_device() != device_) {
    const auto where = [](bool cuda, bool cpu, int index) {
      return cuda ? "cuda:" + std::to_string(index) : std::string(cpu ? "cpu" : "another device");
    };
    fail(op_, std::string(name) + " must be on " + where(cuda_, !cuda_, device_) +
                  " like the other tensors, got " + where(t.is_cuda(), t.is_cpu(), t.get_device()));
  }
  int32_t layout = 0;  // torch 2.10's Tensor has no layout()
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  if (layout != aoti_torch_layout_strided())
    fail(op_, std::string(name) + " must be a dense (strided) tensor, got a sparse layout");
}

void Checker::eps(double value) const {
  that(value >= 0, [&] { return "eps must be >= 0, got " + number(value); });
}

void Checker::step_limits(double low, double high) const {
  that(low <= high, [&] {
    return "dt_limit must be (low, high) with low <= high, got (" + number(low) + ", " + number(high) + ")";
  });
}

ScalarType Checker::float_type(const char* name, const Tensor& x) const {
  device(name, x);
  dtype(name, x, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  return x.scalar_type();
}

ScalarType arithmetic_type(ScalarType storage) {
  return storage == ScalarType::Double || storage == ScalarType::ComplexDouble ? ScalarType::Double
                                                                               : ScalarType::Float;
}

View view(const Tensor& t) {
  View v;
  const ScalarType type = t.scalar_type();
  const bool complex = type == ScalarType::ComplexFloat || type == ScalarType::ComplexDouble;
  v.data = t.data_ptr();
  v.dtype = type == ScalarType::BFloat16                  ? DType::bf16
            : type == ScalarType::Half                    ? DType::f16
            : arithmetic_type(type) == ScalarType::Double ? DType::f64
                                                          : DType::f32;
  static double nothing;  // an empty tensor may have no storage, yet is not absent
  if (!v.data) v.data = &nothing;
  for (int64_t i = 0; i < t.dim() && i < 4; ++i) v.stride[i] = t.stride(i) * (complex ? 2 : 1);
  return v;
}

int64_t check_sequences(const Checker& check, int64_t b, int64_t l, const OptTensor& seq_idx,
                        const OptTensor& cu_seqlens) {
  check.that(!(seq_idx && cu_seqlens), "pass seq_idx or cu_seqlens, not both");
  if (seq_idx) check.all("seq_idx", *seq_idx, "(b, l)", {b, l}, {ScalarType::Int, ScalarType::Long});
  if (!cu_seqlens) return b;
  check.all("cu_seqlens", *cu_seqlens, "(s + 1)", {-1}, {ScalarType::Int, ScalarType::Long});
  check.that(b == 1, [&] {
    return "cu_seqlens packs sequences in one batch row, so b must be 1, got " + std::to_string(b);
  });
  check.that(cu_seqlens->numel() >= 2,
             [&] { return "cu_seqlens must hold s + 1 >= 2 offsets, got " + shape_of(*cu_seqlens); });
  return cu_seqlens->numel() - 1;
}

namespace {

template <class F>
void with_index_type(const Tensor& t, F f) {
  if (t.scalar_type() == ScalarType::Int)
    f(static_cast<const int32_t*>(t.data_ptr()));
  else
    f(static_cast<const int64_t*>(t.data_ptr()));
}

}  // namespace

std::vector<Run> sequences(const Checker& check, int64_t b, int64_t l, const OptTensor& seq_idx,
                           const OptTensor& cu_seqlens) {
  std::vector<Run> runs;
  if (seq_idx) {
    with_index_type(*seq_idx, [&](const auto* id) {
      runs = runs_of_seq_idx(id, seq_idx->stride(0), seq_idx->stride(1), b, l);
    });
  } else if (cu_seqlens) {
    with_index_type(*cu_seqlens, [&](const auto* cu) {
      const int64_t stride = cu_seqlens->stride(0), s = cu_seqlens->numel() - 1;
      for (int64_t k = 0; k <= s; ++k) {
        const int64_t here = cu[k * stride];
        const bool ok = k == 0 ? here == 0 : here >= cu[(k - 1) * stride] && (k < s || here == l);
        check.that(ok, [&] {
          return "cu_seqlens must rise from 0 to l = " + std::to_string(l) + ", got " + std::to_string(here) +
                 " at position " + std::to_string(k);
        });
      }
      runs = runs_of_cu_seqlens(cu, stride, s);
    });
  } else {
    runs = runs_of_rows(b, l);
  }
  return runs;
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& device_of) {
  return torch::stable::new_empty(device_of, sizes, type);
}

}  // namespace mamba_ops

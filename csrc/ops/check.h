// Argument checks: each error names the argument, the rule with its numbers, and what came.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <concepts>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "kernels/plan.h"
#include "kernels/view.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // up to torch 2.11: an error without the failed call's own message
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace mamba_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

std::string shape_of(const Tensor& t);
const char* name_of(ScalarType type);

// Throws std::runtime_error with "op: message".
[[noreturn]] void fail(const char* op, const std::string& message);
// Ends a call that got CUDA tensors in a build without CUDA kernels.
[[noreturn]] void no_cuda_kernel(const char* op);

// One call's checks: they share the operator's name and the device that the first tensor sets.
class Checker {
 public:
  Checker(const char* op, const Tensor& first);

  bool cuda() const { return cuda_; }
  // `dims` are the wanted sizes, -1 where any size will do; `letters` spells the shape, "(b, l, g, n)".
  void shape(const char* name, const Tensor& t, const char* letters, std::initializer_list<int64_t> dims,
             const char* also = "") const;
  void dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) const;
  // Given, on the device of the first tensor, and in plain strided storage.
  void device(const char* name, const Tensor& t) const;
  void all(const char* name, const Tensor& t, const char* letters, std::initializer_list<int64_t> dims,
           std::initializer_list<ScalarType> allowed) const {
    device(name, t);
    dtype(name, t, allowed);
    shape(name, t, letters, dims);
  }
  void that(bool ok, const char* message) const {
    if (!ok) fail(op_, message);
  }
  // message(): the text, made where it is needed alone.
  template <std::invocable Message>
  void that(bool ok, const Message& message) const {
    if (!ok) fail(op_, message());
  }
  // The dtype of x, which must be one that the operators take.
  ScalarType float_type(const char* name, const Tensor& x) const;

  // Rules of several operators.
  void eps(double value) const;
  void step_limits(double low, double high) const;

  const char* op() const { return op_; }

 private:
  const char* op_;
  bool cuda_;
  int device_;
};

// float64 for float64 tensors, float32 for the narrower ones.
ScalarType arithmetic_type(ScalarType storage);

View view(const Tensor& t);
inline View view(const OptTensor& t) { return t ? view(*t) : View{}; }

// The sequences of a (b, l) call: checks seq_idx and cu_seqlens and reads them. CPU tensors only.
std::vector<Run> sequences(const Checker& check, int64_t b, int64_t l, const OptTensor& seq_idx,
                           const OptTensor& cu_seqlens);
// Shape and dtype checks of the two, on any device; returns the number of state rows: b, or s with
// cu_seqlens.
int64_t check_sequences(const Checker& check, int64_t b, int64_t l, const OptTensor& seq_idx,
                        const OptTensor& cu_seqlens);

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& device_of);
// 0 elements: stands for an output that was not asked for.
inline Tensor none(const Tensor& like) { return empty({0}, like.scalar_type(), like); }

}  // namespace mamba_ops

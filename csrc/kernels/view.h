// What every kernel is handed: a pointer with a dtype and strides. No torch, no ownership.
#pragma once
#include <cstdint>

namespace mamba_ops {

enum class DType : int8_t { f32, f64, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A tensor of up to 4 dims; strides in elements (in real numbers for complex tensors, whose imaginary part
// lies at + 1). data == nullptr: the argument is absent. Storage is converted where it is loaded and stored,
// so that a kernel is compiled for the type of its arithmetic alone.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {};

  explicit operator bool() const { return data != nullptr; }
};

inline int64_t common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// A stretch of tokens [begin, end) of batch row `row` with nothing of another sequence in it. It lies in the
// run [run_begin, run_end) of that row; state rows are -1 where absent.
struct Piece {
  int64_t row, begin, end;
  int64_t run_begin, run_end;
  int64_t state_in;   // row of the states that enter
  int64_t state_out;  // row of the states that leave
};

// Buffers that hold rows of the arithmetic type pad them to this many values: whole vectors on every
// instruction set.
inline constexpr int64_t kPad = 16;
inline constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Pieces in groups: a unit of work takes one group, in order, so that sums over tokens have one partial per
// group and come out the same for any number of threads. group[i] .. group[i + 1]: the pieces of group i.
struct Pieces {
  const Piece* piece;
  const int64_t* group;
  int64_t groups;
};

}  // namespace mamba_ops

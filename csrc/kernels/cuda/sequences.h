// The sequences of a call as the CUDA kernels see them: everything but sizes lies on the device, the host
// never reads it.
#pragma once
#include <cstdint>

namespace mamba_ops {

// Integers on the device, int32 or int64; strides in elements.
struct IndexView {
  const void* data = nullptr;
  bool wide = false;  // int64
  int64_t stride[2] = {};
};

// Rows of a state for the batch rows of an update; absent: each its own.
struct DeviceRows {
  IndexView index;  // (b): negative for padding
  int64_t states;
};

struct Sequences {
  IndexView id;          // (b, l): a run is an unbroken stretch of one id; absent: each row is one run
  IndexView cu_seqlens;  // (s + 1), packs only; then id[0, t], where a kernel asks for it, is the sequence of
                         // token t, and so its row of the states
  int64_t count = 0;     // s, of packs
  // Packs with ids: not 0 where cu_seqlens does not rise from 0 to l. The kernels then write NaN into every
  // output: the host cannot raise an error about values that it does not wait for.
  const int32_t* invalid = nullptr;
  // (b, words) of 32 tokens, where a kernel asks for it: bit t is set where a run begins at token t > 0.
  const uint32_t* starts = nullptr;
  int64_t words = 0;

  constexpr bool has_runs() const { return id.data || cu_seqlens.data; }
};

// From cu_seqlens: id[t] for each of the l tokens, and id[l] for `invalid`. Returns nullptr, or what CUDA
// says went wrong.
const char* sequence_ids_cuda(const Sequences& seqs, int64_t l, int32_t* id, void* stream);

// From seqs.id: starts (b, seqs.words).
const char* run_starts_cuda(const Sequences& seqs, int64_t b, int64_t l, uint32_t* starts, void* stream);

}  // namespace mamba_ops

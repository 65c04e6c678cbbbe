// Causal depthwise convolution (math: x~ = [init, x], c_t = bias + sum_k W_k x~_{t+k}, y = silu(c) or c).
#pragma once
#include "kernels/view.h"

namespace mamba_ops {

inline constexpr int kConvMaxWidth = 4;
inline constexpr int64_t kConvChannels = 64;  // of a unit of work

struct ConvDims {
  int64_t b, d, l;
  int w;      // taps
  bool silu;  // else no activation

  int64_t channel_blocks() const { return (d + kConvChannels - 1) / kConvChannels; }
};

struct ConvFwd {
  ConvDims dims;
  View x, y;                        // (b, d, l)
  View weight, bias;                // (d, w), (d)
  View initial_state, final_state;  // (rows, d, w - 1)
  Pieces pieces;

  int64_t units() const { return pieces.groups * dims.channel_blocks(); }
};

struct ConvBwd {
  ConvFwd fwd;            // y and final_state are absent
  View dy, dx;            // (b, d, l)
  View dweight, dbias;    // (d, w), (d)
  View dfinal, dinitial;  // (rows, d, w - 1)
  void* partial;          // (groups, w + 1, padded d) in the arithmetic type: sums of dweight, then dbias
};

// CUDA: `pieces` stay empty, the sequences are on the device; `states` rows of states. They return nullptr,
// or what CUDA says went wrong, and do not wait for the kernels.
struct Sequences;
const char* causal_conv1d_fwd_cuda(const ConvFwd& p, const Sequences& seqs, int64_t states, void* stream);
const char* causal_conv1d_bwd_cuda(const ConvBwd& p, const Sequences& seqs, int64_t states, void* stream);
int64_t causal_conv1d_groups_cuda(const ConvFwd& p);  // groups of `partial`

}  // namespace mamba_ops

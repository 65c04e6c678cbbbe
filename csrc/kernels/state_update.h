// One token, or a few, from a state that is updated in place: causal convolution, selective scan and SSD.
// Math as in causal_conv1d.h and selective_scan.h; SSD: dt = clamp(softplus?(dt + bias)), S <- exp(dt A) S +
// dt x B^T, y = S C + D x.
#pragma once
#include "kernels/causal_conv1d.h"

namespace mamba_ops {

// Row of the state for each batch row, negative: padding (y = 0, no state). Null: each its own. CPU only.
using StateRows = const int64_t*;

// Bytes of a row of n states in the arithmetic type, at most: those that CUDA blocks have anywhere.
inline constexpr int64_t kUpdateRowBytesCuda = 48 << 10;

// A unit of work: so many channels, or so many of one head.
inline constexpr int64_t kUpdateRows = 64;

struct ConvUpdate {
  ConvFwd conv;  // l tokens; pieces and states are absent
  View state;    // (s, d, k): the last k inputs
  int64_t k;     // >= w - 1
  StateRows rows;
};

struct ScanUpdateDims {
  int64_t b, d, n, t;
  int64_t groups_B, groups_C;
  bool complex, softplus;
};

struct ScanUpdate {
  ScanUpdateDims dims;
  View state;           // (s, d, n)
  View u, delta, z, y;  // (b, d, t)
  View A;               // (d, n)
  View B, C;            // (b, g, n, t)
  View D, delta_bias;   // (d)
  StateRows rows;
};

struct SsdUpdateDims {
  int64_t b, h, p, n, t;
  int64_t groups_B, groups_C;
  bool softplus;
  double dt_min, dt_max;
  bool A_is_log;  // A holds log(-A)
};

struct SsdUpdate {
  SsdUpdateDims dims;
  View state;       // (s, h, p, n)
  View x, z, y;     // (b, t, h, p)
  View dt;          // (b, t, h)
  View A, dt_bias;  // (h)
  View B, C;        // (b, t, g, n)
  View D;           // (h, p)
  StateRows rows;
};

// CUDA: the rows are read on the device, where an index that is not below `states` makes y NaN and touches no
// state. They return nullptr, or what CUDA says went wrong, and do not wait for the kernels.
struct DeviceRows;
const char* state_update_cuda(const ConvUpdate& p, const DeviceRows& rows, void* stream);
const char* state_update_cuda(const ScanUpdate& p, const DeviceRows& rows, void* stream);
const char* state_update_cuda(const SsdUpdate& p, const DeviceRows& rows, void* stream);

}  // namespace mamba_ops

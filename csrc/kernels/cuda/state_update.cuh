// The updates of state_update.cu as their kernels see them: anything, what 32 bits can count, and one token
// as the layers have it.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>

#include "kernels/cuda/device.h"
#include "kernels/cuda/state_rows.cuh"
#include "kernels/state_update.h"

namespace mamba_ops::gpu {

// Rows (head, channel of it) of n states, where the rows of a head share B and C: a head of the SSD, or the
// neighbouring channels of a scan that have their groups of B and C in common.
struct Update {
  int64_t b, h, p, n, t;
  int64_t heads_per_B, heads_per_C;
  bool complex, softplus, A_is_log;
  double dt_min, dt_max;
  View state;        // (s, h, p, n)
  View x, z, y, dt;  // (b, t, h, p)
  View A;            // (h, p, n)
  View dt_bias, D;   // (h, p)
  View B, C;         // (b, t, g, n)
};

inline Update as_update(const ScanUpdate& s) {
  const int64_t d = s.dims.d, p = common_divisor(d / s.dims.groups_B, d / s.dims.groups_C);
  const auto channels = [&](const View& v, int64_t b, int64_t t, int64_t c) {
    return View{v.data, v.dtype, {b, t, c * p, c}};
  };
  const auto tokens = [&](const View& v) { return channels(v, v.stride[0], v.stride[2], v.stride[1]); };
  const auto each = [&](const View& v) { return View{v.data, v.dtype, {v.stride[0] * p, v.stride[0]}}; };
  const auto rows = [&](const View& v, int64_t row, int64_t c, int64_t n) {
    return View{v.data, v.dtype, {row, c * p, c, n}};
  };
  const auto groups = [](const View& v) {
    return View{v.data, v.dtype, {v.stride[0], v.stride[3], v.stride[1], v.stride[2]}};
  };
  const int64_t h = d / p;
  return {.b = s.dims.b,
          .h = h,
          .p = p,
          .n = s.dims.n,
          .t = s.dims.t,
          .heads_per_B = h / s.dims.groups_B,
          .heads_per_C = h / s.dims.groups_C,
          .complex = s.dims.complex,
          .softplus = s.dims.softplus,
          .A_is_log = false,
          .dt_min = -INFINITY,
          .dt_max = INFINITY,
          .state = rows(s.state, s.state.stride[0], s.state.stride[1], s.state.stride[2]),
          .x = tokens(s.u),
          .z = tokens(s.z),
          .y = tokens(s.y),
          .dt = tokens(s.delta),
          .A = {s.A.data, s.A.dtype, {s.A.stride[0] * p, s.A.stride[0], s.A.stride[1]}},
          .dt_bias = each(s.delta_bias),
          .D = each(s.D),
          .B = groups(s.B),
          .C = groups(s.C)};
}

inline Update as_update(const SsdUpdate& s) {
  const auto by_head = [](View v, int dims) {
    for (int i = dims; i < 4; ++i) v.stride[i] = 0;
    return v;
  };
  return {.b = s.dims.b,
          .h = s.dims.h,
          .p = s.dims.p,
          .n = s.dims.n,
          .t = s.dims.t,
          .heads_per_B = s.dims.h / s.dims.groups_B,
          .heads_per_C = s.dims.h / s.dims.groups_C,
          .complex = false,
          .softplus = s.dims.softplus,
          .A_is_log = s.dims.A_is_log,
          .dt_min = s.dims.dt_min,
          .dt_max = s.dims.dt_max,
          .state = s.state,
          .x = s.x,
          .z = s.z,
          .y = s.y,
          .dt = by_head(s.dt, 3),
          .A = by_head(s.A, 1),
          .dt_bias = by_head(s.dt_bias, 1),
          .D = s.D,
          .B = s.B,
          .C = s.C};
}

__device__ inline int64_t offset(const View& v, int64_t i, int64_t j, int64_t k, int64_t l) {
  return i * v.stride[0] + j * v.stride[1] + k * v.stride[2] + l * v.stride[3];
}

// ---- In 32 bits: where values lie, by batch row, token, head and row of the head. An absent tensor can be
// read like any other (its values are x's): no load hides behind a branch.

// A value of a parameter in float32 or T as it is stored: nothing waits for the load before the number is
// made of it.
template <class T>
__device__ inline uint32_t bits_at(const char* at, DType dtype) {
  if (sizeof(T) == 4 || dtype == DType::f32) return *reinterpret_cast<const uint32_t*>(at);
  return *reinterpret_cast<const uint16_t*>(at);
}

// Any strides.
struct Narrow {
  char* data;
  unsigned stride[4];  // in bytes
  bool present;
  DType dtype;

  __device__ char* at(unsigned i, unsigned j = 0, unsigned k = 0, unsigned l = 0) const {
    char* address = data;
    address += uint64_t(i) * stride[0];
    address += uint64_t(j) * stride[1];
    address += uint64_t(k) * stride[2];
    address += uint64_t(l) * stride[3];
    return address;
  }
};

struct AnyUpdate {
  unsigned b, h, p, n, t, heads_per_B, heads_per_C;
  bool softplus, A_is_log;
  float dt_min, dt_max;
  Narrow state, x, z, y, dt, A, dt_bias, D, B, C;
  unsigned lane_bits;  // log2 of the threads of a team
  DeviceRows rows;
};

// One token as the layers have it: each batch row has its own row of the state, which is contiguous; channels
// are neighbours, B and C are one for all; parameters are one a head (kOneDecay) or one a channel; the states
// of a row fill a team's packs, and the rows of a head its blocks. Half of the other's instructions and of
// its constants, which count where there are few rows.
struct LayerUpdate {
  struct Tensor {
    char* data;
    unsigned stride;  // from one batch row to the next, in bytes
    bool present;
    DType dtype;
  };
  Tensor state, dt, dt_bias, A, x, B, C, z, D, y;
  unsigned p;
  float dt_min, dt_max;
  bool softplus, A_is_log, D_by_channel;

  template <class T>
  __device__ static T* row(const Tensor& v) {
    return reinterpret_cast<T*>(v.data + uint64_t(blockIdx.z) * v.stride);
  }
  template <class T>
  __device__ static uint32_t bits(const Tensor& v, unsigned i) {
    return bits_at<T>(v.data + uint64_t(i) * (v.dtype == DType::f32 ? 4 : 2), v.dtype);
  }
};

// `to` with every tensor of `from` as `of` makes it.
template <class To, class From, class Of>
To with_tensors(To to, const From& from, Of of) {
  to.state = of(from.state), to.y = of(from.y);
  to.x = of(from.x), to.z = of(from.z), to.dt = of(from.dt);
  to.A = of(from.A), to.dt_bias = of(from.dt_bias), to.D = of(from.D);
  to.B = of(from.B), to.C = of(from.C);
  return to;
}

// Nothing where sizes or strides need more than 32 bits.
inline std::optional<AnyUpdate> narrow(const Update& p, const DeviceRows& rows) {
  constexpr int64_t kMost = INT_MAX / 32;
  bool fits = std::max({p.b, p.p, p.t, rows.states}) <= kMost;
  const auto of = [&](const View& v) {
    const bool present(v);
    const DType dtype = present ? v.dtype : p.x.dtype;
    const int64_t bytes = dtype == DType::f32 ? 4 : 2;
    Narrow out{.data = static_cast<char*>(present ? v.data : p.x.data),
               .stride = {},
               .present = present,
               .dtype = dtype};
    for (int i = 0; i < 4; ++i) {
      fits = fits && v.stride[i] <= kMost / bytes;
      out.stride[i] = unsigned(v.stride[i] * bytes);
    }
    return out;
  };
  const AnyUpdate sizes{.b = unsigned(p.b),
                        .h = unsigned(p.h),
                        .p = unsigned(p.p),
                        .n = unsigned(p.n),
                        .t = unsigned(p.t),
                        .heads_per_B = unsigned(p.heads_per_B),
                        .heads_per_C = unsigned(p.heads_per_C),
                        .softplus = p.softplus,
                        .A_is_log = p.A_is_log,
                        .dt_min = float(p.dt_min),
                        .dt_max = float(p.dt_max),
                        .rows = rows};
  const AnyUpdate out = with_tensors(sizes, p, of);
  return fits ? std::optional(out) : std::nullopt;
}

// Where the strides and sizes are what LayerUpdate knows. block_rows: of a head, per block.
inline std::optional<LayerUpdate> as_layer(const Update& view, const AnyUpdate& p, bool one_decay,
                                           unsigned block_rows) {
  const int64_t rows = view.p, each = one_decay ? 0 : 1;
  const auto lies = [](const View& v, int dim, int64_t of_head, int64_t of_row) {
    return !v || (v.stride[dim] == of_head && v.stride[dim + 1] == of_row);
  };
  const auto by_channel = [&](const View& v, int dim) { return lies(v, dim, rows, 1); };
  const auto by_owner = [&](const View& v, int dim) { return lies(v, dim, one_decay ? 1 : rows, each); };
  const bool fits = p.t == 1 && !p.rows.index.data && p.b <= kMaxGrid && rows % block_rows == 0 &&
                    p.h * rows <= INT_MAX && p.heads_per_B == p.h && p.heads_per_C == p.h &&
                    by_channel(view.x, 2) && by_channel(view.z, 2) && by_channel(view.y, 2) &&
                    by_owner(view.dt, 2) && by_owner(view.dt_bias, 0) &&
                    (by_owner(view.D, 0) || by_channel(view.D, 0)) && lies(view.state, 1, rows * p.n, p.n) &&
                    (one_decay ? by_owner(view.A, 0) : lies(view.A, 0, rows * p.n, p.n));
  if (!fits) return std::nullopt;
  const auto of = [](const Narrow& v) {
    return LayerUpdate::Tensor{.data = v.data, .stride = v.stride[0], .present = v.present, .dtype = v.dtype};
  };
  const LayerUpdate sizes{.p = p.p,
                          .dt_min = p.dt_min,
                          .dt_max = p.dt_max,
                          .softplus = p.softplus,
                          .A_is_log = p.A_is_log,
                          .D_by_channel = view.D.stride[1] != 0};
  return with_tensors(sizes, p, of);
}

}  // namespace mamba_ops::gpu

// The updates of state_update.cu as their kernels see them: anything, what 32 bits can count, and one token
// as the layers have it.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>

#include "kernels/cuda/state_rows.cuh"
#include "kernels/state_update.h"

namespace mamba_ops::gpu {

inline constexpr int64_t kMaxGrid = 65535;  // in y and z

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
__device__ inline uint32_t bits_of(DType dtype, const char* at) {
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

  __device__ char* of_token(const Narrow& v, unsigned b, unsigned t, unsigned head, unsigned row) const {
    return v.at(b, t, head, row);
  }
  __device__ const char* dt_at(unsigned b, unsigned t, unsigned head, unsigned row) const {
    return dt.at(b, t, head, row);
  }
  template <class T>
  __device__ uint32_t bits(const Narrow& v, unsigned head, unsigned row) const {
    return bits_of<T>(v.dtype, v.at(head, row));
  }
  template <class T>
  __device__ uint32_t D_bits(unsigned head, unsigned row) const {
    return bits<T>(D, head, row);
  }
  __device__ const char* rates(unsigned head, unsigned row) const { return A.at(head, row); }
  template <class S>
  __device__ char* state_row(unsigned i, unsigned head, unsigned row) const {
    return state.at(i, head, row);
  }
  __device__ const char* B_at(unsigned b, unsigned t, unsigned head) const {
    return B.at(b, t, heads_per_B == h ? 0 : head / heads_per_B);
  }
  __device__ const char* C_at(unsigned b, unsigned t, unsigned head) const {
    return C.at(b, t, heads_per_C == h ? 0 : head / heads_per_C);
  }
  template <class Update, class Fill>
  __device__ void for_rows(Update update, Fill fill) const {
    gpu::for_rows(rows, b, update, fill);
  }
};

// One token as the layers have it: each batch row has its own row of the state, which is contiguous; channels
// are neighbours, B and C are one for all; parameters are one a head (kOneDecay) or one a channel. It takes
// two thirds of the other's instructions and half of its constants, which count where there are few rows.
template <bool kOneDecay>
struct PlainUpdate {
  struct Tensor {
    char* data;
    unsigned stride;  // from one batch row to the next, in bytes
    bool present;
    DType dtype;
  };
  static constexpr unsigned t = 1;
  unsigned p, n;
  float dt_min, dt_max;
  bool softplus, A_is_log, D_by_channel;
  unsigned lane_bits;
  Tensor dt, x, z, dt_bias, A, D, B, C, state, y;

  __device__ static char* at(const Tensor& v, unsigned b) { return v.data + uint64_t(b) * v.stride; }
  __device__ unsigned channel(unsigned head, unsigned row) const { return head * p + row; }
  __device__ unsigned owner(unsigned head, unsigned row) const {
    return kOneDecay ? head : channel(head, row);
  }
  __device__ static unsigned bytes(const Tensor& v) { return v.dtype == DType::f32 ? 4 : 2; }

  __device__ char* of_token(const Tensor& v, unsigned b, unsigned, unsigned head, unsigned row) const {
    return at(v, b) + uint64_t(channel(head, row)) * bytes(x);
  }
  __device__ const char* dt_at(unsigned b, unsigned, unsigned head, unsigned row) const {
    return at(dt, b) + uint64_t(owner(head, row)) * bytes(x);
  }
  template <class T>
  __device__ uint32_t bits(const Tensor& v, unsigned head, unsigned row) const {
    return bits_of<T>(v.dtype, v.data + uint64_t(owner(head, row)) * bytes(v));
  }
  template <class T>
  __device__ uint32_t D_bits(unsigned head, unsigned row) const {
    const unsigned i = D_by_channel ? channel(head, row) : head;
    return bits_of<T>(D.dtype, D.data + uint64_t(i) * bytes(D));
  }
  __device__ const char* rates(unsigned head, unsigned row) const {
    return A.data + uint64_t(channel(head, row)) * (n * 4);
  }
  template <class S>
  __device__ char* state_row(unsigned i, unsigned head, unsigned row) const {
    return at(state, i) + uint64_t(channel(head, row)) * (n * unsigned(sizeof(S)));
  }
  __device__ const char* B_at(unsigned b, unsigned, unsigned) const { return at(B, b); }
  __device__ const char* C_at(unsigned b, unsigned, unsigned) const { return at(C, b); }
  template <class Update, class Fill>
  __device__ void for_rows(Update update, Fill) const {
    update(blockIdx.z, blockIdx.z);
  }
};

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
  const AnyUpdate out{.b = unsigned(p.b),
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
                      .state = of(p.state),
                      .x = of(p.x),
                      .z = of(p.z),
                      .y = of(p.y),
                      .dt = of(p.dt),
                      .A = of(p.A),
                      .dt_bias = of(p.dt_bias),
                      .D = of(p.D),
                      .B = of(p.B),
                      .C = of(p.C),
                      .lane_bits = 0,
                      .rows = rows};
  return fits ? std::optional(out) : std::nullopt;
}

// Whether PlainUpdate knows its strides.
inline bool is_plain(const Update& p, const DeviceRows& rows, bool one_decay) {
  const auto lies = [](const View& v, int dim, int64_t of_head, int64_t of_row) {
    return !v || (v.stride[dim] == of_head && v.stride[dim + 1] == of_row);
  };
  const auto by_channel = [&](const View& v, int dim) { return lies(v, dim, p.p, 1); };
  const auto by_owner = [&](const View& v, int dim) { return lies(v, dim, one_decay ? 1 : p.p, !one_decay); };
  return p.t == 1 && !rows.index.data && p.b <= kMaxGrid && p.h * p.p <= INT_MAX && p.heads_per_B == p.h &&
         p.heads_per_C == p.h && by_channel(p.x, 2) && by_channel(p.z, 2) && by_channel(p.y, 2) &&
         by_owner(p.dt, 2) && by_owner(p.dt_bias, 0) && (by_owner(p.D, 0) || by_channel(p.D, 0)) &&
         (one_decay ? by_owner(p.A, 0) : lies(p.A, 0, p.p * p.n, p.n)) && lies(p.state, 1, p.p * p.n, p.n);
}

template <bool kOneDecay>
PlainUpdate<kOneDecay> plain(const Update& view, const AnyUpdate& p) {
  using Plain = PlainUpdate<kOneDecay>;
  const auto of = [](const Narrow& v) {
    return
        typename Plain::Tensor{.data = v.data, .stride = v.stride[0], .present = v.present, .dtype = v.dtype};
  };
  return {.p = p.p,
          .n = p.n,
          .dt_min = p.dt_min,
          .dt_max = p.dt_max,
          .softplus = p.softplus,
          .A_is_log = p.A_is_log,
          .D_by_channel = view.D.stride[1] != 0,
          .lane_bits = 0,
          .dt = of(p.dt),
          .x = of(p.x),
          .z = of(p.z),
          .dt_bias = of(p.dt_bias),
          .A = of(p.A),
          .D = of(p.D),
          .B = of(p.B),
          .C = of(p.C),
          .state = of(p.state),
          .y = of(p.y)};
}

}  // namespace mamba_ops::gpu

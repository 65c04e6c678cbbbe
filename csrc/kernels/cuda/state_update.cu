// One token, or a few, of the selective scan and of the SSD, with the state in place.
//
//   dt = clamp(softplus?(dt + bias));  h <- exp(dt A) h + dt x B;  y = (k Re(C h) + D x) silu(z)
//
// A warp takes consecutive rows of one head and one batch row. A team of its threads (a power of two) owns
// two or four of them in packs of 16 bytes, a thread two or one of each. A token's numbers and the states are
// asked for before anything waits: one latency of the memory. Then every thread makes step, skip and gate of
// one of its team's rows; the others get the step by shuffles, by which y is summed too, the rows halved on
// the way. No shared memory, no barrier. Where strides and sizes are a layer's, a kernel that knows them
// takes half of the instructions. States in other strides or sizes, float64 and complex ones: a warp owns a
// row and keeps it in shared memory. Every order is fixed: bitwise repeatable.
//
// Bound by memory: SSD b128 h80 p64 n128 with a float32 state takes 0.167 ms on an H200, 4.0 TB/s where a
// copy has 4.1; scan b128 d5120 n16 0.027 ms, 3.3 TB/s. At b1 by latencies: on an H100 the SSD takes 6.15 us
// between two events, a kernel that multiplies the same states by a number 5.6, one without loads 3.4, an
// empty one 3.0. Code that an earlier launch has brought, more or fewer rows a thread, constants or states
// asked for first, blocks of 32 to 256 threads: within 0.1 us, or slower. The scan: 4.7 us, by the general
// kernel 5.1.
#include <bit>

#include "kernels/cuda/bits.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_update.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kThreads = 64, kThreadsLayer = 128, kThreadsAny = 128;
constexpr int kRowsLayer = 4;  // of a team

// One instruction in float, where the compiler's has ten.
template <class R>
__device__ inline R exp_of(R v) {
  return exp2_of(R(kLog2e) * v);
}

// P: any of the updates.
template <class R, class P>
__device__ inline R step_size(const P& p, R dt, R bias) {
  dt += bias;
  if (p.softplus && dt <= 20) dt = log1p(exp_of(dt));
  const R clamped = min(max(dt, R(p.dt_min)), R(p.dt_max));
  return dt == dt ? clamped : dt;
}

template <class R, class P>
__device__ inline R rate_of(const P& p, R A) {
  return p.A_is_log ? -exp_of(A) : A;
}

// V: a tensor of any of the updates.
template <class T, class V>
__device__ inline float number(const V& v, uint32_t bits) {
  return v.present ? from_bits<T>(bits, v.dtype) : 0;
}

// ---- Packs of 16 bytes

// v[r] summed over the lanes of a team; a lane gets the sum of row lane / (lanes / kRows).
template <int kRows>
__device__ inline float sum_of_row(float (&v)[kRows], unsigned lane, unsigned lanes) {
  unsigned apart = lanes / 2;
#pragma unroll
  for (int rows = kRows / 2; rows > 0; rows /= 2, apart /= 2) {
    const bool upper = lane & apart;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const float mine = upper ? v[r + rows] : v[r], other = upper ? v[r] : v[r + rows];
      v[r] = mine + __shfl_xor_sync(kAllLanes, other, apart);
    }
  }
#pragma unroll 1
  for (; apart > 0; apart /= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], apart);
  return v[0];
}

// T: of the inputs, S: of the state. kOneDecay: A is the same for all states of a row. kOneToken: t = 1, and
// the new states need no registers.
template <class T, class S, bool kOneDecay, bool kOneToken, int kPacks, int kRows>
__global__ void __launch_bounds__(kThreads, !kOneToken  ? 8
                                            : kOneDecay ? 16
                                                        : 12)
    update_packs(const __grid_constant__ AnyUpdate p) {
  constexpr unsigned kPack = 16 / sizeof(S);
  using States = Pack<S, kPack>;
  using Values = Pack<T, kPack>;
  using Rates = Pack<float, kPack>;
  const unsigned lanes = 1 << p.lane_bits, lane = threadIdx.x & (lanes - 1);
  const unsigned teams = 32 >> p.lane_bits, team = threadIdx.x % 32 >> p.lane_bits;  // of a warp
  // In the recurrence: rows first, first + teams, ... and columns of each pack k. What lies beyond the last
  // row or column is read from there.
  const unsigned first = (blockIdx.x * (kThreads / 32) + threadIdx.x / 32) * teams * kRows + team;
  const auto row_of = [&](unsigned r) { return first + r * teams; };
  const auto near = [&](unsigned row) { return min(row, p.p - 1); };
  const auto column = [&](unsigned k) { return (k * lanes + lane) * kPack; };
  const auto inside = [&](unsigned k) { return k + 1 < kPacks || column(k) < p.n; };
  const auto near_column = [&](unsigned k) {
    return k + 1 < kPacks ? column(k) : min(column(k), p.n - kPack);
  };
  // Before and after it: one of the rows, which some neighbours share.
  const unsigned sharers = lanes / kRows, head = blockIdx.y;
  const unsigned group_B = p.heads_per_B == p.h ? 0 : head / p.heads_per_B;
  const unsigned group_C = p.heads_per_C == p.h ? 0 : head / p.heads_per_C;
  const unsigned row = row_of(lane * kRows >> p.lane_bits), own = near(row);
  const auto y_at = [&](unsigned b, unsigned t) { return reinterpret_cast<T*>(p.y.at(b, t, head, row)); };
  overlap();

  const auto update = [&](unsigned b, unsigned state_row) {
    // Everything is asked for before anything waits, and what the longest work depends on first.
    T x, dt, z;
    const auto ask = [&](unsigned t) {
      const auto value = [&](const auto& v) { return *reinterpret_cast<const T*>(v.at(b, t, head, own)); };
      dt = value(p.dt);
      x = value(p.x);
      z = value(p.z);
    };
    if (kOneToken || p.t > 0) ask(0);
    const uint32_t bias_bits = bits_at<T>(p.dt_bias.at(head, own), p.dt_bias.dtype);
    const uint32_t A_bits = kOneDecay ? bits_at<T>(p.A.at(head, own), p.A.dtype) : 0;
    const uint32_t D_bits = bits_at<T>(p.D.at(head, own), p.D.dtype);
    States* stored[kRows][kPacks];
    States pack[kRows][kPacks];
    Rates rate[kRows][kPacks];
#pragma unroll
    for (unsigned r = 0; r < kRows; ++r)
#pragma unroll
      for (unsigned k = 0; k < kPacks; ++k) {
        const unsigned at = near_column(k);
        stored[r][k] =
            reinterpret_cast<States*>(p.state.at(state_row, head, near(row_of(r))) + at * sizeof(S));
        pack[r][k] = *stored[r][k];
        if (!kOneDecay)
          rate[r][k] = *reinterpret_cast<const Rates*>(p.A.at(head, near(row_of(r))) + at * sizeof(float));
      }
    float h[kRows][kPacks][kPack];
    for (unsigned t = 0; t < (kOneToken ? 1 : p.t); ++t) {
      Values B[kPacks], C[kPacks];
#pragma unroll
      for (unsigned k = 0; k < kPacks; ++k) {
        B[k] = *reinterpret_cast<const Values*>(p.B.at(b, t, group_B) + near_column(k) * sizeof(T));
        C[k] = *reinterpret_cast<const Values*>(p.C.at(b, t, group_C) + near_column(k) * sizeof(T));
      }
      const float step = step_size(p, to_real(dt), number<T>(p.dt_bias, bias_bits));
      // decay: a factor, or a power of two that A is yet to multiply.
      const float now = to_real(x), gain = step * now,
                  decay =
                      kOneDecay ? exp_of(step * rate_of(p, number<T>(p.A, A_bits))) : step * float(kLog2e);
      const float skip = p.D.present ? number<T>(p.D, D_bits) * now : 0;
      const float gate = p.z.present ? silu(to_real(z)) : 1;
      if (!kOneToken && t + 1 < p.t) ask(t + 1);
      float out[kRows] = {};
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r) {
        const unsigned from = team * lanes + r * sharers;
        const float gain_r = __shfl_sync(kAllLanes, gain, from);
        const float decay_r = __shfl_sync(kAllLanes, decay, from);
#pragma unroll
        for (unsigned k = 0; k < kPacks; ++k) {
          float sum = 0;
#pragma unroll
          for (unsigned i = 0; i < kPack; ++i) {
            if (t == 0) h[r][k][i] = pack[r][k].at(i);
            const float decay_i = kOneDecay ? decay_r : exp2_of(decay_r * rate[r][k].at(i));
            h[r][k][i] = decay_i * h[r][k][i] + gain_r * B[k].at(i);
            sum += C[k].at(i) * h[r][k][i];
          }
          out[r] += inside(k) ? sum : 0;
          if (kOneToken && inside(k) && row_of(r) < p.p) *stored[r][k] = to_pack<S>(h[r][k]);
        }
      }
      const float sum = sum_of_row(out, lane, lanes);
      if (row < p.p && (lane & (sharers - 1)) == 0) *y_at(b, t) = from_real<T>((sum + skip) * gate);
    }
    if (!kOneToken && p.t > 0)
#pragma unroll
      for (unsigned r = 0; r < kRows; ++r)
#pragma unroll
        for (unsigned k = 0; k < kPacks; ++k)
          if (inside(k) && row_of(r) < p.p) *stored[r][k] = to_pack<S>(h[r][k]);
  };
  const auto fill = [&](unsigned b, float value) {
#pragma unroll 1
    for (unsigned t = 0; row < p.p && t < p.t; ++t) *y_at(b, t) = from_real<T>(value);
  };
  for_rows(p.rows, p.b, update, fill);
}

// LayerUpdate: a warp's states are neighbours in memory, kRows packs a thread.
template <class T, class S, bool kOneDecay, int kLaneBits>
__global__ void __launch_bounds__(kThreadsLayer) update_layer(const __grid_constant__ LayerUpdate p) {
  constexpr unsigned kPack = 16 / sizeof(S), kRows = kRowsLayer;
  using States = Pack<S, kPack>;
  using Values = Pack<T, kPack>;
  using Rates = Pack<float, kPack>;
  constexpr unsigned kLanes = 1 << kLaneBits, kTeams = 32 >> kLaneBits, kSharers = kLanes / kRows;
  const unsigned lane = threadIdx.x % kLanes, team = threadIdx.x % 32 / kLanes;
  const unsigned head = blockIdx.y, block = blockIdx.x + head * gridDim.x;
  const unsigned warp = block * (kThreadsLayer / 32) + threadIdx.x / 32;
  const unsigned channel = (warp * kRows + lane / kSharers) * kTeams + team,
                 first = warp * kRows * 32 + threadIdx.x % 32;
  const unsigned owner = kOneDecay ? head : channel;
  overlap();

  // Everything is asked for before anything waits.
  States* const stored = p.row<States>(p.state) + first;
  States pack[kRows];
  Rates rate[kRows];
#pragma unroll
  for (unsigned r = 0; r < kRows; ++r) {
    pack[r] = stored[r * 32];
    if (!kOneDecay) rate[r] = reinterpret_cast<const Rates*>(p.A.data)[first + r * 32];
  }
  const T dt = p.row<const T>(p.dt)[owner];
  const uint32_t bias_bits = p.bits<T>(p.dt_bias, owner);
  const uint32_t A_bits = kOneDecay ? p.bits<T>(p.A, owner) : 0;
  const T x = p.row<const T>(p.x)[channel];
  const Values B = p.row<const Values>(p.B)[lane], C = p.row<const Values>(p.C)[lane];
  const T z = p.row<const T>(p.z)[channel];
  const uint32_t D_bits = p.bits<T>(p.D, p.D_by_channel ? channel : head);

  const float step = step_size(p, to_real(dt), number<T>(p.dt_bias, bias_bits));
  const float now = to_real(x), gain = step * now,
              decay = kOneDecay ? exp_of(step * rate_of(p, number<T>(p.A, A_bits))) : step * float(kLog2e);
  float out[kRows] = {};
#pragma unroll
  for (unsigned r = 0; r < kRows; ++r) {
    const unsigned from = team * kLanes + r * kSharers;
    const float gain_r = __shfl_sync(kAllLanes, gain, from);
    const float decay_r = kOneDecay ? decay : __shfl_sync(kAllLanes, decay, from);
    float h[kPack];
#pragma unroll
    for (unsigned i = 0; i < kPack; ++i) {
      h[i] = (kOneDecay ? decay_r : exp2_of(decay_r * rate[r].at(i))) * pack[r].at(i) + gain_r * B.at(i);
      out[r] += C.at(i) * h[i];
    }
    stored[r * 32] = to_pack<S>(h);
  }
  const float sum = sum_of_row(out, lane, kLanes);
  const float skip = p.D.present ? number<T>(p.D, D_bits) * now : 0;
  const float gate = p.z.present ? silu(to_real(z)) : 1;
  if (lane % kSharers == 0) p.row<T>(p.y)[channel] = from_real<T>((sum + skip) * gate);
}

// ---- Anything else

// A warp owns a row; its lanes keep states lane, lane + 32, ... in shared memory, each for itself.
template <class R, bool kComplex>
__global__ void __launch_bounds__(kThreadsAny) update_any(const Update p, const DeviceRows rows) {
  constexpr int kParts = kComplex ? 2 : 1;
  extern __shared__ double s_memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t line = int64_t(blockIdx.x) * warps + warp, head = line / p.p, row = line % p.p;
  overlap();
  if (head >= p.h) return;
  R* s_state = reinterpret_cast<R*>(s_memory) + warp * p.n * kParts;
  const int64_t group_B = head / p.heads_per_B, group_C = head / p.heads_per_C;

  const auto update = [&](int64_t b, int64_t state_row) {
    const int64_t at = offset(p.state, state_row, head, row, 0);
    for (int64_t i = lane; i < p.n; i += 32)
      for (int part = 0; part < kParts; ++part)
        s_state[i * kParts + part] = load_one<R>(p.state, at + i * p.state.stride[3] + part);
    for (int64_t t = 0; t < p.t; ++t) {
      const R bias = p.dt_bias.data
                         ? load_one<R>(p.dt_bias, head * p.dt_bias.stride[0] + row * p.dt_bias.stride[1])
                         : R(0);
      const R dt = step_size(p, load_one<R>(p.dt, offset(p.dt, b, t, head, row)), bias);
      const R x = load_one<R>(p.x, offset(p.x, b, t, head, row));
      R out = 0;
      for (int64_t i = lane; i < p.n; i += 32) {
        const int64_t at_A = head * p.A.stride[0] + row * p.A.stride[1] + i * p.A.stride[2],
                      at_B = offset(p.B, b, t, group_B, i), at_C = offset(p.C, b, t, group_C, i);
        R* h = s_state + i * kParts;
        const R decay = exp(dt * rate_of(p, load_one<R>(p.A, at_A)));
        if constexpr (kComplex) {
          R sine, cosine;
          sincos(dt * load_one<R>(p.A, at_A + 1), &sine, &cosine);
          const R re = decay * (cosine * h[0] - sine * h[1]), im = decay * (cosine * h[1] + sine * h[0]);
          h[0] = re + dt * x * load_one<R>(p.B, at_B);
          h[1] = im + dt * x * load_one<R>(p.B, at_B + 1);
          out += 2 * (load_one<R>(p.C, at_C) * h[0] - load_one<R>(p.C, at_C + 1) * h[1]);
        } else {
          h[0] = decay * h[0] + dt * x * load_one<R>(p.B, at_B);
          out += load_one<R>(p.C, at_C) * h[0];
        }
      }
      for (int k = 16; k > 0; k /= 2) out += __shfl_xor_sync(kAllLanes, out, k);
      if (p.D.data) out += load_one<R>(p.D, head * p.D.stride[0] + row * p.D.stride[1]) * x;
      if (p.z.data) out *= silu(load_one<R>(p.z, offset(p.z, b, t, head, row)));
      if (lane == 0) store_one(p.y, offset(p.y, b, t, head, row), out);
    }
    for (int64_t i = lane; i < p.n; i += 32)
      for (int part = 0; part < kParts; ++part)
        store_one(p.state, at + i * p.state.stride[3] + part, s_state[i * kParts + part]);
  };
  const auto fill = [&](int64_t b, R value) {
    for (int64_t t = lane; t < p.t; t += 32) store_one(p.y, offset(p.y, b, t, head, row), value);
  };
  for_rows(rows, p.b, update, fill);
}

// ---- Launches

dim3 grid(int64_t blocks, int64_t heads, int64_t b) {
  return {unsigned(blocks), unsigned(heads), unsigned(std::min(b, kMaxGrid))};
}

template <class S>
bool packs_fit(const Update& p, const DeviceRows& rows) {
  constexpr int kPack = 16 / sizeof(S);
  return !p.complex && p.h <= kMaxGrid && p.n % kPack == 0 && p.n <= 32 * 2 * kPack &&
         packs_align(p.state, 3, {rows.states, p.h, p.p}, kPack) &&
         packs_align(p.B, 3, {p.b, p.t, p.h / p.heads_per_B}, kPack) &&
         packs_align(p.C, 3, {p.b, p.t, p.h / p.heads_per_C}, kPack) &&
         (p.A.stride[2] == 0 || (p.A.dtype == DType::f32 && packs_align(p.A, 2, {p.h, p.p}, kPack)));
}

template <class T, class S>
void launch_packs(const Update& view, AnyUpdate p, cudaStream_t stream) {
  constexpr unsigned kPack = 16 / sizeof(S);
  const auto launch = [&]<bool kOneDecay, bool kOneToken, int kPacks, int kRows>() {
    p.lane_bits = std::bit_width(unsigned(kRows - 1));  // each of a thread's rows has a lane of its own
    while (kPacks * kPack << p.lane_bits < p.n) ++p.lane_bits;
    const unsigned block_rows = (kThreads >> p.lane_bits) * kRows;
    launch_overlapped(update_packs<T, S, kOneDecay, kOneToken, kPacks, kRows>,
                      grid((p.p + block_rows - 1) / block_rows, p.h, p.b), kThreads, 0, stream, p);
  };
  const auto by_size = [&]<bool kOneDecay>() {
    const bool two = p.n > 32 * kPack;
    if (p.t == 1)
      two ? launch.template operator()<kOneDecay, true, 2, 2>()
          : launch.template operator()<kOneDecay, true, 1, 4>();
    else
      two ? launch.template operator()<kOneDecay, false, 2, 2>()
          : launch.template operator()<kOneDecay, false, 1, 4>();
  };
  view.A.stride[2] == 0 ? by_size.template operator()<true>() : by_size.template operator()<false>();
}

// Whether there is a kernel for it: of the state sizes that models have.
template <class T, class S>
bool launch_layer(const Update& view, const AnyUpdate& any, cudaStream_t stream) {
  const auto launch = [&]<bool kOneDecay, int kLaneBits>() {
    constexpr unsigned kBlockRows = (kThreadsLayer >> kLaneBits) * kRowsLayer;
    if (any.n != (16 / sizeof(S)) << kLaneBits) return false;
    const auto p = as_layer(view, any, kOneDecay, kBlockRows);
    if (p)
      launch_overlapped(update_layer<T, S, kOneDecay, kLaneBits>, grid(any.p / kBlockRows, any.h, any.b),
                        kThreadsLayer, 0, stream, *p);
    return p.has_value();
  };
  if (view.A.stride[2] != 0) return launch.template operator()<false, 2>();
  return launch.template operator()<true, 5>() || launch.template operator()<true, 4>() ||
         launch.template operator()<true, 3>();
}

template <class R>
const char* launch_any(const Update& p, const DeviceRows& rows, cudaStream_t stream) {
  const int64_t bytes = std::max<int64_t>(p.n, 1) * (p.complex ? 2 : 1) * sizeof(R);
  const int64_t warps = std::min<int64_t>(kThreadsAny / 32, kUpdateRowBytesCuda / bytes);
  const int64_t blocks = (p.h * p.p + warps - 1) / warps;
  if (blocks > INT_MAX) return "more rows than one launch may have";
  const auto kernel = p.complex ? update_any<R, true> : update_any<R, false>;
  launch_overlapped(kernel, grid(blocks, 1, p.b), unsigned(32 * warps), size_t(warps * bytes), stream, p,
                    rows);
  return launch_error();
}

const char* launch(const Update& p, const DeviceRows& rows, void* cuda_stream) {
  if (p.b * p.h * p.p == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const DType state = p.state.dtype;
  return by_storage(p.x.dtype, [&]<class T>() -> const char* {
    if constexpr (sizeof(T) < 8) {
      const auto in_packs = [&]<class S>() {
        const auto small = packs_fit<S>(p, rows) ? narrow(p, rows) : std::nullopt;
        if (small && !launch_layer<T, S>(p, *small, stream)) launch_packs<T, S>(p, *small, stream);
        return small.has_value();
      };
      if (state == DType::f32 && in_packs.template operator()<float>()) return launch_error();
      if (state == p.x.dtype && in_packs.template operator()<T>()) return launch_error();
      if (state != DType::f64) return launch_any<float>(p, rows, stream);
    }
    return launch_any<double>(p, rows, stream);
  });
}

}  // namespace

}  // namespace gpu

const char* state_update_cuda(const ScanUpdate& p, const DeviceRows& rows, void* stream) {
  return p.dims.d == 0 ? nullptr : gpu::launch(gpu::as_update(p), rows, stream);
}

const char* state_update_cuda(const SsdUpdate& p, const DeviceRows& rows, void* stream) {
  return gpu::launch(gpu::as_update(p), rows, stream);
}

}  // namespace mamba_ops

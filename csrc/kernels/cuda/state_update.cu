// One token, or a few, of the selective scan and of the SSD, with the state in place.
//
//   dt = clamp(softplus?(dt + bias));  h <- exp(dt A) h + dt x B;  y = (k Re(C h) + D x) silu(z)
//
// To the kernels both are rows (head, channel) of n states, where the rows of a head share B and C: a head of
// the SSD, whose rows share dt and A too, or the neighbouring channels of a scan that have their groups of B
// and C in common.
//
// A block takes consecutive rows of one head and one batch row. Their states are on their way in packs of 16
// bytes, four a thread, while one thread a row makes its step, skip and gate. Then a team of threads (a power
// of two up to a warp) owns a row, a thread one or two packs of it, and y is summed over the team by
// shuffles. Shared memory: three values a row, at most 1.5 KiB. States in other strides or sizes, float64 and
// complex ones: a warp owns a row and keeps it in shared memory. Every order is fixed: bitwise repeatable.
//
// Bound by memory: SSD b128 h80 p64 n128 with a float32 state takes 0.245 ms on an H100, 2.7 TB/s where a
// copy has 3.0 (issue slots 48 % busy; the warps wait at the barrier for the one that makes the steps).
#include <algorithm>
#include <climits>

#include "kernels/cuda/bits.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/state_rows.cuh"
#include "kernels/state_update.h"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int kThreads = 128, kPacksOfThread = 4;

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

Update as_update(const ScanUpdate& s) {
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

Update as_update(const SsdUpdate& s) {
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

template <class R>
__device__ inline R step_size(const Update& p, R dt, R bias) {
  dt += bias;
  if (p.softplus) dt = softplus(dt);
  return dt < R(p.dt_min) ? R(p.dt_min) : dt > R(p.dt_max) ? R(p.dt_max) : dt;  // NaN stays
}

template <class R>
__device__ inline R rate_of(const Update& p, R A) {
  return p.A_is_log ? -exp(A) : A;
}

// ---- Packs of 16 bytes

struct Teams {
  int lane_bits;  // log2 of the threads of a team
  int rows;       // of a block
};

// T: of the inputs, S: of the state. kOneDecay: A is the same for all states of a row. kOneToken: t = 1, and
// the new states need no registers.
template <class T, class S, bool kOneDecay, bool kOneToken, int kPacks>
__global__ void __launch_bounds__(kThreads, !kOneToken  ? 4
                                            : kOneDecay ? 8
                                                        : 6)
    update_packs(const Update p, const Teams teams, const DeviceRows rows) {
  constexpr int kPack = 16 / sizeof(S), kRows = kPacksOfThread / kPacks;
  __shared__ float2 s_step[kThreads];  // of each row: dt x, and its decay (or dt)
  __shared__ float s_out[kThreads];
  const unsigned head = blockIdx.y;
  const int64_t block_row = int64_t(blockIdx.x) * teams.rows;
  const int rows_here = int(p.p - block_row < teams.rows ? p.p - block_row : teams.rows);
  // In the recurrence: rows team, team + apart, ... of the block, columns of each pack k.
  const int lanes = 1 << teams.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int team = threadIdx.x >> teams.lane_bits, apart = kThreads >> teams.lane_bits;
  const auto column = [&](int k) { return (k * lanes + lane) * kPack; };
  const auto has = [&](int r, int k) { return team + r * apart < rows_here && column(k) < p.n; };
  // Before and after it: one row a thread.
  const bool owner = int(threadIdx.x) < rows_here;
  const int64_t own_row = block_row + threadIdx.x;
  const auto group_of = [&](int64_t heads) { return heads == p.h ? 0 : head / unsigned(heads); };
  const int64_t group_B = group_of(p.heads_per_B), group_C = group_of(p.heads_per_C);
  overlap();
  uint32_t bias_bits = 0, A_bits = 0, D_bits = 0;
  if (owner) {
    const auto bits = [&](const View& v) { return load_bits(v, head * v.stride[0] + own_row * v.stride[1]); };
    bias_bits = bits(p.dt_bias);
    if (kOneDecay) A_bits = bits(p.A);
    D_bits = bits(p.D);
  }

  const auto update = [&](int64_t b, int64_t state_row) {
    S* const states =
        static_cast<S*>(p.state.data) + offset(p.state, state_row, head, block_row + team, lane * kPack);
    T x, dt, z;  // of the token, asked for before the states, behind which they would wait
    const auto ask = [&](int64_t t) {
      const auto value = [&](const View& v) {
        return static_cast<const T*>(v.data)[offset(v, b, t, head, own_row)];
      };
      if (!owner || t >= p.t) return;
      x = value(p.x);
      dt = value(p.dt);
      if (p.z.data) z = value(p.z);
    };
    ask(0);
    const auto stored = [&](int r, int k) {
      return reinterpret_cast<Pack<S, kPack>*>(states + r * apart * p.state.stride[2] + k * lanes * kPack);
    };
    Pack<S, kPack> pack[kRows][kPacks] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (has(r, k)) pack[r][k] = *stored(r, k);
    float h[kRows][kPacks][kPack];
    for (int64_t t = 0; t < (kOneToken ? 1 : p.t); ++t) {
      Pack<T, kPack> B[kPacks] = {}, C[kPacks] = {};
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (column(k) < p.n) {
          const auto load = [&](const View& v, int64_t group) {
            return *reinterpret_cast<const Pack<T, kPack>*>(static_cast<const T*>(v.data) +
                                                            offset(v, b, t, group, column(k)));
          };
          B[k] = load(p.B, group_B);
          C[k] = load(p.C, group_C);
        }
      float skip = 0, gate = 1;
      if (owner) {
        const float x_now = to_real(x),
                    step = step_size(p, to_real(dt), from_bits(bias_bits, p.dt_bias.dtype));
        if (p.z.data) gate = silu(to_real(z));
        const float A = rate_of(p, from_bits(A_bits, p.A.dtype));
        s_step[threadIdx.x] = {step * x_now, kOneDecay ? expf(step * A) : step};
        if (p.D.data) skip = from_bits(D_bits, p.D.dtype) * x_now;
      }
      if (!kOneToken) ask(t + 1);
      __syncthreads();
      float out[kRows] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float2 step = s_step[team + r * apart];
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          Pack<float, kPack> rate = {};
          if (!kOneDecay && has(r, k))
            rate = *reinterpret_cast<const Pack<float, kPack>*>(
                static_cast<const float*>(p.A.data) + head * p.A.stride[0] +
                (block_row + team + r * apart) * p.A.stride[1] + column(k));
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            if (t == 0) h[r][k][i] = pack[r][k].at(i);
            const float decay = kOneDecay ? step.y : expf(step.y * rate.at(i));
            h[r][k][i] = decay * h[r][k][i] + step.x * B[k].at(i);
            out[r] += C[k].at(i) * h[r][k][i];
          }
          if (kOneToken && has(r, k)) *stored(r, k) = to_pack<S>(h[r][k]);
        }
      }
      for (int k = lanes / 2; k > 0; k /= 2)
#pragma unroll
        for (int r = 0; r < kRows; ++r) out[r] += __shfl_xor_sync(0xffffffffu, out[r], k);
      if (lane == 0)
#pragma unroll
        for (int r = 0; r < kRows; ++r) s_out[team + r * apart] = out[r];
      __syncthreads();
      if (owner)
        static_cast<T*>(p.y.data)[offset(p.y, b, t, head, own_row)] =
            from_real<T>((s_out[threadIdx.x] + skip) * gate);
    }
    if (!kOneToken && p.t > 0)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int k = 0; k < kPacks; ++k)
          if (has(r, k)) *stored(r, k) = to_pack<S>(h[r][k]);
  };
  const auto fill = [&](int64_t b, float value) {
    for (int64_t t = 0; owner && t < p.t; ++t)
      static_cast<T*>(p.y.data)[offset(p.y, b, t, head, own_row)] = from_real<T>(value);
  };
  for_rows(rows, p.b, update, fill);
}

// ---- Anything else

// A warp owns a row; its lanes keep states lane, lane + 32, ... in shared memory, each for itself.
template <class R, bool kComplex>
__global__ void __launch_bounds__(kThreads) update_any(const Update p, const DeviceRows rows) {
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
      for (int k = 16; k > 0; k /= 2) out += __shfl_xor_sync(0xffffffffu, out, k);
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

constexpr int64_t kMaxGrid = 65535;  // in y and z

dim3 grid(int64_t blocks, int64_t heads, const Update& p) {
  return {unsigned(blocks), unsigned(heads), unsigned(std::min(p.b, kMaxGrid))};
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
const char* launch_packs(const Update& p, const DeviceRows& rows, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(S);
  const int packs = p.n > 32 * kPack ? 2 : 1;
  Teams teams{.lane_bits = 2};  // a block has a thread for each of its rows
  while (packs * kPack << teams.lane_bits < p.n) ++teams.lane_bits;
  teams.rows = (kThreads >> teams.lane_bits) * (kPacksOfThread / packs);
  const int64_t blocks = (p.p + teams.rows - 1) / teams.rows;
  if (blocks > INT_MAX) return "more rows than one launch may have";
  const bool one_decay = p.A.stride[2] == 0;
  const auto kernel_of = [&]<int kPacks>() {
    return one_decay
               ? (p.t == 1 ? update_packs<T, S, true, true, kPacks> : update_packs<T, S, true, false, kPacks>)
               : (p.t == 1 ? update_packs<T, S, false, true, kPacks>
                           : update_packs<T, S, false, false, kPacks>);
  };
  const auto kernel = packs == 1 ? kernel_of.template operator()<1>() : kernel_of.template operator()<2>();
  launch_overlapped(kernel, grid(blocks, p.h, p), kThreads, 0, stream, p, teams, rows);
  return launch_error();
}

template <class R>
const char* launch_any(const Update& p, const DeviceRows& rows, cudaStream_t stream) {
  const int64_t bytes = std::max<int64_t>(p.n, 1) * (p.complex ? 2 : 1) * sizeof(R);
  const int64_t warps = std::min<int64_t>(kThreads / 32, kUpdateRowBytesCuda / bytes);
  const int64_t blocks = (p.h * p.p + warps - 1) / warps;
  if (blocks > INT_MAX) return "more rows than one launch may have";
  const auto kernel = p.complex ? update_any<R, true> : update_any<R, false>;
  launch_overlapped(kernel, grid(blocks, 1, p), unsigned(32 * warps), size_t(warps * bytes), stream, p, rows);
  return launch_error();
}

const char* launch(const Update& p, const DeviceRows& rows, void* cuda_stream) {
  if (p.b * p.h * p.p == 0) return nullptr;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const DType state = p.state.dtype;
  return by_storage(p.x.dtype, [&]<class T>() -> const char* {
    if constexpr (sizeof(T) < 8) {
      if (state == DType::f32 && packs_fit<float>(p, rows)) return launch_packs<T, float>(p, rows, stream);
      if (state == p.x.dtype && packs_fit<T>(p, rows)) return launch_packs<T, T>(p, rows, stream);
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

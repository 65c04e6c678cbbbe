// Gated RMS norm, forward.
//
//   after the gate:  v = x silu(z), y = v r w;   before it:  v = x, y = v r w silu(z);
//   r = (mean v^2 + eps)^-1/2 over a group
//
// A team of threads owns one group in the rows of a unit (see norm.cuh): it reads a row once, holds v and the
// weights in registers, and meets for the sum of squares. Shared memory: the sums of the warps, 128 bytes.
//
// Bound by memory: 16384 x 5120 bfloat16 with z take 0.173 ms on an H100, 2.9 TB/s of its bytes where a copy
// has 3.0; DRAM at 89 % of its peak by ncu.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/norm.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int64_t kThreads = 1 << 21;  // of a large call: units of a few rows even out

template <class T, Gate kGate>
__global__ void __launch_bounds__(kNormThreads, kGate != Gate::any ? 2 : 1)
    norm_fwd(const NormFwd p, const NormCut cut, const NormRows<T> x, const NormRows<T> z,
             const NormRows<T> y, const bool weight_vector) {
  using R = Real<T>;
  constexpr bool kPlain = kGate != Gate::any;
  constexpr int kPack = NormRows<T>::kPack, kPacks = kNormValues<R> / kPack;
  using Packs = NormPacks<T, kPacks, kPlain>;
  __shared__ R s_sums[2][kNormThreads / 32][1];
  const NormDims& dims = p.dims;
  const NormTeam me(cut);
  overlap();
  if (me.unit >= cut.units) return;
  const bool gated = kPlain ? kGate != Gate::none : z.data != nullptr;
  const bool before = kPlain ? kGate == Gate::before : dims.norm_before_gate;
  const bool one_span = kPlain || cut.spans == 1;
  const int64_t spans = one_span ? 1 : cut.spans;
  const R mean = R(1) / R(dims.group), eps = R(dims.eps);
  TeamSums<R, 1> sum_team{s_sums};

  R v[kPacks][kPack], weight[kPacks][kPack];
  Pack<T, kPack> gate[kPacks];
  // v of a span; returns the sum of its squares.
  const auto read = [&](const Packs& packs, int64_t row) {
    Pack<T, kPack> pack[kPacks];
    const T *from_x = packs.row(x, dims, row), *from_z = packs.row(z, dims, row);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      pack[k] = packs.load(from_x, x, k);
      if (gated) gate[k] = packs.load(from_z, z, k);
    }
    R squares = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        v[k][i] = pack[k].at(i);
        if (gated && !before) v[k][i] *= silu(gate[k].at(i));
        squares += v[k][i] * v[k][i];
      }
    return squares;
  };

  Packs packs(me, dims, 0);
  if (one_span) packs.load_weight(weight, p.weight, weight_vector);
  const int64_t begin = me.unit, end = dims.rows(), step = cut.units;
  for (int64_t row = begin; row < end; row += step) {
    R squares[1] = {0};
    for (int64_t span = 0; span < spans; ++span)
      squares[0] += read(one_span ? packs : Packs(me, dims, span), row);
    sum_team(me, squares);
    const R scale = norm_scale(squares[0], mean, eps);
    for (int64_t span = 0; span < spans; ++span) {
      if (!one_span) {
        packs = Packs(me, dims, span);
        packs.load_weight(weight, p.weight, weight_vector);
        read(packs, row);
      }
      T* to = packs.row(y, dims, row);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          v[k][i] *= scale * weight[k][i];
          if (gated && before) v[k][i] *= silu(gate[k].at(i));
        }
        packs.store(to, y, k, v[k]);
      }
    }
  }
}

}  // namespace

}  // namespace gpu

const char* rms_norm_gated_fwd_cuda(const NormFwd& p, void* cuda_stream) {
  using namespace gpu;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const NormDims& dims = p.dims;
  if (dims.rows() * dims.d == 0) return nullptr;
  return by_storage(p.x.dtype, [&]<class T>() -> const char* {
    const NormCut cut = norm_cut<Real<T>>(dims, kThreads, INT64_MAX);
    if (!cut.fits()) return "more groups than one launch may have";
    const NormRows<T> x(p.x, dims), z(p.z, dims), y(p.y, dims);
    auto kernel = norm_fwd<T, Gate::any>;
    if constexpr (sizeof(T) < 8)
      if (norm_is_plain<T>(p, cut, {x, z, y}))
        kernel = by_gate(p, [&]<Gate kGate>() { return norm_fwd<T, kGate>; });
    launch_overlapped(kernel, unsigned(cut.blocks), cut.threads, 0, stream, p, cut, x, z, y,
                      weight_packs_align<T>(p));
    return launch_error();
  });
}

}  // namespace mamba_ops

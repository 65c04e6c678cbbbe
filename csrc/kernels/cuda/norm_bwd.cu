// Gated RMS norm, backward.
//
//   gn = gy, or gy silu(z) where the norm comes before the gate;  q = gn w;  x^ = v r
//   gv = r (q - v r^2 mean(q v));  gw = sum_rows gn x^
//   after the gate:  gx = gv silu(z), gz = gv x silu'(z);   before it:  gx = gv, gz = gy x^ w silu'(z)
//   and y, the forward's result, for whoever needs it again
//
// A team of threads owns one group in the rows of a unit (see norm.cuh): it reads a row once and meets for
// the sums of v^2 and q v, so that r is computed again, not saved. A thread keeps its part of gw over the
// rows of the unit in registers; one partial row per unit, which norm_reduce adds in order: no atomics,
// bitwise repeatable, the same on every GPU. Groups that take several spans keep their part of gw in the
// partial row itself. Shared memory: the sums of the warps, 256 bytes (512 in double); in the plain kernel
// also a thread's own packs of x, z and dy, of this row and of the next one, which is on its way meanwhile:
// 192 bytes a thread (384 of float).
//
// Bound by memory: 16384 x 5120 bfloat16 with z take 0.252 ms on an H200, norm_reduce included, and 0.278
// with y: 3.3 and 3.6 TB/s where a copy has 4.2; DRAM at 84 % of its peak by ncu on an H100. The slots
// matter: with those of a thread side by side it took 0.415 ms on an H100 instead of 0.311, every 16 bytes a
// request of their own to the L2 cache, whose tags were busy 77 % of the time.
#include <cuda_pipeline.h>

#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/reduce.cuh"

namespace mamba_ops {

namespace gpu {

namespace {

constexpr int64_t kThreads = 1 << 17, kPartial = 1 << 22;  // of a large call; values in `partial`

// Where a plain thread's packs of this row and of the next one arrive: slots of its own, so that nobody has
// to wait for another thread. Those of neighbouring threads are neighbours: a warp copies whole lines.
template <class T, int kPacks>
struct NormArrivals {
  using Slot = Pack<T, NormRows<T>::kPack>;
  static constexpr int kOfRow = 3 * kPacks, kSlots = 2 * kOfRow;

  const Slot* slots;
  uint32_t address;  // of slots, in shared memory

  __device__ explicit NormArrivals(void* memory)
      : slots(static_cast<Slot*>(memory) + threadIdx.x),
        address(static_cast<uint32_t>(__cvta_generic_to_shared(slots))) {}

  // half: 0 and 1 in turns.
  __device__ Slot at(int half, int tensor, int k) const {
    return slots[(half * kOfRow + tensor * kPacks + k) * blockDim.x];
  }
  template <class Packs>
  __device__ void fetch(const Packs& packs, const T* from, int half, int tensor) const {
    const int first = half * kOfRow + tensor * kPacks;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (packs.count(k) > 0)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + (first + k) * blockDim.x *
                                                                                     unsigned(sizeof(Slot))),
                     "l"(from + k * packs.step)
                     : "memory");
  }
};

template <class T, class R, Gate kGate>
__global__ void __maxnreg__(kGate != Gate::any ? 96 : 128)
    norm_bwd(const NormBwd p, const NormCut cut, const NormRows<T> x, const NormRows<T> z,
             const NormRows<T> dy, const NormRows<T> dx, const NormRows<T> dz, const NormRows<T> y,
             const bool weight_vector) {
  constexpr bool kPlain = kGate != Gate::any;
  constexpr int kPack = NormRows<T>::kPack, kPacks = kNormValues<R> / kPack;
  using Packs = NormPacks<T, kPacks, kPlain>;
  using Arrivals = NormArrivals<T, kPacks>;
  __shared__ R s_sums[2][kNormThreads / 32][2];
  extern __shared__ uint4 s_arrivals[];
  const Arrivals arrivals(s_arrivals);
  const NormDims& dims = p.fwd.dims;
  const NormTeam me(cut);
  if (me.unit >= cut.units) return;
  const bool gated = kPlain ? kGate != Gate::none : z.data != nullptr;
  const bool before = kPlain ? kGate == Gate::before : dims.norm_before_gate;
  const bool one_span = kPlain || cut.spans == 1;
  const int64_t spans = one_span ? 1 : cut.spans;
  const R mean = R(1) / R(dims.group), eps = R(dims.eps);
  TeamSums<R, 2> sum_team{s_sums};

  int half = 0;  // where the row's packs are
  Pack<T, kPack> pack_x[kPacks], pack_z[kPacks], pack_dy[kPacks];
  R weight[kPacks][kPack], dweight[kPacks][kPack] = {};
  const auto load = [&](const Packs& packs, int64_t row, int k) {
    const auto one = [&](const NormRows<T>& from, int tensor) {
      if constexpr (!kPlain) return packs.load(packs.row(from, dims, row), from, k);
      return packs.count(k) > 0 ? arrivals.at(half, tensor, k) : Pack<T, kPack>{};
    };
    pack_x[k] = one(x, 0);
    pack_dy[k] = one(dy, 1);
    if (gated) pack_z[k] = one(z, 2);
  };
  // A span as stored, and the sigmoid of its z; adds to the sums of v^2 and q v.
  const auto read = [&](const Packs& packs, int64_t row, R(&sums)[2]) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) load(packs, row, k);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        R v = pack_x[k].at(i), q = R(pack_dy[k].at(i)) * weight[k][i];
        if (gated) {
          const R zi = pack_z[k].at(i);
          (before ? q : v) *= zi * sigmoid(zi);
        }
        sums[0] += v * v;
        sums[1] += q * v;
      }
  };

  Packs packs(me, dims, 0);
  if (one_span) packs.load_weight(weight, p.fwd.weight, weight_vector);
  R* partial = static_cast<R*>(p.partial) + me.unit * dims.d + packs.group_column;
  const int64_t begin = me.unit, end = dims.rows(), step = cut.units;
  const auto fetch = [&](int64_t row, int to) {
    if (row < end) {
      arrivals.fetch(packs, packs.row(x, dims, row), to, 0);
      arrivals.fetch(packs, packs.row(dy, dims, row), to, 1);
      if (gated) arrivals.fetch(packs, packs.row(z, dims, row), to, 2);
    }
    __pipeline_commit();
  };
  if (kPlain) fetch(begin, 0);
  for (int64_t row = begin; row < end; row += step, half ^= 1) {
    if (kPlain) {
      fetch(row + step, half ^ 1);
      __pipeline_wait_prior(1);
    }
    R sums[2] = {};
    for (int64_t span = 0; span < spans; ++span) {
      if (!one_span) {
        packs = Packs(me, dims, span);
        packs.load_weight(weight, p.fwd.weight, weight_vector);
      }
      read(packs, row, sums);
    }
    sum_team(me, sums);
    const R r = norm_scale(sums[0], mean, eps), c = r * r * r * (sums[1] * mean);
    for (int64_t span = 0; span < spans; ++span) {
      if (!one_span) {
        R again[2] = {};
        packs = Packs(me, dims, span);
        packs.load_weight(weight, p.fwd.weight, weight_vector);
        read(packs, row, again);
      }
      T *to_x = packs.row(dx, dims, row), *to_z = packs.row(dz, dims, row);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (kPlain) load(packs, row, k);  // rather than hold them in registers
        Real<T> gx[kPack], gz[kPack], again[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const R xi = pack_x[k].at(i), gy = pack_dy[k].at(i), w = weight[k][i];
          R gate = 1, slope = 0;
          if (gated) {
            const R zi = pack_z[k].at(i), s = sigmoid(zi);
            gate = zi * s;
            slope = s * (1 + zi * (1 - s));
          }
          const R v = before ? xi : xi * gate, gn = before ? gy * gate : gy;
          const R gv = gn * w * r - v * c, share = gn * (v * r);
          gx[i] = before ? gv : gv * gate;
          const R normed = v * r * w;
          gz[i] = before ? gy * normed * slope : gv * xi * slope;
          again[i] = before ? normed * gate : normed;
          if (one_span)
            dweight[k][i] += share;
          else if (i < packs.count(k))
            partial[packs.column(k) + i] = share + (row == begin ? 0 : partial[packs.column(k) + i]);
        }
        packs.store(to_x, dx, k, gx);
        if (gated) packs.store(to_z, dz, k, gz);
        if (y.data) packs.store(packs.row(y, dims, row), y, k, again);
      }
    }
  }
  if (one_span)
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (i < packs.count(k)) partial[packs.column(k) + i] = dweight[k][i];
}

// dweight from the partial sums of the units.
template <class R>
__global__ void __launch_bounds__(kReduceThreads) norm_reduce(const NormBwd p, int64_t units) {
  const int64_t d = p.fwd.dims.d,
                column = int64_t(blockIdx.x) * kReduceColumns + threadIdx.x % kReduceColumns;
  const double total = sum_column(static_cast<const R*>(p.partial) + column, units, d, column < d);
  if (threadIdx.x < kReduceColumns && column < d) store_one(p.dweight, column * p.dweight.stride[0], total);
}

// Whether a block of this GPU may have so many bytes of dynamic shared memory.
template <class Kernel>
bool may_share(Kernel* kernel, int bytes) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess)
    return true;
  cudaGetLastError();
  return false;
}

template <class T, class R>
const char* launch(const NormBwd& p, cudaStream_t stream) {
  const NormDims& dims = p.fwd.dims;
  const NormCut cut = norm_cut<R>(dims, kThreads, kPartial);
  if (cut.blocks > 0) {
    if (!cut.fits()) return "more groups than one launch may have";
    const NormRows<T> x(p.fwd.x, dims), z(p.fwd.z, dims), dy(p.dy, dims), dx(p.dx, dims), dz(p.dz, dims),
        y(p.fwd.y, dims);
    int shared = cut.threads * 16 * NormArrivals<T, kNormValues<R> / NormRows<T>::kPack>::kSlots;
    auto kernel = norm_bwd<T, R, Gate::any>;
    if constexpr (sizeof(R) < 8) {
      const auto plain = by_gate(p.fwd, [&]<Gate kGate>() { return norm_bwd<T, R, kGate>; });
      if (norm_is_plain<T>(p.fwd, cut, {x, z, dy, dx, dz, y}) && may_share(plain, shared)) kernel = plain;
    }
    if (kernel == norm_bwd<T, R, Gate::any>) shared = 0;
    kernel<<<unsigned(cut.blocks), cut.threads, shared, stream>>>(p, cut, x, z, dy, dx, dz, y,
                                                                  weight_packs_align<T>(p.fwd));
    if (const char* error = launch_error()) return error;
  }
  if (dims.d > 0)
    norm_reduce<R><<<unsigned(reduce_blocks(dims.d)), kReduceThreads, 0, stream>>>(p, cut.units);
  return launch_error();
}

}  // namespace

}  // namespace gpu

int64_t rms_norm_gated_bwd_units_cuda(const NormDims& dims, bool wide) {
  using namespace gpu;
  return (wide ? norm_cut<double>(dims, kThreads, kPartial) : norm_cut<float>(dims, kThreads, kPartial))
      .units;
}

const char* rms_norm_gated_bwd_cuda(const NormBwd& p, bool wide, void* cuda_stream) {
  using namespace gpu;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  return by_storage(p.fwd.x.dtype, [&]<class T>() -> const char* {
    return wide ? launch<T, double>(p, stream) : launch<T, Real<T>>(p, stream);
  });
}

}  // namespace mamba_ops

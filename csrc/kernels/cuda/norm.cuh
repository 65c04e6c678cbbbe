// What forward and backward of the gated norm share: how a launch is cut, a thread's values, sums of a team.
//
// A team of threads owns one group of columns in the rows of a unit: every so many rows one, so that all
// teams move through the tensors together. A thread has kValues values of a row
// in registers, in packs of 16 bytes that lie along the team: pack k of thread `lane` begins at column
// (k lanes + lane) kPack of the group. A group that is longer than what the team holds takes several spans,
// and every row is read twice. Teams of up to 32 threads share a block; a larger team is a block.
#pragma once
#include <climits>

#include "kernels/cuda/load_store.cuh"
#include "kernels/norm.h"

namespace mamba_ops::gpu {

inline constexpr int kNormThreads = 512;       // most of a block
inline constexpr int kNormSmallThreads = 128;  // of a block of several teams

template <class R>
inline constexpr int kNormValues = sizeof(R) == 4 ? 16 : 8;

// ---- Host

struct NormCut {
  int lanes, threads;  // of a team; of a block
  int64_t spans, groups;
  int64_t units;
  int64_t blocks;

  bool fits() const { return blocks <= INT_MAX; }
};

// About `threads` threads in all, and at most `values` values in one row of all units.
template <class R>
NormCut norm_cut(const NormDims& dims, int64_t threads, int64_t values) {
  const int64_t wanted = std::max<int64_t>((dims.group + kNormValues<R> - 1) / kNormValues<R>, 1);
  NormCut cut{.lanes = 1, .groups = dims.groups()};
  while (cut.lanes < 32 && cut.lanes < wanted) cut.lanes *= 2;
  if (wanted > 32) cut.lanes = int(std::min<int64_t>((wanted + 31) / 32 * 32, kNormThreads));
  cut.threads = std::max(cut.lanes, kNormSmallThreads);
  if (cut.lanes > 32) cut.threads = cut.lanes;
  cut.spans = (wanted + cut.lanes - 1) / cut.lanes;
  const int64_t rows = dims.rows();
  if (rows * dims.d == 0) return cut;
  const int64_t most = std::max<int64_t>(std::min(threads / (cut.groups * cut.lanes), values / dims.d), 1);
  const int64_t unit_rows = (rows + most - 1) / most;
  cut.units = (rows + unit_rows - 1) / unit_rows;
  const int teams = cut.threads / cut.lanes;
  cut.blocks = (cut.units * cut.groups + teams - 1) / teams;
  return cut;
}

// Whether there is a gate and where the norm is, in kernels compiled for it; `any` looks.
enum class Gate { any, none, after, before };

// A (lead, d) tensor with its storage type.
template <class T>
struct NormRows {
  static constexpr int kPack = 16 / sizeof(T);

  T* data;
  int64_t stride[4];
  bool vector;  // the packs of a thread are contiguous and aligned

  NormRows(const View& v, const NormDims& dims)
      : data(static_cast<T*>(v.data)), stride{v.stride[0], v.stride[1], v.stride[2], v.stride[3]} {
    vector = packs_align(v, 3, {dims.lead[0], dims.lead[1], dims.lead[2]}, kPack) &&
             (dims.groups() == 1 || dims.group % kPack == 0);
  }
};

template <class T>
bool weight_packs_align(const NormFwd& p) {
  constexpr int kPack = 16 / sizeof(T);
  return packs_align(p.weight, 0, {}, kPack) && (p.dims.groups() == 1 || p.dims.group % kPack == 0);
}

// Whether the kernels without loops over spans, strides and parts of packs will do.
template <class T>
bool norm_is_plain(const NormFwd& p, const NormCut& cut, std::initializer_list<NormRows<T>> tensors) {
  const NormDims& dims = p.dims;
  bool plain = cut.spans == 1 && dims.lead[0] * dims.lead[1] == 1 && dims.group % NormRows<T>::kPack == 0 &&
               weight_packs_align<T>(p);
  for (const NormRows<T>& rows : tensors) plain = plain && (!rows.data || rows.vector);
  return plain;
}

// f.template operator()<gate>() for a plain call.
template <class F>
auto by_gate(const NormFwd& p, F f) {
  if (!p.z) return f.template operator()<Gate::none>();
  return p.dims.norm_before_gate ? f.template operator()<Gate::before>()
                                 : f.template operator()<Gate::after>();
}

// ---- Device

// Where a thread stands. Teams take the groups of one unit next to each other.
struct NormTeam {
  int64_t unit, group;
  int lane, lanes;

  __device__ explicit NormTeam(const NormCut& cut) : lanes(cut.lanes) {
    const int teams = blockDim.x / lanes;
    const int64_t team = int64_t(blockIdx.x) * teams + threadIdx.x / lanes;
    unit = team / cut.groups;
    group = team - unit * cut.groups;
    lane = threadIdx.x % lanes;
  }
};

// A thread's packs in one span of its group. kPlain: of norm_is_plain.
template <class T, int kPacks, bool kPlain>
struct NormPacks {
  static constexpr int kPack = NormRows<T>::kPack;
  using Column = std::conditional_t<kPlain, int, int64_t>;

  Column first, step, group;  // first pack, from one to the next, size of the group
  int64_t group_column;

  __device__ NormPacks(const NormTeam& me, const NormDims& dims, int64_t span)
      : first((Column(span) * kPacks * me.lanes + me.lane) * kPack),
        step(me.lanes * kPack),
        group(dims.group),
        group_column(me.group * dims.group) {}

  __device__ Column column(int k) const { return first + k * step; }
  // Values of pack k that the group has, possibly none.
  __device__ Column count(int k) const { return group - column(k); }

  // Where the thread's packs of a row begin.
  __device__ T* row(const NormRows<T>& rows, const NormDims& dims, int64_t row) const {
    if (kPlain) return rows.data + row * rows.stride[2] + (group_column + first);
    const int64_t i1 = row / dims.lead[2], i2 = row - i1 * dims.lead[2], i0 = i1 / dims.lead[1];
    return rows.data + i0 * rows.stride[0] + (i1 - i0 * dims.lead[1]) * rows.stride[1] + i2 * rows.stride[2] +
           (group_column + first) * rows.stride[3];
  }
  __device__ Pack<T, kPack> load(const T* row, const NormRows<T>& rows, int k) const {
    if constexpr (kPlain)
      return count(k) > 0 ? *reinterpret_cast<const Pack<T, kPack>*>(row + k * step) : Pack<T, kPack>{};
    else
      return load_pack<kPack>(row + k * step * rows.stride[3], rows.stride[3], count(k), rows.vector);
  }
  template <class R>
  __device__ void store(T* row, const NormRows<T>& rows, int k, const R (&v)[kPack]) const {
    if constexpr (kPlain) {
      if (count(k) > 0) *reinterpret_cast<Pack<T, kPack>*>(row + k * step) = to_pack<T>(v);
    } else {
      store_values(row + k * step * rows.stride[3], rows.stride[3], count(k), rows.vector, v);
    }
  }
  template <class R>
  __device__ void load_weight(R (&weight)[kPacks][kPack], const View& v, bool vector) const {
    with_data(v, [&](const auto* data) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const auto pack = load_pack<kPack>(data + (group_column + column(k)) * v.stride[0], v.stride[0],
                                           count(k), kPlain || vector);
#pragma unroll
        for (int i = 0; i < kPack; ++i) weight[k][i] = R(pack.at(i));
      }
    });
  }
};

// Sums over a team, which all its threads get. Every order is fixed: bitwise repeatable. Teams that share a
// warp call it together, until they exit. A team larger than a warp meets at one barrier a call: the next
// call writes into the other half of s_sums.
template <class R, int kSums>
struct TeamSums {
  R (*s_sums)[kNormThreads / 32][kSums];  // [2], one row of sums for each warp
  int half = 0;

  __device__ void operator()(const NormTeam& me, R (&sums)[kSums]) {
#pragma unroll
    for (int k = 16; k > 0; k /= 2)
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const R other = __shfl_xor_sync(kAllLanes, sums[i], k);
        if (k < me.lanes) sums[i] += other;
      }
    if (me.lanes <= 32) return;
    constexpr int kWarps = kNormThreads / 32;
    const int lane = threadIdx.x % 32;
    R(*s_warps)[kSums] = s_sums[half];
    half ^= 1;
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < kSums; ++i) s_warps[threadIdx.x / 32][i] = sums[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      sums[i] = lane % kWarps < me.lanes / 32 ? s_warps[lane % kWarps][i] : R(0);
#pragma unroll
    for (int k = kWarps / 2; k > 0; k /= 2)
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], k);
  }
};

template <class R>
__device__ inline R norm_scale(R squares, R mean, R eps) {
  return rsqrt(squares * mean + eps);
}

}  // namespace mamba_ops::gpu

// What the tuned kernels of the selective scan share: which calls they take, and how a warp moves tokens.
// They take real A of 16 states, B and C that depend on the input, one storage type, and no packs.
//
// A warp takes 8 channels of a row through groups of 8 tokens. In a group a lane 4 g + q owns the tokens 2 q
// and 2 q + 1 of channel g, or the channels 2 q and 2 q + 1 of token g: it makes their steps and finishes
// what is stored for them.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <limits>
#include <optional>

#include "kernels/cuda/device.h"
#include "kernels/cuda/load_store.cuh"
#include "kernels/cuda/selective_scan.h"
#include "kernels/selective_scan.h"

namespace mamba_ops::gpu {

inline constexpr int kWarp = 32;
inline constexpr int kGroup = 8;  // tokens
inline constexpr int kWarpChannels = 8;
inline constexpr int kTunedState = 16;

inline constexpr float kToLog2 = 1.44269504f, kFromLog2 = 0.69314718f;

__device__ inline float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Keeps the compiler from making a value anew where it could stay in its register.
__device__ inline void keep(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ inline void keep(int& v) { asm volatile("" : "+r"(v)); }
__device__ inline void keep(float& v) { asm volatile("" : "+f"(v)); }

// An 8 x 8 matrix of 16-bit values, a row in every quad of lanes: transposed.
__device__ inline uint32_t transpose(uint32_t pair) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(pair));
  return y;
}

// N neighbouring values of 4 bytes or less each, through the read-only path, issued where they stand.
template <int N, class T>
__device__ inline Pack<T, N> load_now(const T* p) {
  constexpr int kWords = N * int(sizeof(T)) / 4;
  Pack<T, N> v;
  uint32_t* w = reinterpret_cast<uint32_t*>(v.word);
  if constexpr (kWords == 1)
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(w[0]) : "l"(p));
  else if constexpr (kWords == 2)
    asm volatile("ld.global.nc.v2.b32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  else
    asm volatile("ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p));
  return v;
}

template <class T>
__device__ inline Pack<T, 2> to_pair(float2 v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(v.x, v.y);
    return {{*reinterpret_cast<const uint32_t*>(&both)}};
  } else if constexpr (std::is_same_v<T, f16>) {
    const __half2 both = __floats2half2_rn(v.x, v.y);
    return {{*reinterpret_cast<const uint32_t*>(&both)}};
  } else {
    return {{v.x, v.y}};
  }
}

template <class T>
__device__ inline void move(T*& p, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  p = reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + bytes);
}
// The same for global memory, where registers are short: the pointer stays one pair of them, of which the
// compiler would else step a copy for every use.
template <class T>
__device__ inline void step(T*& p, int64_t bytes) {
  size_t address = __cvta_generic_to_global(p) + bytes;
  asm volatile("" : "+l"(address));
  p = static_cast<T*>(__cvta_global_to_generic(address));
}

__host__ __device__ inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
// Bytes from a group of tokens to the next; tokens lie along `axis`. Below 2^31: see kMaxStride.
__host__ __device__ inline int64_t group_bytes(const View& v, int axis) {
  return v.stride[axis] * size_of(v.dtype) * kGroup;
}

// ---- Tokens

enum class Along { channels, tokens };

// A lane's place in a (b, d, l) tensor that is contiguous along kAlong; it steps from group to group. In a
// group the lane owns a pair of values along kOwns: the tokens 2 q and 2 q + 1 of channel g, or the channels
// 2 q and 2 q + 1 of token g. 4-byte values are moved by their owner; 16-bit ones in pairs along kAlong,
// transposed between load() and values() where that is not kOwns.
template <class T, Along kAlong, Along kOwns = Along::tokens>
struct LaneTokens {
  static constexpr Along kPair = sizeof(T) == 2 ? kAlong : kOwns;  // what a lane moves
  static constexpr bool kTransposed = kPair != kOwns, kVector = kPair == kAlong;
  T* p;

  // start: the warp's first channel, of which it has `channels`, and the group's first token. Lanes beyond
  // the last channel stand at the first one.
  __device__ LaneTokens(const View& v, void* start, int channels) : p(static_cast<T*>(start)) {
    __builtin_assume(__isGlobal(start));
    const int channel = live(channels) ? first_channel() : 0;
    p += kAlong == Along::channels ? channel + first_token() * int64_t(int(v.stride[2]))
                                   : channel * v.stride[1] + first_token();
  }
  __device__ LaneTokens(const View& v, int64_t row, int64_t channel, int channels, int64_t token)
      : LaneTokens(v,
                   static_cast<T*>(v.data) + row * v.stride[0] + channel * v.stride[1] + token * v.stride[2],
                   channels) {}
  // Whether what the lane moves exists, if `channels` of the warp do.
  __device__ static bool live(int channels) { return first_channel() < channels; }

  __device__ Pack<T, 2> load(const View& v) const {
    if constexpr (kVector)
      return load_now<2>(p);
    else
      return {{load_now<1>(p).word[0], load_now<1>(p + second(v)).word[0]}};
  }
  // Of a group of `left` < 8 tokens; zeros beyond.
  __device__ Pack<T, 2> load_some(const View& v, int left) const {
    Pack<T, 2> pair{};
#pragma unroll
    for (int k = 0; k < 2; ++k) pair.set(k, token(k) < left ? p[k * second(v)] : T{});
    return pair;
  }
  __device__ static float2 values(Pack<T, 2> pair) {
    if constexpr (kTransposed) pair.word[0] = transpose(pair.word[0]);
    return {pair.at(0), pair.at(1)};
  }
  __device__ void store(const View& v, bool live, float2 values) const {
    const Pack<T, 2> pair = turned(values);
    if (!live) return;
    if constexpr (kVector) {
      *reinterpret_cast<Pack<T, 2>*>(p) = pair;
    } else {
      p[0] = pair.word[0];
      p[second(v)] = pair.word[1];
    }
  }
  __device__ void store_some(const View& v, bool live, float2 values, int left) const {
    const Pack<T, 2> pair = turned(values);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (live && token(k) < left) p[k * second(v)] = from_real<T>(pair.at(k));
  }
  __device__ void step(int64_t bytes) { gpu::step(p, bytes); }

 private:
  static constexpr bool kTokens = kPair == Along::tokens;
  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ static int first_channel() { return kTokens ? lane() / 4 : lane() % 4 * 2; }
  __device__ static int first_token() { return kTokens ? lane() % 4 * 2 : lane() / 4; }
  __device__ static int token(int k) { return first_token() + (kTokens ? k : 0); }
  __device__ static int64_t second(const View& v) { return v.stride[kTokens ? 2 : 1]; }
  __device__ static Pack<T, 2> turned(float2 values) {
    Pack<T, 2> pair = to_pair<T>(values);
    if constexpr (kTransposed) pair.word[0] = transpose(pair.word[0]);
    return pair;
  }
};

// log2(1 + e): softplus(x) log2(e), for e = exp(x).
template <class T>
__device__ inline float softplus_log2(float e) {
  if constexpr (sizeof(T) == 4) {
    return kToLog2 * log1pf(e);
  } else {  // the logarithm is exact to 2^-22 of 1, not of itself
    const float y = log2_fast(1 + e);
    return e < 0x1p-8f ? e * fmaf(-0.5f * kToLog2, e, kToLog2) : y;
  }
}

// Up to which x step_log2 is the softplus; NaN: for none.
inline float softplus_limit(bool softplus) {
  return softplus ? 20.f : std::numeric_limits<float>::quiet_NaN();
}

// softplus(x) log2(e), or scaled = x log2(e) itself if `straight`; slope: of softplus(x) in x, or 1.
template <class T>
__device__ inline float step_log2(float scaled, bool straight, float& slope) {
  const float e = exp2_of(scaled), y = softplus_log2<T>(e);
  slope = straight ? 1.f : e * reciprocal_fast(1 + e);
  return straight ? scaled : y;
}
// The same from x, straight if x is not at most `limit`.
template <class T>
__device__ inline float step_log2(float x, float limit, float& slope) {
  return step_log2<T>(x * kToLog2, !(x <= limit), slope);
}

// The logistic function of two values, with one reciprocal.
__device__ inline float2 sigmoids(float a, float b) {
  const float p = 1 + exp2_of(-kToLog2 * fmaxf(a, -40.f)), q = 1 + exp2_of(-kToLog2 * fmaxf(b, -40.f));
  const float r = reciprocal_fast(p * q);
  return {q * r, p * r};
}

// ---- Host

// Of tokens: what a warp moves on by is counted in 32 bits.
inline constexpr int64_t kMaxStride = int64_t(1) << 23;

inline bool moves_along(const View& v, const ScanDims& dims, Along along) {
  if (!v) return true;
  return along == Along::channels ? packs_align(v, 1, {dims.b, dims.l}, 2)
                                  : packs_align(v, 2, {dims.b, dims.d}, 2);
}

inline bool takes_factor(const View& v, const ScanDims& dims, int64_t groups, Along along) {
  return (groups == 1 || dims.d / groups % kWarpChannels == 0) &&
         (along == Along::channels ? packs_align(v, 2, {dims.b, groups, dims.l}, 4)
                                   : packs_align(v, 3, {dims.b, groups, kTunedState}, 4));
}

// The axis along which the tensors can be moved, if the tuned kernels take the call; `like_u` are those of
// u's shape.
inline std::optional<Along> tuned_axis(const ScanFwd& p, const Sequences& seqs,
                                       std::initializer_list<const View*> like_u) {
  const ScanDims& dims = p.dims;
  const DType dtype = p.u.dtype;
  bool one_type = dtype != DType::f64;
  for (const View* v : {&p.delta, &p.z, &p.B, &p.C}) one_type &= !*v || v->dtype == dtype;
  bool near = p.B.stride[3] < kMaxStride && p.C.stride[3] < kMaxStride;
  for (const View* v : {&p.u, &p.delta, &p.z}) near &= v->stride[2] < kMaxStride;
  for (const View* v : like_u) near &= v->stride[2] < kMaxStride;
  if (!one_type || dims.b * dims.d * dims.l == 0 || dims.d % 2 != 0 || dims.n != kTunedState ||
      dims.complex || dims.constant_B || dims.constant_C || seqs.id.data || dims.b > kMaxGrid ||
      dims.l > INT_MAX || !near)
    return std::nullopt;
  for (const Along along : {Along::channels, Along::tokens}) {
    bool all = takes_factor(p.B, dims, dims.groups_B, along) && takes_factor(p.C, dims, dims.groups_C, along);
    for (const View* v : {&p.u, &p.delta, &p.z}) all &= moves_along(*v, dims, along);
    for (const View* v : like_u) all &= moves_along(*v, dims, along);
    if (all) return along;
  }
  return std::nullopt;
}

// f.template operator()<T, kAlong, kGate>().
template <class F>
auto by_tuned(const ScanFwd& p, Along along, F f) {
  return by_storage(p.u.dtype, [&]<class T>() -> const char* {
    if constexpr (std::is_same_v<T, double>) {
      return "not a type of the tuned kernels";
    } else {
      if (along == Along::channels)
        return p.z ? f.template operator()<T, Along::channels, true>()
                   : f.template operator()<T, Along::channels, false>();
      return p.z ? f.template operator()<T, Along::tokens, true>()
                 : f.template operator()<T, Along::tokens, false>();
    }
  });
}

}  // namespace mamba_ops::gpu

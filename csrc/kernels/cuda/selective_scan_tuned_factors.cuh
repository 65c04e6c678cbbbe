// B and C in the tuned kernels of the selective scan, and the recurrence through a group. Lane 4 g + q of a
// warp holds the states 4 q .. 4 q + 3 of channel g.
//
// float32: products and sums as they stand, B and C of a group in shared memory. 16-bit types: the two small
// products run on the tensor cores (mma, tf32), the recurrence between them stays a float32 FMA.
//   h_t C_t: the left operand is the states of an even step (rows 0..7) and of an odd step (rows 8..15), as
//     they stand in their registers; the right one is C of the 8 tokens. Of the products only the columns of
//     these two are wanted: they are with the lanes that own them. B and C are exact in tf32; of a state the
//     unit reads the upper 19 bits.
//   delta_t u_t B_t: the left operand is delta u of two steps and zeros, the right one B of four of the
//   tokens.
#pragma once
#include "kernels/cuda/selective_scan_tuned.cuh"

namespace mamba_ops::gpu {

inline constexpr int kLaneStates = 4;

// d += a b in tf32. Lane (g, q): a (16 x 8) has rows g, g + 8, g, g + 8 and columns q, q, q + 4, q + 4, b (8
// x 8) rows q, q + 4 and column g, d (16 x 8) rows g, g, g + 8, g + 8 and columns 2 q, 2 q + 1, 2 q, 2 q + 1.
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same without columns 4 and up of a and rows 4 and up of b.
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// The sum over channels of v times a factor, for token t; each lane brings the factors of token g, and gets
// the sums of tokens 2 q and 2 q + 1.
__device__ inline void sum_channels(float (&sums)[4], int t, const float (&v)[4], float2 factor) {
  float x[4] = {};
  mma(x, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])},
      {__float_as_uint(factor.x), __float_as_uint(factor.y)});
  if (threadIdx.x % 4 == t / 2) sums[t % 2] = x[t % 2], sums[2 + t % 2] = x[2 + t % 2];
}

// Where (n, l) of B or C of a row and channel begins.
template <class T>
__device__ inline const T* factor(const View& v, int64_t groups, const ScanDims& dims, int64_t row,
                                  int64_t channel, int64_t token) {
  return static_cast<const T*>(v.data) + row * v.stride[0] + channel / (dims.d / groups) * v.stride[1] +
         token * v.stride[3];
}

// From the begin of a factor to a state and token; it is contiguous along states where u is along channels.
template <Along kAlong>
__device__ inline int64_t factor_offset(const View& v, int state, int token) {
  return kAlong == Along::channels ? state + token * int64_t(int(v.stride[3])) : state * v.stride[2] + token;
}

__device__ inline float from_quad(const float (&mine)[2], int step) {
  return __shfl_sync(kAllLanes, mine[step % 2], step / 2, 4);
}

// Two tokens of two states: tokens 2 q and 2 q + 1, states 2 g and 2 g + 1.
template <class T, Along kAlong>
struct FactorPairs {
  static constexpr bool kStates = kAlong == Along::channels;
  struct Raw {
    Pack<T, 2> pair[2];
  };
  const T* p;

  __device__ FactorPairs(const View& v, const T* start)
      : p(start + factor_offset<kAlong>(v, 2 * g(), 2 * q())) {}
  __device__ Raw load(const View& v) const {
    return {{load_now<2>(p), load_now<2>(p + v.stride[kStates ? 3 : 2])}};
  }
  // Of a group of `left` < 8 tokens; zeros beyond.
  __device__ Raw load_some(const View& v, int left) const {
    Raw raw{};
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int s = 0; s < 2; ++s)
        if (2 * q() + k < left)
          raw.pair[kStates ? k : s].set(kStates ? s : k, p[s * v.stride[2] + k * v.stride[3]]);
    return raw;
  }
  __device__ static float value(const Raw& raw, int token, int state) {
    return kStates ? raw.pair[token].at(state) : raw.pair[state].at(token);
  }
  __device__ void step(int64_t bytes) { gpu::step(p, bytes); }

  __device__ static int g() { return threadIdx.x % kWarp / 4; }
  __device__ static int q() { return threadIdx.x % 4; }
};

// Before it reads an operand the tensor core cuts off its low bits, 3.5e-4 of the value on average.
template <class T>
inline constexpr float kOperandScale = sizeof(T) == 2 ? 1 + 3.5e-4f : 1.f;

// A group of B or C in 16 bits. A lane has states 4 q .. 4 q + 3 of token g, or of tokens 2 q and 2 q + 1 the
// states i and i + 2, i = 4 (g / 2) + g % 2. Each form is the other one transposed; a lane loads the one that
// is contiguous in memory.
template <class T, Along kAlong>
struct QuadFactor {
  static constexpr bool kStates = kAlong == Along::channels;
  static constexpr int kShared = 1;  // floats of a warp: none
  struct Raw {
    uint32_t word[2];

    __device__ float of_token(int state) const {
      return Pack<T, 2>{{kStates ? word[state / 2] : transpose(word[state / 2])}}.at(state % 2);
    }
    __device__ float of_state(int state, int token) const {
      return Pack<T, 2>{{kStates ? transpose(word[state]) : word[state]}}.at(token);
    }
  };

  __device__ QuadFactor(const View& v, const T* start)
      : p(start + factor_offset<kAlong>(v, state(), token())) {}
  __device__ Raw load(const View& v) const {
    if constexpr (kStates) {
      const Pack<T, 4> four = load_now<4>(p);
      return {{four.word[0], four.word[1]}};
    } else {
      return {{load_now<2>(p).word[0], load_now<2>(p + 2 * v.stride[2]).word[0]}};
    }
  }
  // Of a group of `left` < 8 tokens; zeros beyond.
  __device__ Raw load_some(const View& v, int left) const {
    Raw raw{};
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (token() + (kStates ? 0 : i) < left)
          raw.word[k] |= p[(2 * k + (kStates ? i : 0)) * v.stride[2] + (kStates ? 0 : i) * v.stride[3]].bits
                         << 16 * i;
    return raw;
  }
  __device__ void step(int64_t bytes) { gpu::step(p, bytes); }

 private:
  __device__ static int state() {
    const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
    return kStates ? 4 * q : g / 2 * 4 + g % 2;
  }
  __device__ static int token() { return kStates ? threadIdx.x % kWarp / 4 : threadIdx.x % 4 * 2; }

  const T* p;
};

// All ones in the lanes that own tokens 2 p and 2 p + 1.
struct OwnTokens {
  uint32_t mask[4];

  __device__ OwnTokens() {
#pragma unroll
    for (int p = 0; p < 4; ++p) keep(mask[p] = threadIdx.x % 4 == p ? ~0u : 0u);
  }
};

// h[step][lane's state] = delta u B of a group, of steps 4 j .. 4 j + 3 at a time.
template <class T, Along kAlong>
struct InputFactor : QuadFactor<T, kAlong> {
  using Base = QuadFactor<T, kAlong>;

  __device__ InputFactor(const View& v, const T* start, float*, const OwnTokens& own)
      : Base(v, start), own(own) {}
  __device__ void begin(const typename Base::Raw& raw) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int s = 0; s < 2; ++s) keep(b[k][s] = __float_as_uint(raw.of_state(s, k)));
  }
  // Delta u of the lane's tokens.
  __device__ void scale(float first, float second) {
    input[0] = __float_as_uint(first);
    input[1] = __float_as_uint(second);
  }
  __device__ void inputs(float (&h)[kGroup][kLaneStates], int j) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t a[2] = {input[k] & own.mask[2 * j], input[k] & own.mask[2 * j + 1]};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float x[4] = {};
        mma(x, a, b[k][s]);
#pragma unroll
        for (int i = 0; i < 4; ++i) h[4 * j + i / 2 * 2 + k][s * 2 + i % 2] = x[i];
      }
    }
  }

 private:
  const OwnTokens& own;
  uint32_t b[2][2], input[2];
};

// sum_i h C of a group, of steps 2 p and 2 p + 1 at a time.
template <class T, Along kAlong>
struct OutputFactor : QuadFactor<T, kAlong> {
  using Base = QuadFactor<T, kAlong>;

  __device__ OutputFactor(const View& v, const T* start, float*, const OwnTokens& own)
      : Base(v, start), own(own) {}
  __device__ void begin(const typename Base::Raw& raw) {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) keep(c[i] = __float_as_uint(raw.of_token(i)));
    sums[0] = sums[1] = 0;
  }
  __device__ void outputs(const float (&h)[kGroup][kLaneStates], int p) {
    float x[4] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(h[2 * p + i % 2][s + i / 2 * 2]);
      mma(x, a, {c[s], c[s + 2]});
    }
    sums[0] |= __float_as_uint(x[0]) & own.mask[p];
    sums[1] |= __float_as_uint(x[3]) & own.mask[p];
  }
  // Of the lane's two tokens.
  __device__ float2 result() const { return {__uint_as_float(sums[0]), __uint_as_float(sums[1])}; }

 private:
  const OwnTokens& own;
  uint32_t c[kLaneStates], sums[2];
};

// A group of B or C in float32, in shared memory.
template <Along kAlong>
struct SharedFactor {
  static constexpr bool kStates = kAlong == Along::channels;
  static constexpr int kShared = kGroup * kTunedState;  // floats of a warp
  using Raw = Pack<float, 4>;

  __device__ SharedFactor(const View& v, const float* start, float* shared, const OwnTokens&)
      : p(start + factor_offset<kAlong>(v, state(), token())), shared(shared) {}
  __device__ Raw load(const View&) const { return load_now<4>(p); }
  __device__ Raw load_some(const View&, int left) const {
    Raw raw{};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (token() + (kStates ? 0 : i) < left) raw.set(i, p[i]);
    return raw;
  }
  __device__ void step(int64_t bytes) { gpu::step(p, bytes); }
  __device__ void put(const Raw& raw) const {
    float* to = shared + token() * kTunedState + state();
    __syncwarp();
    if constexpr (kStates) {
      *reinterpret_cast<Raw*>(to) = raw;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i * kTunedState] = raw.at(i);
    }
    __syncwarp();
  }
  // Of the lane's states.
  __device__ Raw at(int t) const {
    return *reinterpret_cast<const Raw*>(shared + t * kTunedState + threadIdx.x % 4 * kLaneStates);
  }

 private:
  // A lane moves 4 states of a token, or 4 tokens of a state.
  __device__ static int state() { return kStates ? threadIdx.x % 4 * 4 : threadIdx.x % kWarp / 2; }
  __device__ static int token() { return kStates ? threadIdx.x % kWarp / 4 : threadIdx.x % 2 * 4; }

  const float* p;
  float* shared;
};

template <Along kAlong>
struct InputFactor<float, kAlong> : SharedFactor<kAlong> {
  using Base = SharedFactor<kAlong>;
  using Base::Base;
  __device__ void begin(const typename Base::Raw& raw) { Base::put(raw); }
  __device__ void scale(float first, float second) {
    input[0] = first;
    input[1] = second;
  }
  __device__ void inputs(float (&h)[kGroup][kLaneStates], int j) const {
#pragma unroll
    for (int t = 4 * j; t < 4 * j + 4; ++t) {
      const float u = from_quad(input, t);
      const auto b = Base::at(t);
#pragma unroll
      for (int i = 0; i < kLaneStates; ++i) h[t][i] = u * b.at(i);
    }
  }

 private:
  float input[2];
};

template <Along kAlong>
struct OutputFactor<float, kAlong> : SharedFactor<kAlong> {
  using Base = SharedFactor<kAlong>;
  using Base::Base;
  __device__ void begin(const typename Base::Raw& raw) { Base::put(raw); }
  __device__ void outputs(const float (&h)[kGroup][kLaneStates], int p) {
#pragma unroll
    for (int t = 2 * p; t < 2 * p + 2; ++t) {
      const auto c = Base::at(t);
      sums[t] = fmaf(h[t][0], c.at(0), h[t][1] * c.at(1)) + fmaf(h[t][2], c.at(2), h[t][3] * c.at(3));
    }
  }
  // Sums over the quad, of 8 tokens at once: each lane ends with its own two.
  __device__ float2 result() const {
    const int q = threadIdx.x % 4;
    float half[4], two[2];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float mine = q < 2 ? sums[t] : sums[t + 4], other = q < 2 ? sums[t + 4] : sums[t];
      half[t] = mine + __shfl_xor_sync(kAllLanes, other, 2);
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float mine = q % 2 ? half[t + 2] : half[t], other = q % 2 ? half[t] : half[t + 2];
      two[t] = mine + __shfl_xor_sync(kAllLanes, other, 1);
    }
    return {two[0], two[1]};
  }

 private:
  float sums[kGroup];
};

// 2^x, over many tokens: in float32 where it is near 1 from its series, exact to 2^-28.
template <class T>
__device__ inline float decay_over(float x) {
  const float a = exp2_of(x);
  if constexpr (sizeof(T) == 2) return a;
  const float series = fmaf(fmaf(fmaf(9.6181291e-3f, x, 5.5504109e-2f), x, 0.24022651f), x, 0.69314718f);
  return fabsf(x) < 0x1p-4f ? fmaf(series, x, 1.f) : a;
}

// The errors of ex2 near 1 have a bias, and would add up over a long memory. Here is the state that entered a
// window of tokens, and what their decays leave of it. At the end of the window the decay of all its steps at
// once, whose error is nothing, takes the place of theirs.
struct LongMemory {
  float entered[kLaneStates], rest[kLaneStates];

  __device__ void begin(const float (&state)[kLaneStates]) {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) entered[i] = rest[i] = state[i];
  }
  __device__ void step(const float (&a)[kLaneStates]) {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) rest[i] *= a[i];
  }
  // x: log2 of the decay of all steps.
  __device__ void mend(float (&state)[kLaneStates], const float (&x)[kLaneStates]) const {
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) state[i] += fmaf(decay_over<float>(x[i]), entered[i], -rest[i]);
  }
};

// Of steps 2 p and 2 p + 1, from the deltas of the lane's tokens in units that make a decay a power of 2.
__device__ inline void decays(float (&a)[kGroup][kLaneStates], const float (&deltas)[2],
                              const float (&A)[kLaneStates], int p) {
#pragma unroll
  for (int t = 2 * p; t < 2 * p + 2; ++t) {
    const float delta = from_quad(deltas, t);
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) a[t][i] = exp2_of(delta * A[i]);
  }
}

__device__ inline void advance(float (&h)[kGroup][kLaneStates], const float (&a)[kGroup][kLaneStates],
                               float (&state)[kLaneStates], int p) {
#pragma unroll
  for (int t = 2 * p; t < 2 * p + 2; ++t)
#pragma unroll
    for (int i = 0; i < kLaneStates; ++i) state[i] = h[t][i] = fmaf(a[t][i], state[i], h[t][i]);
}

}  // namespace mamba_ops::gpu

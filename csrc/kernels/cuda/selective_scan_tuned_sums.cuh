// Around the tuned backward of the selective scan: the pass that sets what enters on the right, and the
// second pass that adds up partial sums.
#pragma once
#include "kernels/cuda/selective_scan_tuned_bwd.cuh"

namespace mamba_ops::gpu {

inline constexpr int kSumThreads = 256;

// Sets what enters every chain on its right, and all counters to 0. A thread owns a lane's value of a warp.
__global__ void __launch_bounds__(kSumThreads)
    scan_begin_gradients(const ScanBwd params, const BwdCut cut, const BwdWork work) {
  const ScanDims& dims = params.fwd.dims;
  const int64_t thread = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  for (int64_t k = thread; k < work.counters; k += int64_t(gridDim.x) * kSumThreads) work.taken[k] = 0;
  const int values = kLaneStates + kTotals;
  const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int64_t i = thread / kWarp % values, warp = thread / kWarp / values;
  if (warp >= int64_t(cut.chains(dims)) * kBwdWarps) return;
  if (i >= kLaneStates) {
    work.totals[(warp * kTotals + i - kLaneStates) * kWarp + lane] = 0;
    return;
  }
  const BwdPlace at(dims, cut, int(warp / kBwdWarps), int(warp % kBwdWarps));
  const int channel = cut.turns > 1 ? g : 2 * q + int(i) / 2,
            state = cut.turns > 1 ? 4 * q + int(i) : 2 * g + int(i) % 2;
  float value = 0;
  if (params.dstates_out && channel < at.channels)
    value = static_cast<const float*>(
        params.dstates_out)[(at.row * dims.d + at.first + channel) * kTunedState + state];
  work.carry[(warp * kLaneStates + i) * kWarp + lane] = __float_as_uint(value);
}

// dB and dC of the pieces [first, first + pieces) of every row, added up over the channel blocks of a group.
// A thread owns two tokens of two states.
__global__ void __launch_bounds__(kSumThreads)
    scan_sum_channels(const ScanBwd params, const BwdCut cut, const BwdWork work, int first_piece,
                      int pieces) {
  constexpr int kThreads = kGroupSums / 4;  // of a group
  const ScanDims& dims = params.fwd.dims;
  const int64_t groups = cut.piece_tokens / kGroup;
  const int64_t unit = int64_t(blockIdx.x) * (kSumThreads / kThreads) + threadIdx.x / kThreads;
  const int piece = first_piece + int(unit / groups), group = int(unit % groups);
  const int64_t token = piece * cut.piece_tokens + int64_t(group) * kGroup;
  if (unit >= pieces * groups || token >= dims.l) return;
  const int64_t row = blockIdx.y;
  const int which = threadIdx.x % kThreads / kWarp, lane = threadIdx.x % kWarp;
  const View& out = which == 0 ? params.dB : params.dC;
  const int64_t b_groups = which == 0 ? dims.groups_B : dims.groups_C, blocks = cut.channel_blocks / b_groups;
  const int64_t stride = work.group_sums(cut, dims.b, 1, 0, 0, 0) / 4;
  for (int64_t of = 0; of < b_groups; ++of) {
    const float4* from =
        reinterpret_cast<const float4*>(work.sums_BC +
                                        work.group_sums(cut, dims.b, int(of * blocks), row, piece, group)) +
        threadIdx.x % kThreads;
    float4 sum{};
#pragma unroll 8
    for (int64_t k = 0; k < blocks; ++k) {
      const float4 v = __ldcs(from + k * stride);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    const float of_lane[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t state = lane / 4 * 2 + k % 2, t = token + lane % 4 * 2 + k / 2;
      if (t < dims.l)
        store_one(out, row * out.stride[0] + of * out.stride[1] + state * out.stride[2] + t * out.stride[3],
                  of_lane[k]);
    }
  }
}

// dA, dD and ddelta_bias, added up over rows. A thread owns a value of a channel.
__global__ void __launch_bounds__(kSumThreads) scan_sum_rows(const ScanBwd params, const BwdWork work) {
  const ScanDims& dims = params.fwd.dims;
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, states = dims.d * kTunedState;
  if (i >= states + 2 * dims.d) return;
  const bool of_A = i < states;
  const float* from = of_A ? work.sums_A + i : work.sums_d + i - states;
  float sum = 0;
  for (int64_t row = 0; row < dims.b; ++row) sum += from[row * (of_A ? states : 2 * dims.d)];
  if (of_A) {
    store_one(params.dA, i / kTunedState * params.dA.stride[0] + i % kTunedState * params.dA.stride[1], sum);
  } else {
    const View& out = i - states < dims.d ? params.dD : params.ddelta_bias;
    if (out.data) store_one(out, (i - states) % dims.d * out.stride[0], sum);
  }
}

// ---- Host: how a call is cut, and its scratch memory

inline constexpr int64_t kPieceTokens = 512;

struct BwdPlan {
  BwdCut cut{};
  BwdWork work{};
  int64_t bytes = 0;
  int launches = 0;

  BwdPlan(const ScanBwd& p, void* memory) {
    const ScanDims& dims = p.fwd.dims;
    cut.share = int(dims.groups_B == 1 && dims.groups_C == 1 ? dims.d : dims.sharing());
    cut.share_blocks = int((cut.share + kBwdChannels - 1) / kBwdChannels);
    cut.channel_blocks = int(dims.d / cut.share) * cut.share_blocks;
    const int64_t chains = cut.chains(dims), places = multiprocessors() * kBwdBlocks;
    const int64_t windows = (dims.l + kScanCheckpointCuda - 1) / kScanCheckpointCuda;
    // Chains enough for an eighth less than all places go without turns, which cost as much.
    cut.turns = int(std::min(chains * 8 < places * 7 ? (places + chains - 1) / chains : 1, windows));
    // Pieces of many chains even out the blocks' turns on the machine; else there is one for each launch.
    const int64_t per_window = chains * kWindowGroups * kGroupSums * int64_t(sizeof(float));
    const int64_t most = std::max<int64_t>(kScanPartialBytes / per_window, 1);
    int64_t piece = cut.turns > 1 ? 1 : chains > places ? kPieceTokens / kScanCheckpointCuda : windows;
    piece = std::min({piece, most, windows});
    cut.pieces = int((windows + piece - 1) / piece);
    piece = (windows + cut.pieces - 1) / cut.pieces;
    cut.pieces = int((windows + piece - 1) / piece);
    launches = int((cut.pieces * piece + most - 1) / most);
    cut.portion = (cut.pieces + launches - 1) / launches;
    launches = (cut.pieces + cut.portion - 1) / cut.portion;
    cut.piece_tokens = piece * kScanCheckpointCuda;

    const auto take = [&]<class T>(T*& at, int64_t count) {
      at = reinterpret_cast<T*>(static_cast<char*>(memory) + bytes);
      bytes += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    };
    take(work.carry, chains * kBwdWarps * kLaneStates * kWarp);
    take(work.totals, chains * kBwdWarps * kTotals * kWarp);
    take(work.sums_A, dims.b * dims.d * kTunedState);
    take(work.sums_d, dims.b * 2 * dims.d);
    take(work.sums_BC, chains * cut.portion * (cut.piece_tokens / kGroup) * kGroupSums);
    work.counters = launches * (cut.turns > 1 ? int(chains) : 1);
    take(work.taken, work.counters);
  }
};

}  // namespace mamba_ops::gpu

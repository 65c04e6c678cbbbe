// The ids of a pack, one thread a token. The first block checks the offsets instead and writes the verdict
// behind the ids.
#include <algorithm>
#include <climits>

#include "kernels/cuda/sequences.cuh"

namespace mamba_ops {

namespace {

constexpr int kThreads = 256;

__global__ void sequence_ids(const Sequences seqs, int64_t l, int32_t* id) {
  if (blockIdx.x == 0) {
    const bool invalid = gpu::is_invalid_pack(seqs, l);
    if (threadIdx.x == 0) id[l] = invalid;
    return;
  }
  const int64_t stride = int64_t(gridDim.x - 1) * kThreads;
  for (int64_t t = int64_t(blockIdx.x - 1) * kThreads + threadIdx.x; t < l; t += stride)
    id[t] = int32_t(gpu::sequence_at(seqs, t));
}

// A warp makes one word.
__global__ void run_starts(const Sequences seqs, int64_t b, int64_t l, uint32_t* starts) {
  const int64_t stride = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < b * seqs.words;
       i += stride) {
    const int64_t row = i / seqs.words, t = (i - row * seqs.words) * 32 + threadIdx.x % 32;
    const unsigned bits = __ballot_sync(gpu::kAllLanes, t > 0 && t < l && gpu::begins(seqs, row, t));
    if (threadIdx.x % 32 == 0) starts[i] = bits;
  }
}

}  // namespace

const char* run_starts_cuda(const Sequences& seqs, int64_t b, int64_t l, uint32_t* starts, void* stream) {
  const int64_t words = b * seqs.words, per_block = kThreads / 32;
  if (words == 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((words + per_block - 1) / per_block, INT_MAX);
  run_starts<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(seqs, b, l, starts);
  return gpu::launch_error();
}

const char* sequence_ids_cuda(const Sequences& seqs, int64_t l, int32_t* id, void* stream) {
  const int64_t blocks = 1 + std::clamp<int64_t>((l + kThreads - 1) / kThreads, 1, INT_MAX - 1);
  sequence_ids<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(seqs, l, id);
  return gpu::launch_error();
}

}  // namespace mamba_ops

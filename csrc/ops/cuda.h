// A call on CUDA tensors: device and stream, the sequences of the call on the device, errors of launches.
#pragma once
#include "ops/check.h"

#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "kernels/cuda/sequences.h"

// Of libtorch_cuda.so, which a torch without CUDA has not: absent, the library must still load.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace mamba_ops {

inline IndexView index_view(const Tensor& t) {
  return {t.data_ptr(), t.scalar_type() == ScalarType::Long, {t.stride(0), t.dim() > 1 ? t.stride(1) : 0}};
}

// Makes the tensors' device the current one while it lives, and launches into that device's current stream.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& first) : op_(op), guard_(first.get_device()) {
    if (!aoti_torch_get_current_cuda_stream) fail(op, "got CUDA tensors, but this torch has no CUDA");
    if (aoti_torch_get_current_cuda_stream(first.get_device(), &stream_) != 0)
      fail(op, "cannot get the CUDA stream");
  }

  void* stream() const { return stream_; }
  // Ends the call if a launch went wrong.
  void launched(const char* error) const {
    if (error) fail(op_, std::string("CUDA: ") + error);
  }
  // The sequences of a (b, l) call, whose shapes were checked; of packs without ids.
  Sequences given_sequences(const OptTensor& seq_idx, const OptTensor& cu_seqlens) const {
    Sequences seqs;
    if (seq_idx) seqs.id = index_view(*seq_idx);
    if (cu_seqlens) {
      seqs.cu_seqlens = index_view(*cu_seqlens);
      seqs.count = cu_seqlens->numel() - 1;
    }
    return seqs;
  }
  // With ids: cu_seqlens are turned into them by a kernel, and they into bits where runs begin by another, if
  // the operator wants those.
  Sequences sequences(int64_t l, const OptTensor& seq_idx, const OptTensor& cu_seqlens, bool starts = false) {
    Sequences seqs = given_sequences(seq_idx, cu_seqlens);
    if (cu_seqlens) {
      ids_ = empty({l + 1}, ScalarType::Int, *cu_seqlens);
      int32_t* id = static_cast<int32_t*>(ids_->data_ptr());
      launched(sequence_ids_cuda(seqs, l, id, stream_));
      seqs.id = {id, false, {0, 1}};
      seqs.invalid = id + l;
    }
    if (starts && seqs.id.data) {
      const int64_t b = seq_idx ? seq_idx->size(0) : 1;
      seqs.words = (l + 31) / 32;
      starts_ = empty({b, seqs.words}, ScalarType::Int, seq_idx ? *seq_idx : *cu_seqlens);
      uint32_t* bits = static_cast<uint32_t*>(starts_->data_ptr());
      launched(run_starts_cuda(seqs, b, l, bits, stream_));
      seqs.starts = bits;
    }
    return seqs;
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  OptTensor ids_, starts_;
};

}  // namespace mamba_ops
#endif

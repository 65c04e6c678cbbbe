// Tensor maps: what the copy engine needs to know of a tensor in device memory, made on the host.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/view.h"

namespace mamba_ops::gpu::sm90 {

constexpr int kMapDims = 5;

struct MapDim {
  int64_t size, stride;  // in elements
  int box;
};

// Whether the copy engine can reach a tensor of 16-bit values: neighbours along the first dimension, 16-byte
// steps along the others, a start at 16 bytes.
inline bool can_map(const void* data, const MapDim* dims, int rank) {
  if (reinterpret_cast<uintptr_t>(data) % 16) return false;
  for (int i = 0; i < rank; ++i) {
    const auto& [size, stride, box] = dims[i];
    if (size < 1 || size >= int64_t(1) << 31) return false;
    if (size > 1 && (i == 0 ? stride != 1 : stride < 8 || stride % 8 || stride >= int64_t(1) << 38))
      return false;
  }
  return true;
}

// A map of a tensor for which can_map holds, or what went wrong.
inline const char* make_map(CUtensorMap& map, DType dtype, const void* data, const MapDim* dims, int rank,
                            CUtensorMapSwizzle swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(f)
                                                                        : nullptr;
  }();
  if (!encode) return "this driver has no cuTensorMapEncodeTiled";
  cuuint64_t size[kMapDims], stride[kMapDims];
  cuuint32_t box[kMapDims], step[kMapDims];
  for (int i = 0; i < rank; ++i) {
    size[i] = dims[i].size;
    box[i] = dims[i].box;
    step[i] = 1;
    if (i > 0)
      stride[i - 1] = 2 * (dims[i].size > 1 ? dims[i].stride : 8);  // that of one element is not used
  }
  const CUtensorMapDataType type =
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(&map, type, rank, const_cast<void*>(data), size, stride, box, step,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor";
}

}  // namespace mamba_ops::gpu::sm90

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>

namespace r2dllm::cuda {

inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// Threads of a block that works on one row of `length` cells.
inline int row_threads(int64_t length) {
  const int64_t warps = (length + 31) / 32;
  return static_cast<int>((warps < 1 ? 1 : warps > 32 ? 32 : warps) * 32);
}

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
#if defined(R2DLLM_WITH_CUDA) && !defined(R2DLLM_EMULATED_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "runtime.h"

namespace r2dllm::cuda {

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void check(cudaError_t error) { C10_CUDA_CHECK(error); }

}  // namespace r2dllm::cuda
#endif

// SPDX-License-Identifier: Apache-2.0
// What the launches need to know of torch. The kernels and their launches include nothing of it, so
// that a CUDA toolkit alone compiles them (cmake/check_kernels.py).
#pragma once

#include <cuda_runtime_api.h>

namespace r2dllm::cuda {

cudaStream_t current_stream();

// Throws what torch throws for a CUDA error.
void check(cudaError_t error);

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
#include "../ops/limits.h"
#include "cuda_lane.cuh"
#include "launch.cuh"
#include "rules.h"

namespace r2dllm::cuda {
namespace {

__global__ void __launch_bounds__(1024) window_pool_kernel(WindowPoolParams params) {
  __shared__ uint8_t passes[kCudaMaxLength];
  CudaLane lane;
  window_pool_body(lane, passes, params);
}

__global__ void __launch_bounds__(1024)
    positional_ambiguity_kernel(PositionalAmbiguityParams params) {
  CudaLane lane;
  positional_ambiguity_body(lane, params);
}

constexpr int kStabilityThreads = 128;

__global__ void __launch_bounds__(kStabilityThreads)
    update_stability_kernel(UpdateStabilityParams params) {
  update_stability_body(CudaLane(), params);
}

}  // namespace

void window_pool(const WindowPoolParams& params) {
  if (params.batch == 0 || params.length == 0) return;
  Launch{params.batch, row_threads(params.length)}(window_pool_kernel, params);
}

void positional_ambiguity(const PositionalAmbiguityParams& params) {
  if (params.batch == 0 || params.length == 0) return;
  Launch{params.batch, row_threads(params.length)}(positional_ambiguity_kernel, params);
}

void update_stability(const UpdateStabilityParams& params) {
  if (params.cells == 0) return;
  Launch{blocks_for(params.cells, kStabilityThreads), kStabilityThreads}(update_stability_kernel,
                                                                         params);
}

}  // namespace r2dllm::cuda

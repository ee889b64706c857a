// SPDX-License-Identifier: Apache-2.0
#include "../ops/sft_loss.h"
#include "cuda_lane.cuh"
#include "launch.cuh"
#include "sft_loss.h"

namespace r2dllm::cuda {
namespace {

__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(SftReduceParams params) {
  __shared__ LossSums sums[kReduceThreads];
  CudaLane lane;
  sft_reduce_body(lane, sums, params);
}

}  // namespace

void sft_reduce(const SftReduceParams& params) { Launch{1, kReduceThreads}(reduce_kernel, params); }

}  // namespace r2dllm::cuda

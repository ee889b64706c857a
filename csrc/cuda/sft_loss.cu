// SPDX-License-Identifier: Apache-2.0
#include "../ops/sft_loss.h"
#include "launch.cuh"

namespace r2dllm::cuda {
namespace {

constexpr int kThreads = 256;

// One block, and a tree of fixed shape: the same bits in every run.
__global__ void __launch_bounds__(kThreads) reduce_kernel(SftReduceParams params) {
  __shared__ LossSums sums[kThreads];
  LossSums mine{0.0, 0.0, 0, 0};
  for (int64_t i = threadIdx.x; i < params.rows; i += kThreads) mine = mine + loss_term(params, i);
  sums[threadIdx.x] = mine;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) sums[threadIdx.x] = sums[threadIdx.x] + sums[threadIdx.x + width];
    __syncthreads();
  }
  const double normalizer =
      params.normalizer ? *params.normalizer : static_cast<double>(sums[0].rows);
  const Loss loss = loss_of(sums[0], normalizer, params.entropy_weight);
  if (threadIdx.x == 0) params.loss.set(0, loss.value);
  for (int64_t i = threadIdx.x; i < params.rows; i += kThreads) write_derivatives(params, i, loss);
}

}  // namespace

void sft_reduce(const SftReduceParams& params) {
  reduce_kernel<<<1, kThreads, 0, current_stream()>>>(params);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace r2dllm::cuda

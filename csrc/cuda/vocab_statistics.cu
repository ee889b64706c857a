// SPDX-License-Identifier: Apache-2.0
#include "../ops/vocab_statistics.h"
#include "vocab_pass.cuh"

namespace r2dllm::cuda {
namespace {

__global__ void __launch_bounds__(kCellThreads)
    statistics_kernel(VocabStatisticsParams params, Flagged is_candidate,
                      VocabWorkspace workspace) {
  CudaLane lane;
  statistics_body(lane, params, is_candidate, workspace);
}

__global__ void __launch_bounds__(kCellThreads) merge_kernel(MergeStatisticsParams params) {
  CudaLane lane;
  merge_statistics_body(lane, params);
}

}  // namespace

void vocab_statistics(const VocabStatisticsParams& params) {
  launch_pass(params, params.with_entropy, statistics_kernel);
}

void merge_statistics(const MergeStatisticsParams& params) {
  if (params.cells == 0) return;
  Launch{blocks_for(params.cells, kCellThreads), kCellThreads}(merge_kernel, params);
}

}  // namespace r2dllm::cuda

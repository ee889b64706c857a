// SPDX-License-Identifier: Apache-2.0
// The loss of a batch from its rows.
#pragma once

#include "../ops/sft_loss.h"
#include "lane.h"

namespace r2dllm::cuda {

constexpr int kReduceThreads = 256;

// One block, and a tree of fixed shape: the same bits in every run. `sums`: kReduceThreads of them,
// in shared memory.
template <class Lane>
R2D_DEVICE void sft_reduce_body(Lane& lane, LossSums* sums, const SftReduceParams& params) {
  const int thread = lane.thread();
  LossSums mine{0.0, 0.0, 0, 0};
  for (int64_t i = thread; i < params.rows; i += kReduceThreads) {
    mine = mine + loss_term(params, i);
  }
  sums[thread] = mine;
  lane.sync(kReduceThreads);
  for (int width = kReduceThreads / 2; width > 0; width /= 2) {
    if (thread < width) sums[thread] = sums[thread] + sums[thread + width];
    lane.sync(kReduceThreads);
  }
  const double normalizer =
      params.normalizer ? *params.normalizer : static_cast<double>(sums[0].rows);
  const Loss loss = loss_of(sums[0], normalizer, params.entropy_weight);
  if (thread == 0) params.loss.set(0, loss.value);
  for (int64_t i = thread; i < params.rows; i += kReduceThreads) write_derivatives(params, i, loss);
}

}  // namespace r2dllm::cuda

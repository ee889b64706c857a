// SPDX-License-Identifier: Apache-2.0
#include "../ops/row_stats.h"
#include "carve.h"
#include "row_stats.h"
#include "vocab_pass.cuh"

namespace r2dllm::cuda {
namespace {

constexpr int kRowsPerBlock = 4, kRowThreads = kRowsPerBlock * kWarp;

template <class Format>
__global__ void __launch_bounds__(kRowThreads)
    row_stats_kernel(RowStatsParams params, VocabWorkspace workspace, double scale) {
  CudaLane lane;
  row_stats_body<Format>(lane, params, workspace, scale);
}

template <class Format>
__global__ void __launch_bounds__(kSliceThreads, 5)
    gradient_kernel(RowStatsBackwardParams params, int64_t slices, double scale) {
  __shared__ RowGradient shared;
  CudaLane lane;
  gradient_body<Format>(lane, shared, params, slices, scale);
}

int64_t partials_of(const LogitsView& logits) {
  return logits.batch * logits.length * slices_of(logits);
}

}  // namespace

int64_t row_stats_bytes(const LogitsView& logits) {
  return partials_of(logits) * static_cast<int64_t>(sizeof(SlicePartial) + sizeof(TemperedSums));
}

void row_stats(const RowStatsParams& params) {
  const LogitsView& logits = params.logits;
  const int64_t rows = logits.batch * logits.length, partials = partials_of(logits);
  if (rows == 0) return;
  Carve carve{static_cast<unsigned char*>(params.workspace)};
  VocabWorkspace workspace{.slices = slices_of(logits),
                           .partial = carve.take<SlicePartial>(partials)};
  workspace.tempered = carve.take<double>(partials);
  workspace.moment = carve.take<double>(partials);
  const HasTarget has_target{params.targets, params.ignore_index};
  const bool with_entropy = params.temperature != 0.0;
  const double scale = with_entropy ? tempered_scale(params.temperature) : 0.0;
  if (with_entropy) {
    launch_slices<Tempered::kMoment>(logits, has_target, workspace, SameScale{narrow_scale(scale)});
  } else {
    launch_slices(logits, has_target, workspace);
  }
  with_format(logits.type, [&](auto format) {
    Launch{blocks_for(rows, kRowsPerBlock), kRowThreads, 0, true}(
        row_stats_kernel<decltype(format)>, params, workspace, scale);
  });
}

void row_stats_backward(const RowStatsBackwardParams& params) {
  const int64_t blocks = partials_of(params.logits);
  if (blocks == 0) return;
  with_format(params.logits.type, [&](auto format) {
    Launch{blocks, kSliceThreads}(gradient_kernel<decltype(format)>, params,
                                  slices_of(params.logits), tempered_scale(params.temperature));
  });
}

}  // namespace r2dllm::cuda

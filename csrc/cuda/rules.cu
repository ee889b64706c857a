// SPDX-License-Identifier: Apache-2.0
// The three rules alone: one block a row, or one thread a cell.
#include "../ops/backend.h"
#include "../ops/positional_ambiguity.h"
#include "../ops/update_stability.h"
#include "../ops/window_pool.h"
#include "../rules/window_pool.h"
#include "launch.cuh"

namespace r2dllm::cuda {
namespace {

__global__ void window_pool_kernel(WindowPoolParams params) {
  __shared__ bool passes[kCudaMaxLength];
  const int64_t length = params.length, window = params.window, cells = blockIdx.x * length;
  const float* confidence = params.confidence + cells;
  const bool* is_masked = params.is_masked + cells;
  for (int64_t start = threadIdx.x; start + window <= length; start += blockDim.x) {
    passes[start] = window_passes(
        start, window, params.max_unmasked, params.min_confidence, Rounding::kNone,
        [&](int64_t i) { return is_masked[i]; }, [&](int64_t i) { return confidence[i]; });
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    params.marked[cells + i] =
        is_masked[i] && window <= length &&
        in_passing_window(i, length, window, [&](int64_t start) { return passes[start]; });
  }
}

__global__ void positional_ambiguity_kernel(PositionalAmbiguityParams params) {
  const int64_t length = params.length, b = blockIdx.x, cells = b * length;
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) params.chosen[cells + i] = false;
  __syncthreads();
  const auto in_run = [&](int64_t i) {
    return may_join_run(params.is_masked[cells + i], params.prediction[cells + i],
                        params.confidence[cells + i]);
  };
  const auto prediction = [&](int64_t i) { return params.prediction[cells + i]; };
  const auto confidence = [&](int64_t i) { return params.confidence[cells + i]; };
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    if (!begins_run(i, in_run, prediction)) continue;
    const Run run = run_from(i, length, in_run, prediction, confidence);
    const int64_t cell = chosen_cell(
        i, run, params.min_run, params.min_confidence, params.mode, confidence,
        [&] { return uniform(params.seed, params.row[b], params.step, i, Draw::kRun); });
    if (cell >= 0) params.chosen[cells + cell] = true;
  }
}

__global__ void update_stability_kernel(UpdateStabilityParams params) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= params.cells) return;
  Streak streak{params.streak_count[i], params.streak_id[i], params.streak_sum[i],
                params.streak_max[i]};
  params.stable[i] = advance(
      streak,
      {params.was_masked[i], params.is_masked[i], params.prediction[i], params.confidence[i]},
      params.steps, params.min_confidence, params.eval);
  params.streak_count[i] = streak.count;
  params.streak_id[i] = streak.id;
  params.streak_sum[i] = streak.sum;
  params.streak_max[i] = streak.max;
}

}  // namespace

void window_pool(const WindowPoolParams& params) {
  if (params.batch == 0 || params.length == 0) return;
  window_pool_kernel<<<static_cast<unsigned>(params.batch), row_threads(params.length), 0,
                       current_stream()>>>(params);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void positional_ambiguity(const PositionalAmbiguityParams& params) {
  if (params.batch == 0 || params.length == 0) return;
  positional_ambiguity_kernel<<<static_cast<unsigned>(params.batch), row_threads(params.length), 0,
                                current_stream()>>>(params);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void update_stability(const UpdateStabilityParams& params) {
  if (params.cells == 0) return;
  constexpr int threads = 128;
  update_stability_kernel<<<static_cast<unsigned>((params.cells + threads - 1) / threads), threads,
                            0, current_stream()>>>(params);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
// The three rules alone: one block a row, or one thread a cell.
#pragma once

#include "../ops/positional_ambiguity.h"
#include "../ops/update_stability.h"
#include "../ops/window_pool.h"
#include "../rules/window_pool.h"
#include "row_context.h"

namespace r2dllm::cuda {

// `passes`: shared memory, L flags.
template <class Lane>
R2D_DEVICE void window_pool_body(Lane& lane, bool* passes, const WindowPoolParams& params) {
  const int64_t length = params.length, window = params.window, cells = lane.block() * length;
  const float* confidence = params.confidence + cells;
  const bool* is_masked = params.is_masked + cells;
  RowContext<Lane> context(lane, lane.threads(), nullptr);
  context.for_each(length - window + 1, [&](int64_t start) {
    passes[start] = window_passes(
        start, window, params.max_unmasked, params.min_confidence, Rounding::kNone,
        [&](int64_t i) { return is_masked[i]; }, [&](int64_t i) { return confidence[i]; });
  });
  context.for_each(length, [&](int64_t i) {
    params.marked[cells + i] =
        is_masked[i] && window <= length &&
        in_passing_window(i, length, window, [&](int64_t start) { return passes[start]; });
  });
}

template <class Lane>
R2D_DEVICE void positional_ambiguity_body(Lane& lane, const PositionalAmbiguityParams& params) {
  const int64_t length = params.length, b = lane.block(), cells = b * length;
  const auto in_run = [&](int64_t i) {
    return may_join_run(params.is_masked[cells + i], params.prediction[cells + i],
                        params.confidence[cells + i]);
  };
  const auto prediction = [&](int64_t i) { return params.prediction[cells + i]; };
  const auto confidence = [&](int64_t i) { return params.confidence[cells + i]; };
  RowContext<Lane> context(lane, lane.threads(), nullptr);
  context.for_each(length, [&](int64_t i) { params.chosen[cells + i] = false; });
  context.for_each(length, [&](int64_t i) {
    if (!begins_run(i, in_run, prediction)) return;
    const Run run = run_from(i, length, in_run, prediction, confidence);
    const int64_t cell = chosen_cell(
        i, run, params.min_run, params.min_confidence, params.mode, confidence,
        [&] { return uniform(params.seed, params.row[b], params.step, i, Draw::kRun); });
    if (cell >= 0) params.chosen[cells + cell] = true;
  });
}

template <class Lane>
R2D_DEVICE void update_stability_body(const Lane& lane, const UpdateStabilityParams& params) {
  const int64_t i = lane.block() * lane.threads() + lane.thread();
  if (i < params.cells) advance_cell(params, i);
}

}  // namespace r2dllm::cuda

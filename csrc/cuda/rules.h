// SPDX-License-Identifier: Apache-2.0
// The three rules alone: one block a row, or one thread a cell.
#pragma once

#include "../ops/positional_ambiguity.h"
#include "../ops/update_stability.h"
#include "../ops/window_pool.h"
#include "row_context.h"

namespace r2dllm::cuda {

// `passes`: shared memory, L flags.
template <class Lane>
R2D_DEVICE void window_pool_body(Lane& lane, uint8_t* passes, const WindowPoolParams& params) {
  RowContext<Lane> context(lane, lane.threads(), nullptr);
  pool_row(context, params, lane.block(), passes);
}

template <class Lane>
R2D_DEVICE void positional_ambiguity_body(Lane& lane, const PositionalAmbiguityParams& params) {
  RowContext<Lane> context(lane, lane.threads(), nullptr);
  choose_of_row(context, params, lane.block());
}

template <class Lane>
R2D_DEVICE void update_stability_body(const Lane& lane, const UpdateStabilityParams& params) {
  const int64_t i = lane.block() * lane.threads() + lane.thread();
  if (i < params.cells) advance_cell(params, i);
}

}  // namespace r2dllm::cuda

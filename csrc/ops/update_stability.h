// SPDX-License-Identifier: Apache-2.0
// update_stability_: advance the streaks of a block and report the cells that have become stable.
#pragma once

#include "../rules/stability.h"

namespace r2dllm {

struct UpdateStabilityParams {
  int64_t cells;              // B * L
  Streaks streaks;            // [B, L], in and out
  const int64_t* prediction;  // [B, L]
  const float* confidence;    // [B, L]
  const bool* was_masked;     // [B, L]
  const bool* is_masked;      // [B, L]
  StabilityOptions options;
  bool* stable;  // [B, L], out
};

R2D_HOST_DEVICE void advance_cell(const UpdateStabilityParams& params, int64_t i) {
  const Observation cell{.was_masked = params.was_masked[i],
                         .is_masked = params.is_masked[i],
                         .prediction = params.prediction[i],
                         .confidence = params.confidence[i]};
  params.stable[i] = advance(params.streaks, i, cell, params.options);
}

namespace cpu {
void update_stability(const UpdateStabilityParams& params);
}
namespace cuda {
void update_stability(const UpdateStabilityParams& params);
}

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// update_stability_: advance the streaks of a block and report the cells that have become stable.
#pragma once

#include "../rules/stability.h"

namespace r2dllm {

struct UpdateStabilityParams {
  int64_t cells;              // B * L
  int32_t* streak_count;      // [B, L], in and out
  int64_t* streak_id;         // [B, L], in and out
  float* streak_sum;          // [B, L], in and out
  float* streak_max;          // [B, L], in and out
  const int64_t* prediction;  // [B, L]
  const float* confidence;    // [B, L]
  const bool* was_masked;     // [B, L]
  const bool* is_masked;      // [B, L]
  int64_t steps;
  float min_confidence;
  TemporalEval eval;
  bool* stable;  // [B, L], out
};

R2D_HOST_DEVICE void advance_cell(const UpdateStabilityParams& params, int64_t i) {
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

namespace cpu {
void update_stability(const UpdateStabilityParams& params);
}
namespace cuda {
void update_stability(const UpdateStabilityParams& params);
}

}  // namespace r2dllm

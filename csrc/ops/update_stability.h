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

namespace cpu {
void update_stability(const UpdateStabilityParams& params);
}
namespace cuda {
void update_stability(const UpdateStabilityParams& params);
}

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// What DecodeConfig says, as the rules read it.
#pragma once

#include "base_rule.h"
#include "confidence.h"
#include "neighbour.h"
#include "positional_ambiguity.h"
#include "stability.h"
#include "window_pool.h"

namespace r2dllm {

// What happens where the mask id is the likeliest: it counts as -inf; it is refused, so that the
// cell stays masked; the cell is no candidate in this step.
enum class MaskPrediction : int32_t { kBan, kAllow, kSkip, kCount };

enum class SampledConfidence : int32_t { kUntempered, kTempered, kCount };

struct StepOptions {
  int64_t mask_id;  // -1: none
  MaskPrediction mask_prediction;
  BaseRule base;
  float threshold;  // or kNoThreshold
  Compare compare;
  int64_t quota;
  double factor;
  double error_budget;
  double entropy_budget;
  bool last_free;
  int64_t steps_per_block;  // 0: one token a step
  WindowOptions window;
  NeighbourOptions neighbour;
  RunOptions run;  // mode kOff: off
  StabilityOptions stability;
  float edit_threshold;  // or kNoThreshold
  SampledConfidence sampled_confidence;
  uint64_t seed;
  Rounding rounding;
};

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// Temporal redundancy: predictions that have stopped changing (paper: gamma_last).
#pragma once

#include "host_device.h"

namespace r2dllm {

enum class TemporalEval : int32_t { kLast, kAve, kMax };

struct Streak {
  int32_t count;
  int64_t id;
  float sum;
  float max;

  static R2D_HOST_DEVICE Streak none() { return {0, -1, 0.0f, 0.0f}; }
};

// One more observation of a cell that is still masked.
R2D_HOST_DEVICE Streak observe(const Streak& streak, int64_t prediction, float confidence) {
  if (streak.count > 0 && streak.id == prediction) {
    return {streak.count + 1, prediction, streak.sum + confidence,
            confidence > streak.max ? confidence : streak.max};
  }
  return {1, prediction, confidence, confidence};
}

// Is the streak long enough, and the evidence strong enough, to commit its prediction?
R2D_HOST_DEVICE bool is_stable(const Streak& streak, float confidence, int64_t steps,
                               float min_confidence, TemporalEval eval) {
  if (streak.count < steps) return false;
  const float evidence = eval == TemporalEval::kLast ? confidence
                         : eval == TemporalEval::kMax
                             ? streak.max
                             : streak.sum / static_cast<float>(streak.count);
  return evidence >= min_confidence;
}

struct Observation {
  bool was_masked;  // before the step
  bool is_masked;   // after the other rules of the step
  int64_t prediction;
  float confidence;  // NaN: no prediction
};

// One step of one cell; true if its prediction is to be committed, which ends the streak. A cell
// that was not masked before is left alone; one committed meanwhile, or without a prediction, has
// no streak.
R2D_HOST_DEVICE bool advance(Streak& streak, const Observation& cell, int64_t steps,
                             float min_confidence, TemporalEval eval) {
  if (!cell.was_masked) return false;
  if (!cell.is_masked || cell.prediction < 0 || cell.confidence - cell.confidence != 0.0f) {
    streak = Streak::none();
    return false;
  }
  streak = observe(streak, cell.prediction, cell.confidence);
  const bool stable = is_stable(streak, cell.confidence, steps, min_confidence, eval);
  if (stable) streak = Streak::none();
  return stable;
}

}  // namespace r2dllm

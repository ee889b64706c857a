// SPDX-License-Identifier: Apache-2.0
// Temporal redundancy: predictions that have stopped changing (paper: gamma_last).
#pragma once

#include "host_device.h"

namespace r2dllm {

enum class TemporalEval : int32_t { kLast, kAve, kMax, kCount };

struct StabilityOptions {
  int64_t steps;  // 0: off
  float min_confidence;
  TemporalEval mode;
};

struct Streak {
  int32_t count;
  int64_t id;
  float sum;
  float max;

  static R2D_HOST_DEVICE Streak none() { return {0, -1, 0.0f, 0.0f}; }
};

// The streaks of some cells, an array per field.
struct Streaks {
  int32_t* count;
  int64_t* id;
  float* sum;
  float* max;

  R2D_HOST_DEVICE Streak load(int64_t i) const { return {count[i], id[i], sum[i], max[i]}; }
  R2D_HOST_DEVICE void store(int64_t i, const Streak& streak) const {
    count[i] = streak.count;
    id[i] = streak.id;
    sum[i] = streak.sum;
    max[i] = streak.max;
  }
  R2D_HOST_DEVICE Streaks from(int64_t first) const {
    return {count + first, id + first, sum + first, max + first};
  }
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
R2D_HOST_DEVICE bool is_stable(const Streak& streak, float confidence,
                               const StabilityOptions& options) {
  if (streak.count < options.steps) return false;
  const float evidence = options.mode == TemporalEval::kLast ? confidence
                         : options.mode == TemporalEval::kMax
                             ? streak.max
                             : streak.sum / static_cast<float>(streak.count);
  return evidence >= options.min_confidence;
}

struct Observation {
  bool was_masked;  // before the step
  bool is_masked;   // after the other rules of the step
  int64_t prediction;
  float confidence;  // NaN: no prediction
};

// One step of cell i; true if its prediction is to be committed, which ends the streak. A cell that
// was not masked before is left alone; one committed meanwhile, or without a prediction, has no
// streak.
R2D_HOST_DEVICE bool advance(const Streaks& streaks, int64_t i, const Observation& cell,
                             const StabilityOptions& options) {
  if (!cell.was_masked) return false;
  if (!cell.is_masked || cell.prediction < 0 || cell.confidence - cell.confidence != 0.0f) {
    streaks.store(i, Streak::none());
    return false;
  }
  const Streak streak = observe(streaks.load(i), cell.prediction, cell.confidence);
  const bool stable = is_stable(streak, cell.confidence, options);
  streaks.store(i, stable ? Streak::none() : streak);
  return stable;
}

}  // namespace r2dllm

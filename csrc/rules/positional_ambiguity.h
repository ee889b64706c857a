// SPDX-License-Identifier: Apache-2.0
// Positional ambiguity: runs of neighbours that compete for one token (paper: gamma_max).
#pragma once

#include "random.h"

namespace r2dllm {

enum class TokenCluster : int32_t { kOff, kConfidence, kMid, kRandom };

struct Run {
  int64_t end;   // one past the last cell
  int64_t best;  // most confident cell, leftmost on ties
};

R2D_HOST_DEVICE bool may_join_run(bool is_masked, int64_t prediction, float confidence) {
  return is_masked && prediction >= 0 && confidence - confidence == 0.0f;
}

// `in_run(i)`: may_join_run of cell i. Does a maximal run of one prediction begin at cell i?
template <class InRun, class Prediction>
R2D_HOST_DEVICE bool begins_run(int64_t i, InRun in_run, Prediction prediction) {
  return in_run(i) && (i == 0 || !in_run(i - 1) || prediction(i - 1) != prediction(i));
}

template <class InRun, class Prediction, class Confidence>
R2D_HOST_DEVICE Run run_from(int64_t start, int64_t length, InRun in_run, Prediction prediction,
                             Confidence confidence) {
  Run run{start + 1, start};
  while (run.end < length && in_run(run.end) && prediction(run.end) == prediction(start)) {
    if (confidence(run.end) > confidence(run.best)) run.best = run.end;
    ++run.end;
  }
  return run;
}

// The cell that a run beginning at `start` commits, or -1. `draw()` is uniform in [0, 1).
template <class Confidence, class Uniform>
R2D_HOST_DEVICE int64_t chosen_cell(int64_t start, const Run& run, int64_t min_run,
                                    float min_confidence, TokenCluster mode, Confidence confidence,
                                    Uniform draw) {
  const int64_t size = run.end - start;
  if (size < min_run || !(confidence(run.best) > min_confidence)) return -1;
  if (mode == TokenCluster::kConfidence) return run.best;
  if (mode == TokenCluster::kMid) return start + size / 2;
  const int64_t offset = static_cast<int64_t>(draw() * static_cast<double>(size));
  return start + (offset < size ? offset : size - 1);
}

}  // namespace r2dllm

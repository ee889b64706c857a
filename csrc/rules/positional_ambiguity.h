// SPDX-License-Identifier: Apache-2.0
// Positional ambiguity: runs of neighbours that compete for one token (paper: gamma_max).
#pragma once

#include "random.h"

namespace r2dllm {

enum class TokenCluster : int32_t { kOff, kConfidence, kMid, kRandom, kCount };

struct RunOptions {
  TokenCluster mode;
  int64_t min_run;
  float min_confidence;  // which the best cell of the run has to exceed
};

// The cells that runs are made of: one row.
struct RunCells {
  int64_t length;
  const bool* masked;
  const int64_t* prediction;
  const float* confidence;

  R2D_HOST_DEVICE bool may_join(int64_t i) const {
    return masked[i] && prediction[i] >= 0 && confidence[i] - confidence[i] == 0.0f;
  }
  // Are i and i + 1 of one run?
  R2D_HOST_DEVICE bool continues(int64_t i) const {
    return i + 1 < length && may_join(i + 1) && prediction[i + 1] == prediction[i];
  }
  R2D_HOST_DEVICE bool begins(int64_t i) const {
    return may_join(i) && (i == 0 || !may_join(i - 1) || !continues(i - 1));
  }
};

// The cell that the run beginning at `start` commits, or -1. `draw()` is uniform in [0, 1).
template <class Uniform>
R2D_HOST_DEVICE int64_t chosen_cell(const RunCells& cells, int64_t start, const RunOptions& options,
                                    Uniform draw) {
  int64_t last = start, best = start;  // leftmost on ties
  while (cells.continues(last)) {
    ++last;
    if (cells.confidence[last] > cells.confidence[best]) best = last;
  }
  const int64_t size = last + 1 - start;
  if (size < options.min_run || !(cells.confidence[best] > options.min_confidence)) return -1;
  if (options.mode == TokenCluster::kConfidence) return best;
  if (options.mode == TokenCluster::kMid) return start + size / 2;
  const int64_t offset = static_cast<int64_t>(draw() * static_cast<double>(size));
  return start + (offset < size ? offset : size - 1);
}

// f(i) for the chosen cell of every run that has one; `draw(start)` is the random number of a run.
// `ctx`: see rules/decode_step.h. f must not change what `cells` shows.
template <class Context, class Uniform, class F>
R2D_HOST_DEVICE void choose_of_runs(Context& ctx, const RunCells& cells, const RunOptions& options,
                                    Uniform draw, F f) {
  ctx.for_each(cells.length, [&](int64_t start) {
    if (!cells.begins(start)) return;
    const int64_t chosen = chosen_cell(cells, start, options, [&] { return draw(start); });
    if (chosen >= 0) f(chosen);
  });
}

}  // namespace r2dllm

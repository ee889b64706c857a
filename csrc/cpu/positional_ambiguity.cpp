// SPDX-License-Identifier: Apache-2.0
#include "../ops/positional_ambiguity.h"

#include <algorithm>

namespace r2dllm::cpu {

void positional_ambiguity(const PositionalAmbiguityParams& params) {
  const int64_t length = params.length;
  std::fill_n(params.chosen, params.batch * length, false);
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t* ids = params.prediction + b * length;
    const float* values = params.confidence + b * length;
    const bool* masked = params.is_masked + b * length;
    const auto in_run = [&](int64_t i) { return may_join_run(masked[i], ids[i], values[i]); };
    const auto prediction = [&](int64_t i) { return ids[i]; };
    const auto confidence = [&](int64_t i) { return values[i]; };
    for (int64_t i = 0; i < length; ++i) {
      if (!begins_run(i, in_run, prediction)) continue;
      const Run run = run_from(i, length, in_run, prediction, confidence);
      const int64_t cell = chosen_cell(
          i, run, params.min_run, params.min_confidence, params.mode, confidence,
          [&] { return uniform(params.seed, params.row[b], params.step, i, Draw::kRun); });
      if (cell >= 0) params.chosen[b * length + cell] = true;
    }
  }
}

}  // namespace r2dllm::cpu

// SPDX-License-Identifier: Apache-2.0
// positional_ambiguity: the chosen cell of each run of equal predictions.
#pragma once

#include "../rules/positional_ambiguity.h"

namespace r2dllm {

struct PositionalAmbiguityParams {
  int64_t batch, length;
  const int64_t* prediction;  // [B, L]
  const float* confidence;    // [B, L]
  const bool* is_masked;      // [B, L]
  RunOptions options;
  uint64_t seed;
  const int64_t* row;  // [B], identities in the random numbers
  int64_t step;
  bool* chosen;  // [B, L], out
};

// Row b. `ctx`: see rules/decode_step.h.
template <class Context>
R2D_HOST_DEVICE void choose_of_row(Context& ctx, const PositionalAmbiguityParams& params,
                                   int64_t b) {
  const int64_t first = b * params.length;
  bool* const chosen = params.chosen + first;
  const RunCells cells{.length = params.length,
                       .masked = params.is_masked + first,
                       .prediction = params.prediction + first,
                       .confidence = params.confidence + first};
  ctx.for_each(params.length, [&](int64_t i) { chosen[i] = false; });
  choose_of_runs(
      ctx, cells, params.options,
      [&](int64_t start) {
        return uniform(params.seed, params.row[b], params.step, start, Draw::kRun);
      },
      [&](int64_t i) { chosen[i] = true; });
}

namespace cpu {
void positional_ambiguity(const PositionalAmbiguityParams& params);
}
namespace cuda {
void positional_ambiguity(const PositionalAmbiguityParams& params);
}

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
#include "../ops/update_stability.h"

namespace r2dllm::cpu {

void update_stability(const UpdateStabilityParams& params) {
  for (int64_t i = 0; i < params.cells; ++i) {
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
}

}  // namespace r2dllm::cpu

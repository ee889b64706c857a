// SPDX-License-Identifier: Apache-2.0
#include "../ops/update_stability.h"

namespace r2dllm::cpu {

void update_stability(const UpdateStabilityParams& params) {
  for (int64_t i = 0; i < params.cells; ++i) advance_cell(params, i);
}

}  // namespace r2dllm::cpu

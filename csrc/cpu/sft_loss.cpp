// SPDX-License-Identifier: Apache-2.0
#include "../ops/sft_loss.h"

namespace r2dllm::cpu {

// One thread, in the order of the rows: next to the pass over V this costs nothing.
void sft_reduce(const SftReduceParams& params) {
  LossSums sums{0.0, 0.0, 0, 0};
  for (int64_t i = 0; i < params.rows; ++i) sums = sums + loss_term(params, i);
  const double normalizer = params.normalizer ? *params.normalizer : static_cast<double>(sums.rows);
  const Loss loss = loss_of(sums, normalizer, params.entropy_weight);
  params.loss.set(0, loss.value);
  for (int64_t i = 0; i < params.rows; ++i) write_derivatives(params, i, loss);
}

}  // namespace r2dllm::cpu

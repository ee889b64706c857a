// SPDX-License-Identifier: Apache-2.0
#include "../ops/positional_ambiguity.h"

#include "row_context.h"

namespace r2dllm::cpu {

void positional_ambiguity(const PositionalAmbiguityParams& params) {
  RowContext context;
  for (int64_t b = 0; b < params.batch; ++b) choose_of_row(context, params, b);
}

}  // namespace r2dllm::cpu

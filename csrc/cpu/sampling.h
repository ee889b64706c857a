// SPDX-License-Identifier: Apache-2.0
// Drawing tokens from softmax(logits / temperature), restricted to top-k / top-p.
#pragma once

#include "../rules/sampling.h"
#include "vocab_pass.h"

namespace r2dllm::cpu {

// The column that `uniform` in [0, 1) falls on, in the order of the vocabulary. The row is valid.
int64_t draw_token(const VocabPass& pass, int64_t row, const SamplingOptions& options,
                   double uniform);

}  // namespace r2dllm::cpu

// SPDX-License-Identifier: Apache-2.0
// Drawing tokens from softmax(logits / temperature), restricted to top-k / top-p / min-p.
#pragma once

#include "../rules/sampling.h"
#include "vocab_pass.h"

namespace r2dllm::cpu {

struct DrawnToken {
  int64_t column;
  double tempered;  // its probability in the distribution that it was drawn from
};

// The column that `uniform` in [0, 1) falls on, in the order of the vocabulary. `cell`: i of the
// pass, valid; the temperature is > 0.
DrawnToken draw_token(const VocabPass& pass, int64_t cell, const SamplingOptions& options,
                      double uniform);

}  // namespace r2dllm::cpu

// SPDX-License-Identifier: Apache-2.0
// token_confidence: the pass over V. One read of the logits of the candidate rows.
#pragma once

#include <ATen/core/Tensor.h>

#include "../rules/logits_view.h"

namespace r2dllm {

LogitsView view_logits(const at::Tensor& logits, int64_t excluded, int64_t shift);

struct TokenConfidenceParams {
  LogitsView logits;
  const bool* candidates;  // [B, L] contiguous
  int64_t* prediction;     // [B, L] contiguous, out
  float* confidence;       // [B, L] contiguous, out
};

namespace cpu {
void token_confidence(const TokenConfidenceParams& params);
}

}  // namespace r2dllm

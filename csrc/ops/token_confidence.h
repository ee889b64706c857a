// SPDX-License-Identifier: Apache-2.0
// token_confidence: the pass over V. One read of the logits of the candidate rows.
#pragma once

#include "../rules/logits_view.h"

namespace r2dllm {

struct TokenConfidenceParams {
  LogitsView logits;
  const bool* candidates;  // [B, L] contiguous; null on CUDA: all
  int64_t* prediction;     // [B, L] contiguous, out
  float* confidence;       // [B, L] contiguous, out
  void* workspace;
};

namespace cpu {
void token_confidence(const TokenConfidenceParams& params);
}
namespace cuda {
void token_confidence(const TokenConfidenceParams& params);
}

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// token_confidence: the pass over V. One read of the logits of the candidate rows.
#pragma once

#include <ATen/core/Tensor.h>

#include "../rules/logits_view.h"

namespace r2dllm {

LogitsView view_logits(const at::Tensor& logits, int64_t excluded, int64_t shift);

// Device memory for the partial results of the pass; nothing on the CPU.
at::Tensor vocab_pass_workspace(const at::Tensor& logits, const LogitsView& view);

struct TokenConfidenceParams {
  LogitsView logits;
  const bool* candidates;  // [B, L] contiguous
  int64_t* prediction;     // [B, L] contiguous, out
  float* confidence;       // [B, L] contiguous, out
  void* workspace;
};

namespace cpu {
void token_confidence(const TokenConfidenceParams& params);
}
namespace cuda {
int64_t vocab_pass_bytes(const LogitsView& logits);
void token_confidence(const TokenConfidenceParams& params);
}  // namespace cuda

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// decode_step / select: the pass over V, then all rules of every row, in one call.
#pragma once

#include "../rules/decode_step.h"
#include "../rules/logits_view.h"
#include "../rules/sampling.h"
#include "../rules/vocab_statistics.h"

namespace r2dllm {

struct DecodeStepParams {
  LogitsView logits;         // of statistics: the shape alone
  const double* statistics;  // [B, L, kStatistics] contiguous, in place of logits; or null
  StepOptions options;
  SamplingOptions sampling;

  // In.
  const bool* candidates;  // [B, L] contiguous; null: tokens == mask_id
  const int64_t* tokens;   // [B, L]
  int64_t tokens_batch_stride, tokens_length_stride;

  // In and out, contiguous.
  int64_t* written_tokens;  // tokens, or null: nothing is written
  Streaks streaks;          // [B, L]
  int64_t* counters;        // [B, kCounters]

  // Out, contiguous.
  int64_t* prediction;  // [B, L]
  float* confidence;    // [B, L]
  uint8_t* rule;        // [B, L]
  int32_t* remaining;   // [B]

  void* workspace;  // CUDA: of decode_step_bytes
};

namespace cpu {
void decode_step(const DecodeStepParams& params);
}
namespace cuda {
int64_t decode_step_bytes(const LogitsView& logits, const SamplingOptions& sampling);
void decode_step(const DecodeStepParams& params);
}  // namespace cuda

}  // namespace r2dllm

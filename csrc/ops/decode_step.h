// SPDX-License-Identifier: Apache-2.0
// decode_step / select: the pass over V, then all rules of every row, in one call.
#pragma once

#include "../rules/decode_step.h"
#include "../rules/logits_view.h"
#include "../rules/row_params.h"
#include "../rules/vocab_statistics.h"

namespace r2dllm {

// The state of `rows` rows; row b of the batch has row slots[b] of it.
struct StateView {
  int64_t rows = 0;
  const int64_t* slots = nullptr;  // [B]; null: b
  Streaks streaks = {};            // [rows, L] contiguous, in and out; null: no state
  int64_t* counters = nullptr;     // [rows, kCounters]
  int16_t* step_map = nullptr;     // [rows, L]; null: not wanted

  // The row of the state, or -1: a slot outside it.
  R2D_HOST_DEVICE int64_t slot(int64_t b) const {
    const int64_t slot = slots != nullptr ? slots[b] : b;
    return counters == nullptr || (slot >= 0 && slot < rows) ? slot : -1;
  }
};

// What each row draws with, and its random numbers: a RowOptions of cuda/sampling.h.
struct RowSampling {
  SamplingOptions options;
  RowParams rows;
  uint64_t seed;
  StateView state;

  // Temperature 0: the row draws nothing.
  R2D_HOST_DEVICE SamplingOptions operator()(int64_t b) const {
    SamplingOptions own = options;
    const bool valid = take_sampling(rows, b, own) && in_range(rows, b) && state.slot(b) >= 0;
    if (!valid) own.temperature = 0.0;
    return own;
  }
  R2D_HOST_DEVICE double uniform(int64_t b, int64_t l) const {
    return r2dllm::uniform(seed_of_row(rows, b, seed), state.counters + state.slot(b) * kCounters,
                           l, Draw::kToken);
  }
};

struct DecodeStepParams {
  LogitsView logits;         // of statistics: the shape alone
  const double* statistics;  // [B, L, kStatistics] contiguous, in place of logits; or null
  StepOptions options;
  SamplingOptions sampling;
  RowParams rows;

  // In, contiguous.
  const bool* candidates;   // [B, L]; null: tokens == mask_id
  const bool* editable;     // [B, L]; null: none
  const int64_t* proposed;  // [B, L]; null: none

  // In and out.
  TokensView tokens;
  StateView state;

  // Out, contiguous.
  int64_t* prediction;  // [B, L]
  float* confidence;    // [B, L]
  uint8_t* rule;        // [B, L]
  int32_t* remaining;   // [B]
  float* entropy;       // [B, L]; null: not asked for

  void* workspace;  // CUDA: of decode_step_bytes

  R2D_HOST_DEVICE bool is_candidate(int64_t b, int64_t l) const {
    return candidates != nullptr ? candidates[b * logits.length + l]
                                 : tokens.get(b, l) == options.mask_id;
  }
  R2D_HOST_DEVICE bool is_editable(int64_t b, int64_t l) const {
    return editable != nullptr && editable[b * logits.length + l] && !is_candidate(b, l);
  }
  // May any row draw its tokens, and leave some out of the draw?
  R2D_HOST_DEVICE bool may_draw() const {
    return proposed == nullptr && (sampling.temperature > 0.0 || rows.temperature);
  }
  R2D_HOST_DEVICE bool may_restrict() const {
    return may_draw() && (restricts(sampling) || rows.top_k || rows.top_p || rows.min_p);
  }
  R2D_HOST_DEVICE RowSampling row_sampling() const { return {sampling, rows, options.seed, state}; }

  // Gives `own`, a copy of the options, the values of row b; false: the row is left alone.
  R2D_HOST_DEVICE bool take_row(int64_t b, StepOptions& own) const {
    return take_options(rows, b, own) && state.slot(b) >= 0;
  }
};

namespace cpu {
void decode_step(const DecodeStepParams& params);
}
namespace cuda {
int64_t decode_step_bytes(const DecodeStepParams& params);
void decode_step(const DecodeStepParams& params);
}  // namespace cuda

}  // namespace r2dllm

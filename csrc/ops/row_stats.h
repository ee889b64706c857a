// SPDX-License-Identifier: Apache-2.0
// row_stats: loss, entropy, confidence and argmax of rows that have a target, and the gradient of
// the first two.
#pragma once

#include "../rules/logits_view.h"
#include "../rules/row_stats.h"
#include "../rules/row_values.h"

namespace r2dllm {

struct RowStatsParams {
  LogitsView logits;
  const int64_t* targets;  // [B, L] contiguous
  int64_t ignore_index;
  double temperature;     // 0: no entropy
  WritableRowValues nll;  // [B, L] contiguous, out; so are all below
  WritableRowValues entropy;
  float* confidence;
  int64_t* prediction;
  RowState* state;
  void* workspace;  // CUDA: row_stats_bytes
};

struct RowStatsBackwardParams {
  LogitsView logits;  // columns [first_id, first_id + V) of the rows
  int64_t first_id;
  const int64_t* targets;
  int64_t ignore_index;
  double temperature;
  const RowState* state;
  RowValues d_nll;      // [B, L] contiguous
  RowValues d_entropy;  // data null: none
  void* gradient;       // [B, L, V] of the type of the logits, out; may be the logits
  int64_t gradient_batch_stride, gradient_length_stride;
};

namespace cpu {
void row_stats(const RowStatsParams& params);
void row_stats_backward(const RowStatsBackwardParams& params);
}  // namespace cpu
namespace cuda {
int64_t row_stats_bytes(const LogitsView& logits);
void row_stats(const RowStatsParams& params);
void row_stats_backward(const RowStatsBackwardParams& params);
}  // namespace cuda

}  // namespace r2dllm

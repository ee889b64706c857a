// SPDX-License-Identifier: Apache-2.0
// vocab_statistics: the pass over a part of V. merge_statistics: the parts of all ranks together.
#pragma once

#include "../rules/logits_view.h"
#include "../rules/vocab_statistics.h"

namespace r2dllm {

struct VocabStatisticsParams {
  LogitsView logits;
  const bool* candidates;  // [B, L] contiguous; null on CUDA: all
  int64_t first_id;        // of column 0
  bool with_entropy;
  double* statistics;  // [B, L, kStatistics] contiguous, out
  void* workspace;
};

struct MergeStatisticsParams {
  int64_t parts, cells;
  const double* statistics;  // [parts, cells, kStatistics] contiguous
  double* merged;            // [cells, kStatistics] contiguous, out
};

namespace cpu {
void vocab_statistics(const VocabStatisticsParams& params);
void merge_statistics(const MergeStatisticsParams& params);
}  // namespace cpu
namespace cuda {
void vocab_statistics(const VocabStatisticsParams& params);
void merge_statistics(const MergeStatisticsParams& params);
}  // namespace cuda

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
#include "../ops/vocab_statistics.h"

#include "torch_parallel.h"
#include "vocab_pass.h"

namespace r2dllm::cpu {

void vocab_statistics(const VocabStatisticsParams& params) {
  const int64_t cells = params.logits.batch * params.logits.length;
  for (int64_t cell = 0; cell < cells; ++cell) {
    store_statistics(params.statistics + cell * kStatistics, -INFINITY, 0.0, -1,
                     params.with_entropy ? 0.0 : NAN);
  }
  const VocabPass pass(params.logits, params.candidates, 0.0, params.with_entropy);
  constexpr int64_t kCellsWorthAThread = 16;
  parallel_for(0, pass.cells(), kCellsWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const OnlineSoftmax& stats = pass.stats(i);
      int64_t id = -1;
      double mass = stats.sum;  // 0 or NaN: no prediction
      if (is_valid(stats)) {
        const int64_t column = pass.argmax(i);
        id = params.first_id + column;
        mass = pass.mass(i, column);
      }
      store_statistics(params.statistics + pass.cell(i) * kStatistics, stats.max, mass, id,
                       params.with_entropy ? pass.moment(i) : NAN);
    }
  });
}

void merge_statistics(const MergeStatisticsParams& params) {
  for (int64_t cell = 0; cell < params.cells; ++cell) {
    r2dllm::merge_statistics(
        params.parts,
        [&](int64_t part) {
          return params.statistics + (part * params.cells + cell) * kStatistics;
        },
        params.merged + cell * kStatistics);
  }
}

}  // namespace r2dllm::cpu

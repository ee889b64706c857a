// SPDX-License-Identifier: Apache-2.0
#include "../ops/token_confidence.h"

#include <algorithm>

#include "torch_parallel.h"
#include "vocab_pass.h"

namespace r2dllm::cpu {

void token_confidence(const TokenConfidenceParams& params) {
  const int64_t cells = params.logits.batch * params.logits.length;
  std::fill_n(params.prediction, cells, int64_t{-1});
  std::fill_n(params.confidence, cells, 0.0f);
  const VocabPass pass(params.logits, params.candidates);
  constexpr int64_t kRowsWorthAThread = 16;
  parallel_for(0, pass.cells(), kRowsWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t cell = pass.cell(row);
      const bool valid = is_valid(pass.stats(row));
      params.prediction[cell] = valid ? pass.argmax(row) : -1;
      params.confidence[cell] = valid ? pass.probability(row, params.prediction[cell]) : NAN;
    }
  });
}

}  // namespace r2dllm::cpu

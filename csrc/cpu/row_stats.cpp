// SPDX-License-Identifier: Apache-2.0
#include "../ops/row_stats.h"

#include <algorithm>
#include <memory>

#include "torch_parallel.h"
#include "vocab_pass.h"

namespace r2dllm::cpu {

void row_stats(const RowStatsParams& params) {
  const int64_t cells = params.logits.batch * params.logits.length;
  const bool with_entropy = params.temperature != 0.0;
  const std::unique_ptr<bool[]> has_target(new bool[cells]);
  for (int64_t cell = 0; cell < cells; ++cell) {
    has_target[cell] = params.targets[cell] != params.ignore_index;
    if (has_target[cell]) continue;
    params.nll.set(cell, 0.0);
    params.entropy.set(cell, 0.0);
    params.confidence[cell] = 0.0f;
    params.prediction[cell] = -1;
    params.state[cell] = RowState{};
  }
  const VocabPass pass(params.logits, has_target.get(),
                       with_entropy ? tempered_scale(params.temperature) : 0.0);
  constexpr int64_t kRowsWorthAThread = 16;
  parallel_for(0, pass.cells(), kRowsWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t cell = pass.cell(row);
      const OnlineSoftmax& stats = pass.stats(row);
      const bool valid = is_valid(stats);
      const TemperedSums tempered =
          valid && with_entropy ? pass.tempered(row) : TemperedSums{0.0, 0.0};
      const double nll =
          negative_log_likelihood(pass.token_stats(row, params.targets[cell]), stats);
      params.nll.set(cell, nll);
      params.entropy.set(cell, !with_entropy ? 0.0 : valid ? entropy(tempered) : NAN);
      params.prediction[cell] = valid ? pass.argmax(row) : -1;
      params.confidence[cell] = valid ? pass.probability(row, params.prediction[cell]) : NAN;
      params.state[cell] = {stats.max, stats.exponent, valid ? stats.sum : NAN,
                            nll,       tempered.mass,  tempered.moment};
    }
  });
}

void row_stats_backward(const RowStatsBackwardParams& params) {
  const LogitsView& logits = params.logits;
  const VocabKernels& kernels = vocab_kernels(logits.type);
  const int64_t bytes = kLogitBytes[static_cast<int>(logits.type)];
  const int64_t slices = (logits.vocab + kSliceWidth - 1) / kSliceWidth;
  constexpr int64_t kTasksWorthAThread = 4;
  parallel_for(
      0, logits.batch * logits.length * slices, kTasksWorthAThread, [&](int64_t from, int64_t to) {
        for (int64_t task = from; task < to; ++task) {
          const int64_t cell = task / slices, begin = task % slices * kSliceWidth;
          const int64_t size = std::min(logits.vocab - begin, kSliceWidth);
          const int64_t b = cell / logits.length, l = cell % logits.length;
          char* out =
              static_cast<char*>(params.gradient) +
              (b * params.gradient_batch_stride + l * params.gradient_length_stride + begin) *
                  bytes;
          const int64_t target = params.targets[cell] - params.first_id - begin;
          if (params.targets[cell] == params.ignore_index) {
            memset(out, 0, size * bytes);
            continue;
          }
          const char* in = static_cast<const char*>(logits.data) +
                           (b * logits.batch_stride + l * logits.length_stride + begin) * bytes;
          const RowState& state = params.state[cell];
          const double d_nll = params.d_nll.get(cell);
          const double d_entropy = params.d_entropy.data ? params.d_entropy.get(cell) : 0.0;
          const RowGradient row =
              row_gradient(state, d_nll, d_entropy, tempered_scale(params.temperature));
          // `out` may be `in`: the target's logit is read before its slice is written.
          const bool here = target >= 0 && target < size && !is_nan(row);
          const double at_target =
              here ? target_gradient(row, kernels.load(in, target), d_nll, state.nll) : 0.0;
          kernels.gradient(in, out, size, row);
          if (here) kernels.store(out, target, at_target);
        }
      });
}

}  // namespace r2dllm::cpu

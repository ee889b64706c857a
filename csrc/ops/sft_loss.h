// SPDX-License-Identifier: Apache-2.0
// sft_loss: the weighted loss of a batch of rows, and its derivative by each row's statistics.
#pragma once

#include "../rules/row_stats.h"
#include "../rules/row_values.h"
#include "../rules/sft_loss.h"

namespace r2dllm {

struct SftReduceParams {
  int64_t rows;
  RowValues nll, entropy;  // [rows] contiguous; so are all below
  const int64_t* prediction;
  const int64_t* targets;
  int64_t ignore_index;
  const float* weight;       // null: 1 everywhere
  const double* normalizer;  // one number; null: the number of rows with a target
  double entropy_weight;
  EntropyGate gate;
  WritableRowValues loss;              // one number, out
  WritableRowValues d_nll, d_entropy;  // [rows], out
};

// What row i adds to the sums, and what they mean for row i.
R2D_HOST_DEVICE LossSums loss_term(const SftReduceParams& params, int64_t i) {
  if (params.targets[i] == params.ignore_index) return {0.0, 0.0, 0, 0};
  const double weight = params.weight ? static_cast<double>(params.weight[i]) : 1.0;
  const bool gated = passes(params.gate, params.prediction[i], params.targets[i]);
  return {weight * params.nll.get(i), gated ? params.entropy.get(i) : 0.0, 1, gated ? 1 : 0};
}

R2D_HOST_DEVICE void write_derivatives(const SftReduceParams& params, int64_t i, const Loss& loss) {
  const bool counts = params.targets[i] != params.ignore_index;
  const double weight = params.weight ? static_cast<double>(params.weight[i]) : 1.0;
  const bool gated = counts && passes(params.gate, params.prediction[i], params.targets[i]);
  params.d_nll.set(i, counts ? weight * loss.d_nll : 0.0);
  params.d_entropy.set(i, gated ? loss.d_entropy : 0.0);
}

namespace cpu {
void sft_reduce(const SftReduceParams& params);
}
namespace cuda {
void sft_reduce(const SftReduceParams& params);
}

}  // namespace r2dllm

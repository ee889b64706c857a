// SPDX-License-Identifier: Apache-2.0
// How rows add up to the loss of a batch.
#pragma once

#include "host_device.h"

namespace r2dllm {

// Whose entropy counts: rows whose argmax is the target, or all with a target.
enum class EntropyGate : int32_t { kCorrect, kAll, kCount };

R2D_HOST_DEVICE bool passes(EntropyGate gate, int64_t prediction, int64_t target) {
  return gate == EntropyGate::kAll || prediction == target;
}

struct LossSums {
  double nll, entropy;  // weighted nll of the rows with a target; entropy of the gated ones
  int64_t rows, gated;
};

R2D_HOST_DEVICE LossSums operator+(const LossSums& a, const LossSums& b) {
  return {a.nll + b.nll, a.entropy + b.entropy, a.rows + b.rows, a.gated + b.gated};
}

// The loss, and its derivative by weight * nll and by the entropy of a row that counts. No rows: 0,
// whatever the normalizer is.
struct Loss {
  double value, d_nll, d_entropy;
};

R2D_HOST_DEVICE Loss loss_of(const LossSums& sums, double normalizer, double entropy_weight) {
  Loss loss{0.0, 0.0, 0.0};
  if (sums.rows > 0) {
    loss.value = sums.nll / normalizer;
    loss.d_nll = 1.0 / normalizer;
  }
  if (sums.gated > 0 && entropy_weight != 0.0) {
    const double gated = static_cast<double>(sums.gated);
    loss.value += entropy_weight * (sums.entropy / gated);
    loss.d_entropy = entropy_weight / gated;
  }
  return loss;
}

}  // namespace r2dllm

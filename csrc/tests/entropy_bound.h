// SPDX-License-Identifier: Apache-2.0
// The entropy of a row in long double, and how far off the CPU kernels may be (vocab_kernels.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../cpu/vocab_kernels.h"
#include "../rules/vocab_statistics.h"

namespace r2dllm::test {

struct ExactEntropy {
  double nats, p, vocab, mean_of_products;

  explicit ExactEntropy(const std::vector<double>& row) : vocab(static_cast<double>(row.size())) {
    const double max = *std::max_element(row.begin(), row.end());
    long double mass = 0, first = 0, second = 0;
    for (double z : row) {
      const long double d = static_cast<long double>(max) - z, term = std::exp(-d);
      if (z == -INFINITY) continue;
      mass += term;
      first += term * d;
      second += term * d * d;
    }
    nats = static_cast<double>(std::log(mass) + first / mass);
    p = static_cast<double>(1 / mass);
    mean_of_products = first > 0 ? static_cast<double>(second / first) : 0.0;
  }

  double bound() const {
    const double below = std::log1p(p * vocab / std::max(1 - p, 1e-9));
    return nats * 0x1p-24 *
               (2 * cpu::kTermError + 2 * cpu::kSumError + 3 +
                cpu::kLog2eError * std::max(mean_of_products, below)) +
           vocab * 0x1p-53 + kLeastEntropy;
  }
};

}  // namespace r2dllm::test

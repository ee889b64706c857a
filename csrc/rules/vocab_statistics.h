// SPDX-License-Identifier: Apache-2.0
// What a row of logits says, in three numbers that ranks can exchange when each holds a part of the
// vocabulary.
#pragma once

#include "confidence.h"

namespace r2dllm {

// Columns of the statistics: greatest logit, -inf if there is none; sum of exp(z - max), NaN if a
// logit is NaN or +inf; lowest id of the greatest logit, -1 if there is none.
enum Statistic : int { kMaximum, kMass, kTokenId, kStatistics };

R2D_HOST_DEVICE void store_statistics(double* statistics, double max, double mass, int64_t id) {
  statistics[kMaximum] = max;
  statistics[kMass] = mass;
  statistics[kTokenId] = max > -INFINITY ? static_cast<double>(id) : -1.0;
}

// `part(i)`: statistics of part i. The sum is taken in the order of the parts; ties go to the
// lowest id in any order.
template <class Part>
R2D_HOST_DEVICE void merge_statistics(int64_t parts, Part part, double* merged) {
  double max = -INFINITY, id = -1.0, mass = 0.0;
  for (int64_t i = 0; i < parts; ++i) {
    const double* one = part(i);
    if (one[kMaximum] > max || (one[kMaximum] == max && one[kTokenId] < id)) {
      max = one[kMaximum];
      id = one[kTokenId];
    }
  }
  for (int64_t i = 0; i < parts; ++i) {
    const double* one = part(i);
    // Without a finite maximum a mass is 0 or NaN.
    mass += one[kMaximum] > -INFINITY ? one[kMass] * exp2((one[kMaximum] - max) * kLog2eWide)
                                      : one[kMass];
  }
  store_statistics(merged, max, mass, static_cast<int64_t>(id));
}

struct Top {
  int64_t id;        // -1: no prediction
  float confidence;  // NaN: no prediction
};

// The greatest term of the mass is 1.
R2D_HOST_DEVICE Top top_of(double mass, int64_t id) {
  if (!(mass > 0.0)) return {-1, NAN};
  return {id, static_cast<float>(1.0 / mass)};
}

R2D_HOST_DEVICE Top top_of(const double* statistics) {
  return top_of(statistics[kMass], static_cast<int64_t>(statistics[kTokenId]));
}

}  // namespace r2dllm

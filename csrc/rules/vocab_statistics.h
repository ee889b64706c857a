// SPDX-License-Identifier: Apache-2.0
// What a row of logits says, in four numbers that ranks can exchange when each holds a part of the
// vocabulary.
#pragma once

#include "confidence.h"

namespace r2dllm {

// Columns of the statistics: greatest logit, -inf if there is none; sum of w = exp(z - max), NaN if
// a logit is NaN or +inf; lowest id of the greatest logit, -1 if there is none; sum of w * log(w)
// in nats, NaN if nobody asked for the entropy.
enum Statistic : int { kMaximum, kMass, kTokenId, kMoment, kStatistics };

R2D_HOST_DEVICE void store_statistics(double* statistics, double max, double mass, int64_t id,
                                      double moment) {
  statistics[kMaximum] = max;
  statistics[kMass] = mass;
  statistics[kTokenId] = max > -INFINITY ? static_cast<double>(id) : -1.0;
  statistics[kMoment] = moment;
}

// `part(i)`: statistics of part i. The sums are taken in the order of the parts; ties go to the
// lowest id in any order.
template <class Part>
R2D_HOST_DEVICE void merge_statistics(int64_t parts, Part part, double* merged) {
  double max = -INFINITY, id = -1.0, mass = 0.0, moment = 0.0;
  for (int64_t i = 0; i < parts; ++i) {
    const double* one = part(i);
    if (one[kMaximum] > max || (one[kMaximum] == max && one[kTokenId] < id)) {
      max = one[kMaximum];
      id = one[kTokenId];
    }
  }
  for (int64_t i = 0; i < parts; ++i) {
    const double* one = part(i);
    if (!(one[kMaximum] > -INFINITY)) {  // a mass of 0 or NaN
      mass += one[kMass];
      moment += one[kMoment];
      continue;
    }
    // Beside the greatest logit of all, the logarithm of each weight is `below` less.
    const double below = one[kMaximum] - max, factor = exp2(below * kLog2eWide);
    mass += one[kMass] * factor;
    moment += factor > 0.0 ? (one[kMoment] + below * one[kMass]) * factor : 0.0 * one[kMoment];
  }
  store_statistics(merged, max, mass, static_cast<int64_t>(id), moment);
}

// In nats.
R2D_HOST_DEVICE double entropy_of(const double* statistics) {
  return entropy_of(statistics[kMass], statistics[kMoment] * kLog2eWide);
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

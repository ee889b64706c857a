// SPDX-License-Identifier: Apache-2.0
// What a row of logits says, in four numbers that ranks can exchange when each holds a part of the
// vocabulary.
#pragma once

#include "confidence.h"

namespace r2dllm {

// Columns of the statistics: greatest logit, -inf if there is none; sum of exp(z - max), NaN if a
// logit is NaN or +inf; lowest id of the greatest logit, -1 where that mass is 0 or NaN; sum of
// u * exp(u) with u = z - max, in nats, NaN where no entropy is asked for.
enum Statistic : int { kMaximum, kMass, kTokenId, kMoment, kStatistics };

R2D_HOST_DEVICE void store_statistics(double* statistics, double max, double mass, int64_t id,
                                      double moment = NAN) {
  statistics[kMaximum] = max;
  statistics[kMass] = mass;
  statistics[kTokenId] = mass > 0.0 ? static_cast<double>(id) : -1.0;
  statistics[kMoment] = moment;
}

// `part(i)`: statistics of part i. The sum is taken in the order of the parts; ties go to the
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
    // Without a finite maximum the sums are 0 or NaN.
    const double below = one[kMaximum] > -INFINITY ? one[kMaximum] - max : 0.0;
    const double factor = exp2(below * kLog2eWide);
    mass += one[kMass] * factor;
    moment += (one[kMoment] + below * one[kMass]) * factor;
  }
  store_statistics(merged, max, mass, static_cast<int64_t>(id), moment);
}

// In nats, of a row's mass = sum of exp(u) and moment = sum of u * exp(u), u = z - max; NaN without
// a prediction. Neither summand is negative: nothing cancels, so that a small entropy is as exact
// as a large one. Less than kLeastEntropy is what the log of a double and kTermFloor leave.
constexpr double kLeastEntropy = 1e-15;

R2D_HOST_DEVICE double entropy_of(double mass, double moment) {
  if (!(mass > 0.0)) return NAN;
  const double entropy = log(mass) - moment / mass;
  return entropy < kLeastEntropy ? 0.0 : entropy;
}

R2D_HOST_DEVICE double entropy_of(const double* statistics) {
  return entropy_of(statistics[kMass], statistics[kMoment]);
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

// SPDX-License-Identifier: Apache-2.0
// The loss of one row of logits z with a target: -log p(target), the entropy of softmax(z / T), and
// the derivative of both by every logit.
#pragma once

#include "confidence.h"

namespace r2dllm {

constexpr double kLn2 = 0.69314718055994531;

// Sums of 2^u and of u * 2^u over the logits of a slice or a row, where u = (z - max) * scale with
// the maximum of that slice or row and scale = log2(e) / temperature.
struct TemperedSums {
  double mass;
  double moment;
};

R2D_HOST_DEVICE double tempered_scale(double temperature) { return kLog2eWide / temperature; }

// Beyond these, scale * float32 leaves float32 arithmetic: 2^-115 would lie past -FLT_MAX below the
// maximum, or a difference of normal logits be infinite.
R2D_HOST_DEVICE bool is_narrow_scale(double scale) { return scale >= 1e-36 && scale <= 1e30; }

// One more term of 2^u; -inf adds nothing.
R2D_HOST_DEVICE void add_tempered(TemperedSums& sums, double u) {
  if (!(u > -2000.0)) return;
  sums.mass += exp2(u);
  sums.moment += u * exp2(u);
}

// The sums of a slice seen from the maximum of its row; `shift` = their difference * scale, <= 0.
// Add up what comes out in slice order.
R2D_HOST_DEVICE TemperedSums rebased(const TemperedSums& slice, double shift) {
  if (!(shift > -2000.0)) return {0.0, 0.0};
  const double factor = exp2(shift);
  return {slice.mass * factor, (slice.moment + shift * slice.mass) * factor};
}

// `mass` = sum of exp(z - max). The exponent is that of the maximum itself, no integer near it: for
// what follows that is all the same.
R2D_HOST_DEVICE OnlineSoftmax stats_of(double max, double mass) {
  return {max, max * kLog2eWide, mass};
}

R2D_HOST_DEVICE double entropy(const TemperedSums& row) {
  return log(row.mass) - kLn2 * (row.moment / row.mass);
}

// -log p(target). `target` are the statistics of its logit alone, by the arithmetic of the row: a
// target with all the probability has a loss of exactly 0.
R2D_HOST_DEVICE double negative_log_likelihood(const OnlineSoftmax& target,
                                               const OnlineSoftmax& row) {
  if (!is_valid(row)) return NAN;
  if (!(target.max > -INFINITY)) return INFINITY;
  return log(row.sum / target.sum) + (row.exponent - target.exponent) * kLn2;
}

// What a row keeps for its gradient.
struct RowState {
  double max, exponent, sum;  // OnlineSoftmax; a sum of NaN makes the whole gradient NaN
  double nll;
  double mass, moment;  // TemperedSums; unused where no entropy is asked for
};
constexpr int64_t kRowStateSize = sizeof(RowState) / sizeof(double);

// Gradient of one row: at column k
//   softmax * 2^(z * log2(e) - exponent) + entropy * 2^u * (u - mean),   u = (z - max) * scale,
// because d nll / dz = p and d H / dz = -q * (log q + H) / T, where log q + H = ln 2 * (u - mean).
// The target's column has d_nll * (p - 1) in place of the first term.
struct RowGradient {
  double max, exponent, softmax;
  double scale, entropy, mean;  // entropy 0: the second term is left out
};

R2D_HOST_DEVICE RowGradient row_gradient(const RowState& row, double d_nll, double d_entropy,
                                         double scale) {
  RowGradient gradient{row.max, row.exponent, d_nll / row.sum, scale, 0.0, 0.0};
  if (d_entropy != 0.0) {
    gradient.entropy = -d_entropy * scale * kLn2 * kLn2 / row.mass;
    gradient.mean = row.moment / row.mass;
  }
  return gradient;
}

// A row without a softmax, or a loss of NaN: every column is NaN.
R2D_HOST_DEVICE bool is_nan(const RowGradient& gradient) {
  return gradient.softmax != gradient.softmax || gradient.entropy != gradient.entropy;
}

R2D_HOST_DEVICE double entropy_gradient(const RowGradient& row, double logit) {
  const double u = (logit - row.max) * row.scale;
  if (row.entropy == 0.0 || !(u > -2000.0)) return 0.0;
  return row.entropy * exp2(u) * (u - row.mean);
}

// Any column but the target's, in double.
R2D_HOST_DEVICE double logit_gradient(const RowGradient& row, double logit) {
  return row.softmax * wide_term(logit, row.exponent) + entropy_gradient(row, logit);
}

// p - 1 from log p: the difference of two floats would have no correct digit where p is near 1.
R2D_HOST_DEVICE double target_gradient(const RowGradient& row, double logit, double d_nll,
                                       double nll) {
  return d_nll * expm1(-nll) + entropy_gradient(row, logit);
}

}  // namespace r2dllm

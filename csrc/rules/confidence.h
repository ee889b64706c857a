// SPDX-License-Identifier: Apache-2.0
// Softmax statistics of a row of logits, computed slice by slice and merged in slice order.
//
// Everything is in base 2: the sum of a slice is sum over z of 2^(z * log2(e) - exponent), with
// an integer `exponent` near its greatest term, so merging two slices scales by powers of two and
// rounds nothing. The width of a slice depends on V alone; a row therefore has the same bits alone,
// in any batch and on any number of threads.
#pragma once

#include <cmath>

#include "host_device.h"

namespace r2dllm {

constexpr float kLog2e = 1.44269502f;
constexpr double kLog2eWide = 1.4426950408889634;

// Columns of one slice: a slice of float32 fits in a 32 KiB L1 cache twice, and a single row of
// 126,464 columns still gives 31 tasks.
constexpr int64_t kSliceWidth = 4096;

// Logits beyond this (in units of log2) leave float32 arithmetic, see `wide_term`: up to it,
// `log2e_factor` is as good as float64.
constexpr float kNarrowExponent = 32768.0f;

R2D_HOST_DEVICE bool is_narrow(float max) {
  return max <= kNarrowExponent / kLog2e && max >= -kNarrowExponent / kLog2e;
}

// e^x / 2^(x * kLog2e) for narrow x: what the last bits of log2(e) make of the greatest term of a
// sum. For the others, some nats below it, that leaves a small part of the last place.
R2D_HOST_DEVICE double log2e_factor(double x) {
  constexpr double kLow = (kLog2eWide - kLog2e) * 0.69314718055994531;
  const double y = x * kLow;
  return 1.0 + y * (1.0 + 0.5 * y);
}

// Terms smaller than 2^-115 of the greatest one are counted as 2^-115: far below the last bit of
// any sum, and it keeps -inf and the exponent arithmetic out of trouble.
constexpr float kTermFloor = 80.0f;  // in nats

struct OnlineSoftmax {
  double max;       // greatest logit; -inf if there is none, NaN if the slice holds only NaN
  double exponent;  // integer; 0 if max is not finite
  double sum;       // NaN if any logit is NaN

  static R2D_HOST_DEVICE OnlineSoftmax empty() { return {-INFINITY, 0.0, 0.0}; }
};

// The product is rounded on its own (no fma): then a logit beyond 2^53 minus its own exponent is 0.
R2D_HOST_DEVICE double wide_term(double logit, double exponent) {
  const double product = logit * kLog2eWide;
  return exp2(product - exponent);
}

// term * (logit - max): -inf has a term of 0, and so a product of 0.
R2D_HOST_DEVICE double wide_product(double term, double logit, double max) {
  return term > 0.0 ? term * (logit - max) : 0.0;
}

R2D_HOST_DEVICE double scale_by_exponent(double sum, double exponent_difference) {
  return exponent_difference < -2000.0 ? 0.0 : ldexp(sum, static_cast<int>(exponent_difference));
}

// Not commutative in the last bit of `sum`: always merge in slice order.
R2D_HOST_DEVICE OnlineSoftmax merge(const OnlineSoftmax& a, const OnlineSoftmax& b) {
  const double max = a.max > b.max ? a.max : b.max;
  if (a.sum != a.sum || b.sum != b.sum) return {max, 0.0, NAN};
  if (!(b.max > -INFINITY)) return a;
  if (!(a.max > -INFINITY)) return b;
  const double exponent = a.exponent > b.exponent ? a.exponent : b.exponent;
  return {max, exponent,
          scale_by_exponent(a.sum, a.exponent - exponent) +
              scale_by_exponent(b.sum, b.exponent - exponent)};
}

// A row has a prediction unless its maximum is NaN or +inf or all of it is -inf.
R2D_HOST_DEVICE bool is_valid(const OnlineSoftmax& row) {
  return row.sum == row.sum && row.max > -INFINITY && row.max < INFINITY;
}

// Probability of a token: `token` are the statistics of its logit alone, by the same arithmetic,
// so that n tied tokens have probability 1 / n exactly.
R2D_HOST_DEVICE float probability(const OnlineSoftmax& token, const OnlineSoftmax& row) {
  return static_cast<float>(scale_by_exponent(token.sum, token.exponent - row.exponent) / row.sum);
}

enum class Rounding : int32_t { kNone, kBFloat16, kHalf };

// Nearest value of the 16-bit format, ties to even; `value` is a probability (finite, in [0, 1]).
R2D_HOST_DEVICE float round_to(float value, Rounding rounding) {
  if (rounding == Rounding::kNone || !(value > 0.0f)) return value;
  // A float has 23 mantissa bits; bfloat16 keeps 7 of them, half 10 (fewer below 2^-14).
  int exponent;
  frexpf(value, &exponent);
  int ulp = exponent - (rounding == Rounding::kBFloat16 ? 8 : 11);
  const int smallest = rounding == Rounding::kBFloat16 ? -133 : -24;
  if (ulp < smallest) ulp = smallest;
  return static_cast<float>(ldexp(rint(ldexp(static_cast<double>(value), -ulp)), ulp));
}

}  // namespace r2dllm

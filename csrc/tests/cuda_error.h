// SPDX-License-Identifier: Apache-2.0
// A softmax in long double, and how far off the card's kernels may be, in places of 2^-24.
//
//   exp2                             4: its 2 last places
//   its exponent, a nat of it        3: the difference to the maximum, the scale and their product;
//                                    2.25 at temperature 1, where the scale is off by 0.224 of one
//   a sum of a vector's 4 or 8       3, as a tree; the greatest term and its neighbours go to
//                                    double, so that only the rest of the mass, 1 - p, has it
//   a product term * exponent        1, and as one of a chain of 8 all of its sums' roundings
//
// In double there are 8 vectors, the 8 of the greatest, 2 + 5 steps to a block's sum, and 5 of the
// slices, each at most the mass.
#pragma once

#include <cmath>

#include "cuda_logits.h"

namespace r2dllm::test {

constexpr long double kPlace = 0x1p-24L, kTermError = 4, kSumError = 3, kChainError = 8,
                      kDoubleError = 28 * 0x1p-53L;

struct ExactSoftmax {
  long double max = -INFINITY, log_mass = NAN, entropy = NAN;
  int64_t prediction = -1;  // of an invalid row, of which the rest is NaN
  // Relative errors of the mass, absolute ones of its logarithm as well; absolute ones of the mean
  // of the terms' exponents in nats (the entropy is the sum of both).
  long double mean = NAN, exponent_error, mass_error = NAN, mean_error = NAN;

  template <class Format>
  ExactSoftmax(const Logits<Format>& logits, int64_t cell, double temperature = 1.0)
      : exponent_error(temperature == 1.0 ? 2.25L : 3.0L) {
    bool valid = true;
    for (int64_t i = 0; i < logits.vocab; ++i) {
      const double z = logits.get(cell, i);
      valid = valid && z < INFINITY;
      if (!(z > max)) continue;
      max = z;
      prediction = i;
    }
    if (!valid) prediction = -1;
    if (prediction < 0) return;
    long double mass = 0, first = 0, second = 0;
    for (int64_t i = 0; i < logits.vocab; ++i) {
      const long double below = (max - logits.get(cell, i)) / temperature, term = std::exp(-below);
      if (!(term > 0)) continue;
      mass += term;
      first += below * term;
      second += below * below * term;
    }
    log_mass = std::log(mass);
    mean = first / mass;
    entropy = log_mass + mean;
    mass_error =
        ((1 - 1 / mass) * (kTermError + kSumError) + mean * exponent_error) * kPlace + kDoubleError;
    mean_error =
        (mean * (kTermError + exponent_error + 1 + kChainError) + second / mass * exponent_error) *
            kPlace +
        mean * mass_error;
  }
  long double p() const { return std::exp(-log_mass); }  // of the prediction
  long double entropy_error() const { return mass_error + mean_error; }
  // Relative, of a term that lies so many nats below the greatest.
  long double term_error(long double below) const {
    return (kTermError + exponent_error * below) * kPlace;
  }
};

}  // namespace r2dllm::test

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>

#include "confidence.h"

namespace r2dllm {

struct SamplingOptions {
  double temperature;  // 0: argmax
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
  double min_p;        // 0: all

  R2D_HOST_DEVICE bool draws() const { return temperature > 0.0; }
  R2D_HOST_DEVICE bool restricts() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
};

// log2(e) / temperature; a temperature near 0 is the argmax, and the scale stays within float32.
R2D_HOST_DEVICE double drawing_scale(double temperature) {
  const double scale = kLog2eWide / temperature;
  return scale < 1e30 ? scale : 1e30;
}

// The least logit that min-p keeps.
R2D_HOST_DEVICE double min_p_cutoff(double max, const SamplingOptions& options) {
  return options.min_p > 0.0 ? max + log(options.min_p) * options.temperature : -INFINITY;
}

// Bits that order like the logit: a larger logit has a larger key. -0 and +0 share one.
R2D_HOST_DEVICE uint64_t logit_key(double logit) {
  const double positive_zero = logit + 0.0;
  uint64_t bits;
  memcpy(&bits, &positive_zero, sizeof bits);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

R2D_HOST_DEVICE double logit_of_key(uint64_t key) {
  const uint64_t bits = key >> 63 ? key & ~(uint64_t{1} << 63) : ~key;
  double logit;
  memcpy(&logit, &bits, sizeof logit);
  return logit;
}

}  // namespace r2dllm

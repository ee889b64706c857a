// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "host_device.h"

namespace r2dllm {

struct SamplingOptions {
  double temperature;  // 0: argmax
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
  double min_p;        // 0: all
};

// Is any logit left out of the draw?
R2D_HOST_DEVICE bool restricts(const SamplingOptions& options) {
  return options.top_k > 0 || options.top_p < 1.0 || options.min_p > 0.0;
}

// The least logit whose tempered probability is min_p of the greatest one's; min_p > 0.
R2D_HOST_DEVICE double min_p_cutoff(double max, const SamplingOptions& options) {
  return max + log(options.min_p) * options.temperature;
}

// The least float32 that is not below x, and no infinity below x: z >= x and z >= least_float(x)
// are the same for every finite float32 z.
R2D_HOST_DEVICE float least_float(double x) {
  if (!(x > -static_cast<double>(FLT_MAX))) return -FLT_MAX;
  const auto nearest = static_cast<float>(x);
  return static_cast<double>(nearest) < x ? nextafterf(nearest, INFINITY) : nearest;
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

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>

#include "host_device.h"

namespace r2dllm {

struct SamplingOptions {
  double temperature;  // 0: argmax
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
  double min_p;        // 0: all

  R2D_HOST_DEVICE bool draws() const { return temperature > 0.0; }
  R2D_HOST_DEVICE bool restricts() const { return top_k > 0 || top_p < 1.0 || min_p > 0.0; }
};

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

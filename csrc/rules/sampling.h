// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>

#include "host_device.h"

namespace r2dllm {

struct SamplingOptions {
  double temperature;  // 0: argmax
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
};

// Bits that order like the float: a larger logit has a larger key. -0 and +0 share one.
R2D_HOST_DEVICE uint32_t logit_key(float logit) {
  const float positive_zero = logit + 0.0f;
  uint32_t bits;
  memcpy(&bits, &positive_zero, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

R2D_HOST_DEVICE float logit_of_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
  float logit;
  memcpy(&logit, &bits, sizeof logit);
  return logit;
}

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC'11). A number depends on the seed
// and on what it is drawn for, never on threads or devices.
#pragma once

#include "host_device.h"

namespace r2dllm {

enum class Draw : uint32_t { kToken = 0, kRun = 1 };

// Uniform in [0, 1) with 53 random bits for (seed; row, step, position, purpose).
R2D_HOST_DEVICE double uniform(uint64_t seed, int64_t row, int64_t step, int64_t position,
                               Draw purpose) {
  uint32_t c0 = static_cast<uint32_t>(row), c1 = static_cast<uint32_t>(step),
           c2 = static_cast<uint32_t>(position), c3 = static_cast<uint32_t>(purpose);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t next0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t next2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = (static_cast<uint64_t>(c0) << 32) | c1;
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

}  // namespace r2dllm

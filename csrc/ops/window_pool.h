// SPDX-License-Identifier: Apache-2.0
// window_pool: masked cells that lie in a confident window.
#pragma once

#include <cstdint>

namespace r2dllm {

struct WindowPoolParams {
  int64_t batch, length;
  const float* confidence;  // [B, L]
  const bool* is_masked;    // [B, L]
  int64_t window;
  float min_confidence;
  int64_t max_unmasked;  // -1: no limit
  bool* marked;          // [B, L], out
};

namespace cpu {
void window_pool(const WindowPoolParams& params);
}
namespace cuda {
void window_pool(const WindowPoolParams& params);
}

}  // namespace r2dllm

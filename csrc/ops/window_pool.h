// SPDX-License-Identifier: Apache-2.0
// window_pool: masked cells that lie in a confident window.
#pragma once

#include "../rules/window_pool.h"

namespace r2dllm {

struct WindowPoolParams {
  int64_t batch, length;
  const float* confidence;  // [B, L]
  const bool* is_masked;    // [B, L]
  WindowOptions options;
  bool* marked;  // [B, L], out
};

// Row b. `ctx`: see rules/decode_step.h. `passes`: scratch, L flags.
template <class Context>
R2D_HOST_DEVICE void pool_row(Context& ctx, const WindowPoolParams& params, int64_t b,
                              uint8_t* passes) {
  const int64_t first = b * params.length;
  bool* const marked = params.marked + first;
  ctx.for_each(params.length, [&](int64_t i) { marked[i] = false; });
  pool_windows(ctx, params.length, params.options, params.is_masked + first,
               params.confidence + first, passes, [&](int64_t i) { marked[i] = true; });
}

namespace cpu {
void window_pool(const WindowPoolParams& params);
}
namespace cuda {
void window_pool(const WindowPoolParams& params);
}

}  // namespace r2dllm

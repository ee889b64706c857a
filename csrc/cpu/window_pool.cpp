// SPDX-License-Identifier: Apache-2.0
#include "../ops/window_pool.h"

#include <memory>

#include "row_context.h"

namespace r2dllm::cpu {

void window_pool(const WindowPoolParams& params) {
  RowContext context;
  const std::unique_ptr<uint8_t[]> passes(new uint8_t[params.length]);
  for (int64_t b = 0; b < params.batch; ++b) pool_row(context, params, b, passes.get());
}

}  // namespace r2dllm::cpu

// SPDX-License-Identifier: Apache-2.0
#include "../ops/window_pool.h"

#include <algorithm>
#include <memory>

#include "../rules/window_pool.h"

namespace r2dllm::cpu {

void window_pool(const WindowPoolParams& params) {
  const int64_t length = params.length, window = params.window;
  std::fill_n(params.marked, params.batch * length, false);
  if (window > length) return;
  const std::unique_ptr<bool[]> passes(new bool[length]);
  for (int64_t b = 0; b < params.batch; ++b) {
    const float* confidence = params.confidence + b * length;
    const bool* is_masked = params.is_masked + b * length;
    for (int64_t start = 0; start + window <= length; ++start) {
      passes[start] = window_passes(
          start, window, params.max_unmasked, params.min_confidence, Rounding::kNone,
          [&](int64_t i) { return is_masked[i]; }, [&](int64_t i) { return confidence[i]; });
    }
    for (int64_t i = 0; i < length; ++i) {
      params.marked[b * length + i] =
          is_masked[i] &&
          in_passing_window(i, length, window, [&](int64_t start) { return passes[start]; });
    }
  }
}

}  // namespace r2dllm::cpu

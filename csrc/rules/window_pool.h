// SPDX-License-Identifier: Apache-2.0
// Windowed confidence pooling: neighbours that are confident together (paper: gamma_ave).
#pragma once

#include "confidence.h"

namespace r2dllm {

struct WindowOptions {
  int64_t window;        // cells of one; 0: off
  int64_t max_unmasked;  // -1: no limit
  float min_confidence;  // of the mean
  Rounding rounding;     // of the mean
};

// Does the window [start, start + window) commit its masked cells? Every window is judged on the
// same snapshot. One non-finite masked confidence disqualifies the window, as in the release.
R2D_HOST_DEVICE bool window_passes(int64_t start, const WindowOptions& options, const bool* masked,
                                   const float* confidence) {
  double sum = 0.0;
  int64_t count = 0;
  for (int64_t i = start; i < start + options.window; ++i) {
    if (masked[i]) {
      sum += static_cast<double>(confidence[i]);
      ++count;
    }
  }
  const int64_t unmasked = options.window - count;
  if (count == 0 || (options.max_unmasked >= 0 && unmasked > options.max_unmasked)) return false;
  const double mean = sum / static_cast<double>(count);
  if (!(mean - mean == 0.0)) return false;
  const double judged =
      options.rounding == Rounding::kNone
          ? mean
          : static_cast<double>(round_to(static_cast<float>(mean), options.rounding));
  return judged >= static_cast<double>(options.min_confidence);
}

// Is cell i inside a window that passes? `passes[start]` is the verdict of one window.
R2D_HOST_DEVICE bool in_passing_window(int64_t i, int64_t length, int64_t window,
                                       const uint8_t* passes) {
  const int64_t first = i - window + 1 > 0 ? i - window + 1 : 0;
  const int64_t last = i < length - window ? i : length - window;
  for (int64_t start = first; start <= last; ++start) {
    if (passes[start]) return true;
  }
  return false;
}

// f(i) for every masked cell of a window that passes. `ctx`: see rules/decode_step.h. `masked` may
// change at i, and only there, while f(i) runs. `passes`: scratch, `length` flags.
template <class Context, class F>
R2D_HOST_DEVICE void pool_windows(Context& ctx, int64_t length, const WindowOptions& options,
                                  const bool* masked, const float* confidence, uint8_t* passes,
                                  F f) {
  if (options.window > length) return;
  ctx.for_each(length - options.window + 1, [&](int64_t start) {
    passes[start] = window_passes(start, options, masked, confidence);
  });
  ctx.for_each(length, [&](int64_t i) {
    if (masked[i] && in_passing_window(i, length, options.window, passes)) f(i);
  });
}

}  // namespace r2dllm

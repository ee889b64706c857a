// SPDX-License-Identifier: Apache-2.0
// Windowed confidence pooling: neighbours that are confident together (paper: gamma_ave).
#pragma once

#include "confidence.h"

namespace r2dllm {

// Does the window [start, start + window) commit its masked cells? Every window is judged on the
// same snapshot. One non-finite masked confidence disqualifies the window, as in the release.
template <class Masked, class Confidence>
R2D_HOST_DEVICE bool window_passes(int64_t start, int64_t window, int64_t max_unmasked,
                                   float min_confidence, Rounding rounding, Masked masked,
                                   Confidence confidence) {
  double sum = 0.0;
  int64_t count = 0;
  for (int64_t i = start; i < start + window; ++i) {
    if (masked(i)) {
      sum += static_cast<double>(confidence(i));
      ++count;
    }
  }
  if (count == 0 || (max_unmasked >= 0 && window - count > max_unmasked)) return false;
  const double mean = sum / static_cast<double>(count);
  if (!(mean - mean == 0.0)) return false;
  const double judged = rounding == Rounding::kNone
                            ? mean
                            : static_cast<double>(round_to(static_cast<float>(mean), rounding));
  return judged >= static_cast<double>(min_confidence);
}

// Is cell i inside a window that passes? `passes(start)` is the verdict of one window.
template <class Passes>
R2D_HOST_DEVICE bool in_passing_window(int64_t i, int64_t length, int64_t window, Passes passes) {
  const int64_t first = i - window + 1 > 0 ? i - window + 1 : 0;
  const int64_t last = i < length - window ? i : length - window;
  for (int64_t start = first; start <= last; ++start) {
    if (passes(start)) return true;
  }
  return false;
}

}  // namespace r2dllm

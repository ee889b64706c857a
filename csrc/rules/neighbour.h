// SPDX-License-Identifier: Apache-2.0
// Relaxed thresholds beside anchors (LocalLeap, arXiv 2510.07081): what stands next to a cell that
// is sure needs less confidence itself.
#pragma once

#include "base_rule.h"

namespace r2dllm {

struct NeighbourOptions {
  int64_t radius;  // 0: off
  float threshold;
};

// Is there an anchor other than `cell` at most `radius` cells away?
template <class IsAnchor>
R2D_HOST_DEVICE bool beside_anchor(int64_t cell, int64_t length, int64_t radius,
                                   IsAnchor is_anchor) {
  const int64_t first = cell > radius ? cell - radius : 0;
  const int64_t last = length - 1 - cell > radius ? cell + radius : length - 1;
  for (int64_t j = first; j <= last; ++j) {
    if (j != cell && is_anchor(j)) return true;
  }
  return false;
}

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// A row from its slices, by one warp. Always in the same order: no atomics, no dependence on the
// launch.
#pragma once

#include "../rules/row_stats.h"
#include "../rules/vocab_statistics.h"
#include "vocab_row.h"

namespace r2dllm::cuda {

// 2^((a - b) * scale) for a <= b < inf, a > -inf or b > -inf.
R2D_DEVICE double weight(float a, float b, double scale) {
  return ::exp2((static_cast<double>(a) - static_cast<double>(b)) * scale);
}

// Every lane gets the row's mass, maximum and argmax. Without a prediction the mass is 0 or NaN.
template <class Lane>
R2D_DEVICE SlicePartial merge_slices(Lane& lane, const SlicePartial* partial, int64_t slices) {
  float my_max = -INFINITY;
  int32_t my_argmax = INT32_MAX;
  for (int64_t i = place_in_warp(lane); i < slices; i += kWarp) {
    const float max = partial[i].max;
    if (max > my_max) {
      my_max = max;
      my_argmax = partial[i].argmax;
    }
  }
  const float max = warp_max(lane, my_max);
  const int32_t argmax = -lane.max(-(my_max == max ? my_argmax : INT32_MAX));
  double mass = 0.0;
  for (int64_t i = place_in_warp(lane); i < slices; i += kWarp) {
    mass += partial[i].mass * (max > -INFINITY ? weight(partial[i].max, max, kLog2eWide) : 1.0);
  }
  return {warp_sum(lane, mass), max, argmax};
}

// The Statistic kMoment of a cell, in nats, for every lane; `merged`: of merge_slices. Without a
// prediction it is 0 or NaN, as the mass.
template <class Lane>
R2D_DEVICE double merge_moment(Lane& lane, const VocabWorkspace& workspace, int64_t cell,
                               const SlicePartial& merged) {
  const SlicePartial* partial = workspace.partial + cell * workspace.slices;
  const double* moment = workspace.moment + cell * workspace.slices;
  double sum = 0.0;
  for (int64_t i = place_in_warp(lane); i < workspace.slices; i += kWarp) {
    const double below = static_cast<double>(partial[i].max) - static_cast<double>(merged.max);
    sum += rebased({partial[i].mass, moment[i]}, below * kLog2eWide).moment;
  }
  sum = warp_sum(lane, sum);
  return merged.mass > 0.0 ? kLn2 * sum : merged.mass;
}

}  // namespace r2dllm::cuda

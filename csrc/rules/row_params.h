// SPDX-License-Identifier: Apache-2.0
// Options that each row may have of its own, in memory that the step reads: a captured graph takes
// the values of its replay.
#pragma once

#include "decode_step.h"
#include "row_values.h"
#include "sampling.h"

namespace r2dllm {

// An array [B] each, or null: the value of the config.
struct RowParams {
  RowValues threshold;
  RowIntegers quota;
  RowValues error_budget, entropy_budget;
  RowValues spatial_threshold, temporal_threshold, edit_threshold;
  RowValues temperature;
  RowIntegers top_k;
  RowValues top_p, min_p;
  RowIntegers seed;
};

// Each of these replaces `value` by that of row b, if there is one; false: it is out of range.
R2D_HOST_DEVICE bool take_probability(const RowValues& values, int64_t b, float& value) {
  if (!values) return true;
  const double given = values.get(b);
  value = static_cast<float>(given);
  return given >= 0.0 && given <= 1.0;
}

R2D_HOST_DEVICE bool take_probability(const RowValues& values, int64_t b, double& value) {
  if (!values) return true;
  value = values.get(b);
  return value >= 0.0 && value <= 1.0;
}

R2D_HOST_DEVICE bool take_finite(const RowValues& values, int64_t b, double& value) {
  if (!values) return true;
  value = values.get(b);
  return value >= 0.0 && value - value == 0.0;
}

R2D_HOST_DEVICE bool take_count(const RowIntegers& values, int64_t b, int64_t& value) {
  if (!values) return true;
  value = values.get(b);
  return value >= 0;
}

R2D_HOST_DEVICE uint64_t seed_of_row(const RowParams& rows, int64_t b, uint64_t seed) {
  return rows.seed ? static_cast<uint64_t>(rows.seed.get(b)) : seed;
}

// Every value is looked at: no short cut, so that threads of a warp stay together.
R2D_HOST_DEVICE bool take_sampling(const RowParams& rows, int64_t b, SamplingOptions& options) {
  bool valid = take_finite(rows.temperature, b, options.temperature);
  valid &= take_count(rows.top_k, b, options.top_k);
  valid &= take_probability(rows.top_p, b, options.top_p);
  valid &= take_probability(rows.min_p, b, options.min_p);
  return valid;
}

R2D_HOST_DEVICE bool take_options(const RowParams& rows, int64_t b, StepOptions& options) {
  bool valid = take_probability(rows.threshold, b, options.base.threshold);
  valid &= take_count(rows.quota, b, options.base.quota);
  valid &= take_finite(rows.error_budget, b, options.base.error_budget);
  valid &= take_finite(rows.entropy_budget, b, options.base.entropy_budget);
  valid &= take_probability(rows.spatial_threshold, b, options.window.min_confidence);
  options.run.min_confidence = options.window.min_confidence;
  valid &= take_probability(rows.temporal_threshold, b, options.stability.min_confidence);
  valid &= take_probability(rows.edit_threshold, b, options.edit_threshold);
  options.seed = seed_of_row(rows, b, options.seed);
  SamplingOptions sampling{.temperature = 0.0, .top_k = 0, .top_p = 1.0, .min_p = 0.0};
  valid &= take_sampling(rows, b, sampling);
  return valid;
}

R2D_HOST_DEVICE bool in_range(const RowParams& rows, int64_t b) {
  StepOptions taken{};
  return take_options(rows, b, taken);
}

}  // namespace r2dllm

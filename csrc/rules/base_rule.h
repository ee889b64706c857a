// SPDX-License-Identifier: Apache-2.0
// The base rule: which cells of a row are committed from their confidence (or entropy) alone.
#pragma once

#include <cstring>

#include "host_device.h"

namespace r2dllm {

enum class BaseRule : int32_t { kThreshold, kSchedule, kFactor, kFirst, kBudget, kEntropy, kCount };

enum class Compare : int32_t { kAtLeast, kAbove, kCount };

R2D_HOST_DEVICE bool passes(float confidence, float threshold, Compare compare) {
  return compare == Compare::kAbove ? confidence > threshold : confidence >= threshold;
}

constexpr float kNoThreshold = 2.0f;  // which no probability passes

struct BaseOptions {
  BaseRule rule;
  float threshold;  // or kNoThreshold
  int64_t quota;
  double factor;
  double error_budget;
  double entropy_budget;
  bool last_free;
  int64_t steps_per_block;  // 0: one token a step
};

// Orders cells by falling confidence, ties by lowest index; 0 = no cell. Confidence is in [0, 1].
R2D_HOST_DEVICE uint64_t cell_key(float confidence, int64_t cell) {
  uint32_t bits;
  memcpy(&bits, &confidence, sizeof bits);
  return (static_cast<uint64_t>(bits) << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(cell));
}

// The same by rising entropy, which is finite and not negative.
R2D_HOST_DEVICE uint64_t entropy_key(float entropy, int64_t cell) {
  uint32_t bits;
  memcpy(&bits, &entropy, sizeof bits);
  return (static_cast<uint64_t>(~bits) << 32) | (0xFFFFFFFFu - static_cast<uint32_t>(cell));
}

R2D_HOST_DEVICE int64_t cell_of(uint64_t key) {
  return key == 0 ? -1 : static_cast<int64_t>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}

// Cells that step `step` < `steps` commits in a block that began with `masked` masked cells: an
// equal share each, the remainder to the first steps.
R2D_HOST_DEVICE int64_t schedule_quota(int64_t masked, int64_t step, int64_t steps) {
  return masked / steps + (step < masked % steps ? 1 : 0);
}

// Length of the prefix of `count` >= 1 cells in falling confidence that the factor rule commits.
// `confidence(j)` is the j-th best, j from 0; it always passes.
template <class Confidence>
R2D_HOST_DEVICE int64_t factor_prefix(int64_t count, double factor, Confidence confidence) {
  int64_t length = 1;
  while (length < count && confidence(length) >= 1.0 - factor / static_cast<double>(length + 2)) {
    ++length;
  }
  // The release commits the last cell along with all others even if it alone fails.
  return length == count - 1 ? count : length;
}

// Length of the longest prefix whose summed cost stays within the budget; with `last_free` its last
// cell does not count. `cost(j)` >= 0 of the j-th cell.
template <class Cost>
R2D_HOST_DEVICE int64_t budget_prefix(int64_t count, double budget, bool last_free, Cost cost) {
  double before = 0.0;  // of the cells in the prefix
  int64_t length = 0;
  while (length < count) {
    const double with = before + cost(length);
    if (!((last_free ? before : with) <= budget)) break;
    before = with;
    ++length;
  }
  return length;
}

// A row as the base rule sees it.
struct BaseCells {
  int64_t length;
  const float* confidence;
  const float* entropy;  // kEntropy alone reads it
  // kSchedule alone reads them:
  int64_t block_step;    // steps of the block before this one
  int64_t block_masked;  // candidates when it began
};

// Of cell i, which is eligible: the base rule ranks cells by falling key and leaves out those of 0.
R2D_HOST_DEVICE uint64_t base_key(const BaseCells& cells, int64_t i, BaseRule rule) {
  if (rule == BaseRule::kFirst) return cell_key(0.0f, i);
  if (rule != BaseRule::kEntropy) return cell_key(cells.confidence[i], i);
  return cells.entropy[i] == cells.entropy[i] ? entropy_key(cells.entropy[i], i) : 0;
}

// How many of the `count` >= 1 cells in `order` the base rule commits by itself. `passes(p)`: does
// a confidence pass the threshold?
template <class Passes>
R2D_HOST_DEVICE int64_t base_prefix(const BaseCells& cells, const int32_t* order, int64_t count,
                                    const BaseOptions& options, Passes passes) {
  const auto confidence = [&](int64_t rank) {
    return static_cast<double>(cells.confidence[order[rank]]);
  };
  switch (options.rule) {
    case BaseRule::kThreshold: {
      int64_t passing = 0;
      while (passing < count && passes(cells.confidence[order[passing]])) ++passing;
      return passing;
    }
    case BaseRule::kSchedule: {
      const int64_t steps = options.steps_per_block > 0 ? options.steps_per_block : cells.length;
      return cells.block_step < steps ? schedule_quota(cells.block_masked, cells.block_step, steps)
                                      : count;
    }
    case BaseRule::kFactor:
      return factor_prefix(count, options.factor, confidence);
    case BaseRule::kBudget:
      return budget_prefix(count, options.error_budget, options.last_free,
                           [&](int64_t rank) { return 1.0 - confidence(rank); });
    case BaseRule::kEntropy:
      return budget_prefix(count, options.entropy_budget, options.last_free, [&](int64_t rank) {
        return static_cast<double>(cells.entropy[order[rank]]);
      });
    default:
      return options.quota;  // kFirst
  }
}

}  // namespace r2dllm

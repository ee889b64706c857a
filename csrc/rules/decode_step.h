// SPDX-License-Identifier: Apache-2.0
// One decode step of one batch row after the pass over V: the order of the rules and what each one
// sees. Written against an execution context so that a loop (CPU), a thread block (CUDA) and a
// test's fibres run the same source:
//
//   ctx.for_each(n, f)   f(i) for 0 <= i < n in any order; all done, and visible, on return
//   ctx.count(n, f)      how many i have f(i); every participant gets the answer
//   ctx.max(n, f)        greatest f(i) (uint64), 0 if n = 0; every participant gets the answer
//   ctx.once(f)          f() by one participant; done, and visible, on return
#pragma once

#include "base_rule.h"
#include "confidence.h"
#include "positional_ambiguity.h"
#include "stability.h"
#include "window_pool.h"

namespace r2dllm {

enum class Rule : uint8_t { kNone, kThreshold, kForced, kWindow, kAmbiguity, kStability, kBase };

struct StepOptions {
  int64_t mask_id;
  BaseRule base;
  float threshold;
  double factor;
  double error_budget;
  int64_t steps_per_block;  // 0: one token a step
  WindowOptions window;
  RunOptions run;  // mode kOff: off
  StabilityOptions stability;
  uint64_t seed;
  Rounding rounding;
};

// Columns of DecodeState.counters.
enum Counter : int { kRowId, kStep, kBlockStep, kBlockMasked, kRowSeed, kCounters };

// The random number of a cell in this step. What it depends on beside `seed` lies on the device, so
// that a replayed graph draws fresh numbers.
R2D_HOST_DEVICE double uniform(uint64_t seed, const int64_t* counters, int64_t position,
                               Draw purpose) {
  return uniform(seed + static_cast<uint64_t>(counters[kRowSeed]), counters[kRowId],
                 counters[kStep], position, purpose);
}

// One batch row; every array has `length` cells.
struct StepRow {
  int64_t length;

  // The pass over V. At cells that are no candidates: -1 and 0; without a prediction: -1 and NaN.
  const int64_t* top_id;        // argmax
  const float* top_confidence;  // its probability, not rounded

  // In: the drawn token (the argmax at temperature 0) and its probability, rounded on request.
  // Out: the same, but at cells committed by kAmbiguity or kStability the argmax.
  int64_t* prediction;
  float* confidence;

  uint8_t* rule;       // out
  int32_t* remaining;  // out: candidates that are still masked

  int64_t* tokens;  // null: not written
  int64_t tokens_stride;

  Streaks streaks;
  int64_t* counters;

  bool* masked;       // in: the candidates. Scratch: candidates not committed yet
  uint64_t* keys;     // scratch
  uint8_t* selected;  // scratch
  int32_t* order;     // scratch
};

template <class Context>
class RowStep {
 public:
  R2D_HOST_DEVICE RowStep(Context& ctx, const StepRow& row, const StepOptions& options)
      : ctx_(ctx), row_(row), options_(options) {}

  R2D_HOST_DEVICE void run() {
    const StepRow& row = row_;
    ctx_.for_each(row.length, [&](int64_t i) { row.rule[i] = 0; });
    if (row.counters[kBlockMasked] < 0) {
      const int64_t masked = ctx_.count(row.length, [&](int64_t i) { return row.masked[i]; });
      ctx_.once([&] { row.counters[kBlockMasked] = masked; });
    }
    base_rule();
    if (options_.window.window > 0) window_pool();
    if (options_.run.mode != TokenCluster::kOff) positional_ambiguity();
    if (options_.stability.steps > 0) stability();
    const int64_t remaining = ctx_.count(row.length, [&](int64_t i) { return row.masked[i]; });
    ctx_.once([&] {
      *row.remaining = static_cast<int32_t>(remaining);
      ++row.counters[kStep];
      ++row.counters[kBlockStep];
    });
    if (row.tokens != nullptr) {
      ctx_.for_each(row.length, [&](int64_t i) {
        if (row.rule[i] != 0) row.tokens[i * row.tokens_stride] = row.prediction[i];
      });
    }
  }

 private:
  // A cell without a prediction (NaN) is masked but never eligible.
  R2D_HOST_DEVICE bool eligible(int64_t i) const {
    return row_.masked[i] && row_.confidence[i] == row_.confidence[i];
  }

  // Committing the mask id leaves the cell masked.
  R2D_HOST_DEVICE void commit(int64_t i, Rule rule) {
    if (row_.prediction[i] == options_.mask_id) return;
    row_.masked[i] = false;
    row_.rule[i] = static_cast<uint8_t>(rule);
  }

  // Ambiguity and stability look at the argmax, also where another token was drawn.
  R2D_HOST_DEVICE void commit_top(int64_t i, Rule rule) {
    if (row_.top_id[i] == options_.mask_id) return;
    row_.prediction[i] = row_.top_id[i];
    row_.confidence[i] = round_to(row_.top_confidence[i], options_.rounding);
    commit(i, rule);
  }

  R2D_HOST_DEVICE void base_rule() {
    const StepRow& row = row_;
    ctx_.for_each(row.length, [&](int64_t i) {
      const float rank_by = options_.base == BaseRule::kFirst ? 0.0f : row.confidence[i];
      row.keys[i] = eligible(i) ? cell_key(rank_by, i) : 0;
    });
    if (options_.base == BaseRule::kThreshold || options_.base == BaseRule::kFirst) {
      const int64_t best = cell_of(ctx_.max(row.length, [&](int64_t i) { return row.keys[i]; }));
      const bool by_threshold = options_.base == BaseRule::kThreshold;
      const float threshold = round_to(options_.threshold, options_.rounding);
      ctx_.for_each(row.length, [&](int64_t i) {
        if (by_threshold && eligible(i) && row.confidence[i] >= threshold) {
          commit(i, Rule::kThreshold);
        } else if (i == best) {
          commit(i, by_threshold ? Rule::kForced : Rule::kBase);
        }
      });
      return;
    }
    // The other rules commit a prefix of the cells in falling confidence.
    const int64_t count = ctx_.count(row.length, [&](int64_t i) { return row.keys[i] != 0; });
    if (count == 0) return;
    ctx_.for_each(row.length, [&](int64_t i) {
      if (row.keys[i] == 0) return;
      int32_t rank = 0;
      for (int64_t j = 0; j < row.length; ++j) rank += row.keys[j] > row.keys[i];
      row.order[rank] = static_cast<int32_t>(i);
    });
    const auto confidence = [&](int64_t rank) {
      return static_cast<double>(row.confidence[row.order[rank]]);
    };
    ctx_.once([&] {
      int64_t prefix = 0;
      if (options_.base == BaseRule::kSchedule) {
        const int64_t steps = options_.steps_per_block > 0 ? options_.steps_per_block : row.length;
        const int64_t step = row.counters[kBlockStep];
        prefix = step < steps ? schedule_quota(row.counters[kBlockMasked], step, steps) : count;
      } else if (options_.base == BaseRule::kFactor) {
        prefix = factor_prefix(count, options_.factor, confidence);
      } else {
        prefix = budget_prefix(count, options_.error_budget, confidence);
      }
      for (int64_t rank = 0; rank < count && rank < prefix; ++rank) {
        commit(row.order[rank], Rule::kBase);
      }
      if (prefix == 0) commit(row.order[0], Rule::kForced);
    });
  }

  R2D_HOST_DEVICE void window_pool() {
    pool_windows(ctx_, row_.length, options_.window, row_.masked, row_.confidence, row_.selected,
                 [&](int64_t i) { commit(i, Rule::kWindow); });
  }

  R2D_HOST_DEVICE void positional_ambiguity() {
    const StepRow& row = row_;
    const RunCells cells{.length = row.length,
                         .masked = row.masked,
                         .prediction = row.top_id,
                         .confidence = row.top_confidence};
    ctx_.for_each(row.length, [&](int64_t i) { row.selected[i] = 0; });
    choose_of_runs(
        ctx_, cells, options_.run,
        [&](int64_t start) { return uniform(options_.seed, row.counters, start, Draw::kRun); },
        [&](int64_t i) { row.selected[i] = 1; });
    ctx_.for_each(row.length, [&](int64_t i) {
      if (row.selected[i]) commit_top(i, Rule::kAmbiguity);
    });
  }

  R2D_HOST_DEVICE void stability() {
    const StepRow& row = row_;
    ctx_.for_each(row.length, [&](int64_t i) {
      // A candidate is either masked still or was given a rule in this step.
      const Observation cell{.was_masked = row.masked[i] || row.rule[i] != 0,
                             .is_masked = row.masked[i],
                             .prediction = row.top_id[i],
                             .confidence = row.top_confidence[i]};
      if (advance(row.streaks, i, cell, options_.stability)) commit_top(i, Rule::kStability);
    });
  }

  Context& ctx_;
  const StepRow& row_;
  const StepOptions& options_;
};

}  // namespace r2dllm

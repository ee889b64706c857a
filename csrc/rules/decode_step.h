// SPDX-License-Identifier: Apache-2.0
// One decode step of one batch row after the pass over V: the order of the rules and what each one
// sees. Written against an execution context so that a loop (CPU), a thread block (CUDA) and a
// test's fibres run the same source:
//
//   ctx.for_each(n, f)       f(i) for 0 <= i < n in any order; all done, and visible, on return
//   ctx.count(n, f)          how many i have f(i); every participant gets the answer
//   ctx.max(n, f)            greatest f(i) (uint64), 0 if n = 0; every participant gets the answer
//   ctx.sort(n, keys, order) order[0], order[1], ... = the i with keys[i] != 0, by falling key (no
//                            two are equal); how many there are
//   ctx.once(f)              f() by one participant; done, and visible, on return
#pragma once

#include "base_rule.h"
#include "confidence.h"
#include "neighbour.h"
#include "positional_ambiguity.h"
#include "stability.h"
#include "tokens_view.h"
#include "window_pool.h"

namespace r2dllm {

// What happens where the mask id is the likeliest: it counts as -inf; it is refused, so that the
// cell stays masked; the cell is no candidate in this step.
enum class MaskPrediction : int32_t { kBan, kAllow, kSkip, kCount };

enum class SampledConfidence : int32_t { kUntempered, kTempered, kCount };

// What DecodeConfig says, as the rules read it.
struct StepOptions {
  int64_t mask_id;  // -1: none
  MaskPrediction mask_prediction;
  Compare compare;
  BaseOptions base;
  WindowOptions window;
  NeighbourOptions neighbour;
  RunOptions run;  // mode kOff: off
  StabilityOptions stability;
  float edit_threshold;  // or kNoThreshold
  SampledConfidence sampled_confidence;
  uint64_t seed;
  Rounding rounding;
};

enum class Rule : uint8_t {
  kNone,
  kThreshold,
  kForced,
  kWindow,
  kAmbiguity,
  kStability,
  kBase,
  kNeighbour,
  kEdit
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
  int64_t number;  // of the row in `tokens`
  bool is_valid;   // false: nothing is committed, and the state stays as it is

  // The pass over V. At cells that were not read: -1 and 0; without a prediction: -1 and NaN.
  const int64_t* top_id;        // argmax
  const float* top_confidence;  // its probability, not rounded
  const float* entropy;         // in nats; BaseRule::kEntropy alone reads it

  // In: the token that confidence alone would commit (drawn, proposed or the argmax) and its
  // probability, rounded on request. Out: the same, but at cells committed by kAmbiguity,
  // kStability or kEdit the argmax.
  int64_t* prediction;
  float* confidence;

  uint8_t* rule;       // out
  int32_t* remaining;  // out: candidates that are still masked

  TokensView tokens;

  // The state of the row; null where no rule needs it.
  Streaks streaks;
  int64_t* counters;
  int16_t* step_map;  // null: not wanted

  const bool* editable;  // decided cells that may be edited; null: none
  bool* masked;          // in: the candidates. Scratch: candidates not committed yet
  uint64_t* keys;        // scratch
  uint8_t* selected;     // scratch
  int32_t* order;        // scratch
};

template <class Context>
class RowStep {
 public:
  R2D_HOST_DEVICE RowStep(Context& ctx, const StepRow& row, const StepOptions& options)
      : ctx_(ctx), row_(row), options_(options) {}

  R2D_HOST_DEVICE void run() {
    const StepRow& row = row_;
    ctx_.for_each(row.length, [&](int64_t i) { row.rule[i] = 0; });
    const int64_t skipped = row.is_valid ? begin() : 0;
    if (row.is_valid) {
      base_rule();
      if (options_.window.window > 0) window_pool();
      if (options_.neighbour.radius > 0) neighbours();
      if (options_.run.mode != TokenCluster::kOff) positional_ambiguity();
      if (options_.stability.steps > 0) stability();
      if (row.editable != nullptr) edits();
    }
    const int64_t remaining = count_masked() + skipped;
    ctx_.once([&] { *row.remaining = static_cast<int32_t>(remaining); });
    if (row.is_valid) finish(remaining);
  }

 private:
  // A cell without a prediction (NaN) is masked but never eligible.
  R2D_HOST_DEVICE bool eligible(int64_t i) const {
    return row_.masked[i] && row_.confidence[i] == row_.confidence[i];
  }

  // From the first commit on: a candidate is either masked still or was given a rule in this step.
  R2D_HOST_DEVICE bool was_masked(int64_t i) const { return row_.masked[i] || row_.rule[i] != 0; }

  R2D_HOST_DEVICE int64_t count_masked() {
    return ctx_.count(row_.length, [&](int64_t i) { return row_.masked[i]; });
  }

  R2D_HOST_DEVICE bool passes(float confidence, float threshold) const {
    return r2dllm::passes(confidence, round_to(threshold, options_.rounding), options_.compare);
  }

  // Committing the mask id leaves the cell masked.
  R2D_HOST_DEVICE void commit(int64_t i, Rule rule) {
    if (row_.prediction[i] == options_.mask_id) return;
    row_.masked[i] = false;
    row_.rule[i] = static_cast<uint8_t>(rule);
  }

  // Ambiguity, stability and edits look at the argmax, also where another token was drawn.
  R2D_HOST_DEVICE void commit_top(int64_t i, Rule rule) {
    if (row_.top_id[i] == options_.mask_id) return;
    row_.prediction[i] = row_.top_id[i];
    row_.confidence[i] = round_to(row_.top_confidence[i], options_.rounding);
    commit(i, rule);
  }

  // Takes the cells that MaskPrediction::kSkip leaves out from the candidates; returns how many.
  R2D_HOST_DEVICE int64_t begin() {
    const StepRow& row = row_;
    const bool skips = options_.mask_prediction == MaskPrediction::kSkip && options_.mask_id >= 0;
    const bool begins_block = row.counters != nullptr && row.counters[kBlockMasked] < 0;
    if (!skips && !begins_block) return 0;
    const int64_t given = count_masked();
    if (begins_block) ctx_.once([&] { row.counters[kBlockMasked] = given; });
    if (!skips) return 0;
    ctx_.for_each(row.length, [&](int64_t i) {
      if (row.top_id[i] == options_.mask_id) row.masked[i] = false;
    });
    return given - count_masked();
  }

  R2D_HOST_DEVICE void finish(int64_t remaining) {
    const StepRow& row = row_;
    const int64_t step = row.counters != nullptr ? row.counters[kBlockStep] : 0;
    ctx_.for_each(row.length, [&](int64_t i) {
      if (row.rule[i] == 0) return;
      if (row.tokens.written != nullptr) row.tokens.set(row.number, i, row.prediction[i]);
      if (row.step_map != nullptr) {
        row.step_map[i] = static_cast<int16_t>(step < INT16_MAX ? step : INT16_MAX);
      }
    });
    if (row.counters == nullptr) return;
    // A row that is decided and waits for others draws, later, what it draws alone.
    const bool had_candidates = remaining > 0 || ctx_.count(row.length, [&](int64_t i) {
      return row.rule[i] != 0 && row.rule[i] != static_cast<uint8_t>(Rule::kEdit);
    }) > 0;
    ctx_.once([&] {
      row.counters[kStep] += had_candidates;
      ++row.counters[kBlockStep];
    });
  }

  R2D_HOST_DEVICE BaseCells base_cells() const {
    const int64_t* const counters = row_.counters;
    return {.length = row_.length,
            .confidence = row_.confidence,
            .entropy = row_.entropy,
            .block_step = counters != nullptr ? counters[kBlockStep] : 0,
            .block_masked = counters != nullptr ? counters[kBlockMasked] : 0};
  }

  R2D_HOST_DEVICE void base_rule() {
    const StepRow& row = row_;
    const BaseOptions& base = options_.base;
    const BaseCells cells = base_cells();
    ctx_.for_each(row.length, [&](int64_t i) {
      row.keys[i] = eligible(i) ? base_key(cells, i, base.rule) : 0;
    });
    const auto passes_threshold = [&](float confidence) {
      return passes(confidence, base.threshold);
    };
    const bool by_threshold = base.rule == BaseRule::kThreshold;
    if ((by_threshold || base.rule == BaseRule::kFirst) && base.quota <= 1) {
      // Without an order of all cells.
      const int64_t best = cell_of(ctx_.max(row.length, [&](int64_t i) { return row.keys[i]; }));
      ctx_.for_each(row.length, [&](int64_t i) {
        if (by_threshold && eligible(i) && passes_threshold(row.confidence[i])) {
          commit(i, Rule::kThreshold);
        } else if (i == best && base.quota > 0) {
          commit(i, by_threshold ? Rule::kForced : Rule::kBase);
        }
      });
      return;
    }
    const int64_t count = ctx_.sort(row.length, row.keys, row.order);
    if (count == 0) return;
    ctx_.once([&] {
      const int64_t prefix = base_prefix(cells, row.order, count, base, passes_threshold);
      for (int64_t rank = 0; rank < count && (rank < prefix || rank < base.quota); ++rank) {
        commit(row.order[rank], rank >= prefix ? Rule::kForced
                                : by_threshold ? Rule::kThreshold
                                               : Rule::kBase);
      }
    });
  }

  R2D_HOST_DEVICE void window_pool() {
    pool_windows(ctx_, row_.length, options_.window, row_.masked, row_.confidence, row_.selected,
                 [&](int64_t i) { commit(i, Rule::kWindow); });
  }

  R2D_HOST_DEVICE void neighbours() {
    const StepRow& row = row_;
    const auto is_anchor = [&](int64_t j) {
      return was_masked(j) && passes(row.confidence[j], options_.base.threshold);
    };
    ctx_.for_each(row.length, [&](int64_t i) {
      row.selected[i] = eligible(i) && passes(row.confidence[i], options_.neighbour.threshold) &&
                        beside_anchor(i, row.length, options_.neighbour.radius, is_anchor);
    });
    ctx_.for_each(row.length, [&](int64_t i) {
      if (row.selected[i]) commit(i, Rule::kNeighbour);
    });
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
      const Observation cell{.was_masked = was_masked(i),
                             .is_masked = row.masked[i],
                             .prediction = row.top_id[i],
                             .confidence = row.top_confidence[i]};
      if (advance(row.streaks, i, cell, options_.stability)) commit_top(i, Rule::kStability);
    });
  }

  // Token to token (LLaDA2.1, arXiv 2602.08676): a decided cell takes another token that is sure.
  R2D_HOST_DEVICE void edits() {
    const StepRow& row = row_;
    ctx_.for_each(row.length, [&](int64_t i) {
      if (!row.editable[i] || row.top_id[i] < 0) return;
      const float confidence = round_to(row.top_confidence[i], options_.rounding);
      if (row.top_id[i] != row.tokens.get(row.number, i) &&
          passes(confidence, options_.edit_threshold)) {
        commit_top(i, Rule::kEdit);
      }
    });
  }

  Context& ctx_;
  const StepRow& row_;
  const StepOptions& options_;
};

}  // namespace r2dllm

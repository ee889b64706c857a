// SPDX-License-Identifier: Apache-2.0
// Hand cases for csrc/rules: no torch, no GPU.
#include <algorithm>
#include <memory>
#include <numeric>
#include <random>

#include "../cpu/row_context.h"
#include "../rules/decode_step.h"
#include "../rules/row_params.h"
#include "check.h"

using namespace r2dllm;

namespace {

constexpr int64_t kMask = 99;

StepOptions no_rules() {
  StepOptions options{};
  options.mask_id = kMask;
  options.base.threshold = 0.9f;
  options.base.quota = 1;
  options.base.factor = 1.0;
  options.base.error_budget = 0.1;
  options.neighbour = {.radius = 0, .threshold = 0.75f};
  options.edit_threshold = kNoThreshold;
  options.window = {
      .window = 0, .max_unmasked = 1, .min_confidence = 0.8f, .rounding = Rounding::kNone};
  options.run = {.mode = TokenCluster::kOff, .min_run = 2, .min_confidence = 0.8f};
  options.stability = {.steps = 0, .min_confidence = 0.8f, .mode = TemporalEval::kLast};
  return options;
}

// One row with its state; `step` runs the rules once.
struct Block {
  std::vector<int64_t> ids;
  std::vector<int64_t> drawn;  // in place of the argmax; none by default
  std::vector<float> confidence;
  std::vector<int64_t> tokens, prediction, streak_id, counters{0, 0, 0, -1, 0};
  std::vector<float> judged, streak_sum, streak_max, entropy;
  std::vector<bool> decided;  // which are editable; none by default
  std::vector<int16_t> step_map;
  bool is_valid = true;
  std::vector<int32_t> streak_count, order;
  std::vector<uint8_t> rule, selected;
  std::vector<uint64_t> keys;
  int32_t remaining = -1;

  explicit Block(size_t length)
      : tokens(length, kMask),
        prediction(length),
        streak_id(length, -1),
        judged(length),
        streak_sum(length),
        streak_max(length),
        entropy(length),
        step_map(length, -1),
        streak_count(length),
        order(length),
        rule(length),
        selected(length),
        keys(length) {}

  template <class Context = cpu::RowContext>
  void step(const StepOptions& options, Context context = {}) {
    const auto length = static_cast<int64_t>(tokens.size());
    const std::unique_ptr<bool[]> masked(new bool[tokens.size()]),
        editable(new bool[tokens.size()]);
    for (int64_t i = 0; i < length; ++i) {
      masked[i] = tokens[i] == kMask;
      editable[i] = !decided.empty() && decided[static_cast<size_t>(i)];
      prediction[i] = drawn.empty() ? ids[i] : drawn[static_cast<size_t>(i)];
      judged[i] = confidence[i];
    }
    const StepRow row{.length = length,
                      .number = 0,
                      .is_valid = is_valid,
                      .top_id = ids.data(),
                      .top_confidence = confidence.data(),
                      .entropy = entropy.data(),
                      .prediction = prediction.data(),
                      .confidence = judged.data(),
                      .rule = rule.data(),
                      .remaining = &remaining,
                      .tokens = {.data = tokens.data(),
                                 .written = tokens.data(),
                                 .is_wide = true,
                                 .batch_stride = length,
                                 .length_stride = 1},
                      .streaks = {.count = streak_count.data(),
                                  .id = streak_id.data(),
                                  .sum = streak_sum.data(),
                                  .max = streak_max.data()},
                      .counters = counters.data(),
                      .step_map = step_map.data(),
                      .editable = decided.empty() ? nullptr : editable.get(),
                      .masked = masked.get(),
                      .keys = keys.data(),
                      .selected = selected.data(),
                      .order = order.data()};
    RowStep<Context>(context, row, options).run();
  }
};

// Cells of a phase run in a shuffled order: no rule may depend on it.
struct ShuffledContext : cpu::RowContext {
  std::mt19937 random;
  explicit ShuffledContext(unsigned seed) : random(seed) {}
  template <class F>
  void for_each(int64_t n, F f) {
    std::vector<int64_t> order(static_cast<size_t>(std::max<int64_t>(n, 0)));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (int64_t i : order) f(i);
  }
};

using Ids = std::vector<int64_t>;
using Rules = std::vector<uint8_t>;

TEST(threshold_is_inclusive_and_the_best_cell_always_goes) {
  Block block(3);
  block.ids = {1, 2, 3};
  block.confidence = {0.9f, 0.5f, 0.95f};
  block.step(no_rules());
  CHECK(block.tokens == Ids{1, kMask, 3});
  CHECK(block.rule == Rules{1, 0, 1});
  CHECK(block.remaining == 1);
  block.confidence = {0.1f, 0.2f, 0.3f};
  block.step(no_rules());
  CHECK(block.tokens == Ids{1, 2, 3});
  CHECK(block.rule == Rules{0, 2, 0});
  CHECK(block.counters == Ids{0, 2, 2, 3, 0});
}

TEST(ties_of_the_best_cell_go_to_the_lowest_index) {
  Block block(3);
  block.ids = {1, 2, 3};
  block.confidence = {0.4f, 0.5f, 0.5f};
  block.step(no_rules());
  CHECK(block.tokens == Ids{kMask, 2, kMask});
}

TEST(schedule_shares_the_cells_among_the_steps) {
  CHECK(schedule_quota(7, 0, 3) == 3);
  CHECK(schedule_quota(7, 1, 3) == 2);
  CHECK(schedule_quota(7, 2, 3) == 2);
  StepOptions options = no_rules();
  options.base.rule = BaseRule::kSchedule;
  options.base.steps_per_block = 2;
  Block block(3);
  block.ids = {1, 2, 3};
  block.confidence = {0.2f, 0.4f, 0.3f};
  block.step(options);
  CHECK(block.tokens == Ids{kMask, 2, 3});
  block.step(options);
  CHECK(block.remaining == 0);
}

TEST(a_schedule_commits_while_a_cell_may_be) {
  StepOptions options = no_rules();
  options.base.rule = BaseRule::kSchedule;
  options.base.steps_per_block = 2;
  Block block(4);
  block.ids = {1, 2, 3, 4};
  block.confidence = {0.2f, 0.4f, 0.3f, 0.1f};
  block.tokens = {9, kMask, 9, 9};
  block.step(options);
  CHECK(block.rule == Rules{0, 6, 0, 0});  // the only candidate of the block so far
  block.tokens = {kMask, 9, kMask, 9};
  block.step(options);
  CHECK(block.rule == Rules{0, 0, 2, 0});  // a share of 0, but something goes
  block.tokens = {kMask, kMask, kMask, kMask};
  block.step(options);
  CHECK(block.rule == Rules{6, 6, 6, 6});  // past the end all that is there, not one
}

TEST(the_best_cell_goes_where_a_budget_allows_none) {
  StepOptions options = no_rules();
  options.base.rule = BaseRule::kBudget;
  options.base.error_budget = 0.25;
  Block block(2);
  block.ids = {1, 2};
  block.confidence = {0.5f, 0.625f};
  block.step(options);
  CHECK(block.rule == Rules{0, 2});
  block.confidence = {0.75f, 0.0f};
  block.step(options);
  CHECK(block.rule == Rules{6, 0});
}

TEST(factor_commits_the_last_cell_with_all_others) {
  const double confidence[] = {0.9, 0.7, 0.3};
  const auto of = [&](int64_t j) { return confidence[j]; };
  CHECK(factor_prefix(1, 1.0, of) == 1);
  CHECK(factor_prefix(3, 1.0, of) == 3);  // 0.7 >= 1 - 1/3; 0.3 < 1 - 1/4, but it is the last
  const double falling[] = {0.9, 0.6, 0.3};
  CHECK(factor_prefix(3, 1.0, [&](int64_t j) { return falling[j]; }) == 1);
}

TEST(budget_bounds_the_expected_errors) {
  const double confidence[] = {0.5, 0.96875, 0.96875, 0.9};
  const auto of = [&](int64_t j) { return confidence[j]; };
  const auto cost = [&](int64_t j) { return 1.0 - of(j); };
  CHECK(budget_prefix(4, 0.0, false, cost) == 0);
  CHECK(budget_prefix(4, 0.5625, false, cost) == 3);  // 0.5 + 2 / 32, inclusive
  CHECK(budget_prefix(4, 0.56, false, cost) == 2);
  CHECK(budget_prefix(4, 0.0, true, cost) == 1);  // the last one is free
  CHECK(budget_prefix(4, 0.5625, true, cost) == 4);
  CHECK(budget_prefix(4, 0.56, true, cost) == 3);
}

TEST(first_takes_the_first_cell_with_a_prediction) {
  StepOptions options = no_rules();
  options.base.rule = BaseRule::kFirst;
  Block block(3);
  block.ids = {-1, 2, 3};
  block.confidence = {NAN, 0.0f, 0.9f};
  block.step(options);
  CHECK(block.tokens == Ids{kMask, 2, kMask});
}

TEST(windows_are_judged_on_one_snapshot) {
  StepOptions options = no_rules();
  options.window.window = 2;
  Block block(4);
  block.ids = {1, 2, 3, 4};
  block.confidence = {0.85f, 0.75f, 0.7f, 0.1f};
  // Cell 0 goes first as the best; [0, 1] is then judged by cell 1 alone, which fails.
  block.step(options);
  CHECK(block.rule == Rules{2, 0, 0, 0});
  Block pair(4);
  pair.ids = {1, 2, 3, 4};
  pair.confidence = {0.1f, 0.88f, 0.82f, 0.79f};
  pair.step(options);  // [2, 3]: mean 0.805
  CHECK(pair.rule == Rules{0, 2, 3, 3});
}

TEST(a_window_with_a_cell_that_has_no_prediction_is_skipped) {
  const float confidence[] = {0.9f, NAN, 0.9f};
  const bool all[] = {true, true, true};
  WindowOptions options{
      .window = 3, .max_unmasked = -1, .min_confidence = 0.5f, .rounding = Rounding::kNone};
  CHECK(!window_passes(0, options, all, confidence));
  options.window = 1;
  CHECK(window_passes(2, options, all, confidence));
}

TEST(a_window_may_hold_as_many_decided_cells_as_its_limit) {
  const bool masked[] = {true, false, false};
  const float confidence[] = {0.9f, 0.0f, 0.0f};
  WindowOptions options{
      .window = 3, .max_unmasked = 2, .min_confidence = 0.5f, .rounding = Rounding::kNone};
  CHECK(window_passes(0, options, masked, confidence));
  options.max_unmasked = 1;
  CHECK(!window_passes(0, options, masked, confidence));
}

TEST(a_run_commits_one_cell) {
  StepOptions options = no_rules();
  options.base.threshold = 1.0f;
  Block block(5);
  block.ids = {7, 5, 5, 5, 5};
  block.confidence = {0.9f, 0.81f, 0.82f, 0.82f, 0.2f};
  for (auto [mode, cell] : {std::pair{TokenCluster::kConfidence, 2}, {TokenCluster::kMid, 3}}) {
    options.run.mode = mode;
    Block copy = block;
    copy.step(options);
    CHECK(copy.rule[0] == 2 && copy.rule[cell] == 4);
    CHECK(copy.remaining == 3);
  }
  options.run.min_confidence = 0.82f;  // strict
  block.step(options);
  CHECK(block.remaining == 4);
}

TEST(a_run_counts_from_its_least_length) {
  StepOptions options = no_rules();
  options.run.mode = TokenCluster::kConfidence;
  Block block(4);
  block.ids = {7, 5, 5, 6};
  block.confidence = {0.89f, 0.85f, 0.81f, 0.2f};
  Block longer = block;
  block.step(options);
  CHECK(block.rule == Rules{2, 4, 0, 0});
  options.run.min_run = 3;
  longer.step(options);
  CHECK(longer.rule == Rules{2, 0, 0, 0});
}

TEST(runs_and_streaks_commit_the_argmax_where_another_token_was_drawn) {
  for (const bool by_run : {true, false}) {
    StepOptions options = no_rules();
    options.run.mode = by_run ? TokenCluster::kConfidence : TokenCluster::kOff;
    options.stability.steps = by_run ? 0 : 1;
    Block block(3);
    block.ids = {7, 5, 5};
    block.drawn = {1, 2, 3};
    block.confidence = {0.89f, 0.85f, 0.2f};
    block.step(options);
    CHECK(block.rule == Rules{2, static_cast<uint8_t>(by_run ? 4 : 5), 0});
    CHECK(block.tokens == Ids{1, 5, kMask});
  }
}

TEST(a_streak_keeps_its_greatest_confidence) {
  StepOptions options = no_rules();
  options.base.threshold = 1.0f;
  options.stability = {.steps = 2, .min_confidence = 0.8f, .mode = TemporalEval::kMax};
  Block block(2);
  block.ids = {1, 2};
  block.confidence = {0.85f, 0.82f};
  block.step(options);  // cell 0 goes as the best
  CHECK(block.rule == Rules{2, 0} && block.streak_max == (std::vector<float>{0.0f, 0.82f}));
  block.tokens[0] = kMask;
  block.confidence = {0.5f, 0.3f};
  block.step(options);
  CHECK(block.rule == Rules{2, 5});
}

TEST(a_prediction_is_stable_after_its_steps) {
  StepOptions options = no_rules();
  options.stability.steps = 2;
  Block block(3);
  block.ids = {1, 2, 3};
  block.confidence = {0.89f, 0.85f, 0.5f};
  block.step(options);
  CHECK(block.rule == Rules{2, 0, 0});
  CHECK(block.streak_count == std::vector<int32_t>{0, 1, 1});
  block.ids = {1, 4, 3};
  block.confidence = {0, 0.5f, 0.6f};
  block.step(options);
  CHECK(block.rule == Rules{0, 0, 2});
  CHECK(block.streak_count == std::vector<int32_t>{0, 1, 0});
  CHECK(block.streak_id == Ids{-1, 4, -1});
}

TEST(evidence_of_a_streak) {
  Streak streak = observe(observe(Streak::none(), 3, 0.5f), 3, 0.75f);
  CHECK(streak.count == 2 && streak.sum == 1.25f && streak.max == 0.75f);
  CHECK(is_stable(streak, 0.75f, {2, 0.75f, TemporalEval::kLast}));
  CHECK(is_stable(streak, 0.75f, {2, 0.625f, TemporalEval::kAve}));
  CHECK(!is_stable(streak, 0.75f, {2, 0.63f, TemporalEval::kAve}));
  CHECK(is_stable(streak, 0.1f, {2, 0.75f, TemporalEval::kMax}));
  CHECK(!is_stable(streak, 0.75f, {3, 0.0f, TemporalEval::kMax}));
}

TEST(committing_the_mask_id_leaves_the_cell_masked) {
  StepOptions options = no_rules();
  options.run.mode = TokenCluster::kConfidence;
  options.stability.steps = 1;
  Block block(2);
  block.ids = {kMask, kMask};
  block.confidence = {0.95f, 0.95f};
  block.step(options);
  CHECK(block.rule == Rules{0, 0});
  CHECK(block.remaining == 2);
  CHECK(block.streak_count == std::vector<int32_t>{0, 0});
}

TEST(a_row_without_predictions_is_left_alone) {
  StepOptions options = no_rules();
  options.window.window = 1;
  options.run.mode = TokenCluster::kMid;
  options.stability.steps = 1;
  options.window.min_confidence = options.run.min_confidence = 0.0f;
  options.stability.min_confidence = 0.0f;
  options.base.quota = 2;
  for (int base = 0; base < static_cast<int>(BaseRule::kCount); ++base) {
    options.base.rule = static_cast<BaseRule>(base);
    Block block(2);
    block.ids = {-1, -1};
    block.confidence = {NAN, NAN};
    block.step(options);
    CHECK(block.remaining == 2);
    CHECK(block.tokens == Ids{kMask, kMask});
  }
}

// The rules of one step on cells with ids 1, 2, 3, ... and these confidences.
Rules rules_of(const StepOptions& options, const std::vector<float>& confidence) {
  Block block(confidence.size());
  for (size_t i = 0; i < confidence.size(); ++i) block.ids.push_back(static_cast<int64_t>(i) + 1);
  block.confidence = confidence;
  block.step(options);
  return block.rule;
}

TEST(a_quota_is_united_with_what_the_base_rule_commits) {
  StepOptions options = no_rules();
  const std::vector<float> p{0.5f, 0.95f, 0.7f, 0.7f};
  for (const auto& [quota, want] : std::vector<std::pair<int64_t, Rules>>{
           {0, {0, 1, 0, 0}}, {1, {0, 1, 0, 0}}, {2, {0, 1, 2, 0}}, {9, {2, 1, 2, 2}}}) {
    options.base.quota = quota;
    CHECK(rules_of(options, p) == want);
  }
  options.base.quota = 2;
  CHECK(rules_of(options, {0.95f, 0.9f, 0.99f}) == (Rules{1, 1, 1}));  // the last one too
  options.base.threshold = kNoThreshold;
  options.base.quota = 3;
  CHECK(rules_of(options, p) == (Rules{0, 2, 2, 2}));
  options.base.rule = BaseRule::kFirst;
  CHECK(rules_of(options, p) == (Rules{6, 6, 6, 0}));
  options.base.rule = BaseRule::kBudget;
  options.base.error_budget = 0.0;
  CHECK(rules_of(options, p) == (Rules{0, 2, 2, 2}));
  options.base.last_free = true;
  CHECK(rules_of(options, p) == (Rules{0, 6, 2, 2}));
  options.base.quota = 0;
  options.base.last_free = false;
  CHECK(rules_of(options, p) == (Rules{0, 0, 0, 0}));
}

TEST(a_threshold_may_be_strict) {
  StepOptions options = no_rules();
  options.base.threshold = 0.5f;
  options.base.quota = 0;
  CHECK(rules_of(options, {0.5f, 0.75f}) == (Rules{1, 1}));
  options.compare = Compare::kAbove;
  CHECK(rules_of(options, {0.5f, 0.75f}) == (Rules{0, 1}));
}

TEST(entropy_orders_by_itself_and_leaves_the_last_cell_free) {
  StepOptions options = no_rules();
  options.base.rule = BaseRule::kEntropy;
  options.base.entropy_budget = 0.5;
  Block block(4);
  block.ids = {1, 2, 3, 4};
  block.confidence = {0.9f, 0.1f, 0.2f, 0.3f};
  block.entropy = {2.0f, 0.25f, 0.25f, 0.5f};
  Block free = block;
  block.step(options);
  CHECK(block.rule == (Rules{0, 6, 6, 0}));  // 0.25 + 0.25 <= 0.5
  options.base.last_free = true;
  free.step(options);
  CHECK(free.rule == (Rules{0, 6, 6, 6}));
}

TEST(a_cell_without_an_entropy_is_not_ordered_by_it) {
  StepOptions options = no_rules();
  options.base.rule = BaseRule::kEntropy;
  options.base.quota = 9;
  Block block(3);
  block.ids = {1, 2, 3};
  block.confidence = {0.9f, 0.5f, 0.5f};
  block.entropy = {NAN, 0.5f, 0.25f};
  block.step(options);
  CHECK(block.rule == (Rules{0, 2, 2}));
}

TEST(an_anchor_is_another_candidate_of_the_step) {
  StepOptions options = no_rules();
  options.base.rule = BaseRule::kFirst;
  options.base.quota = 0;
  options.neighbour = {.radius = 2, .threshold = 0.75f};
  CHECK(rules_of(options, {0.95f, 0.3f}) == (Rules{0, 0}));
  CHECK(rules_of(options, {0.95f, 0.8f}) == (Rules{0, 7}));
  Block block(2);
  block.tokens = {5, kMask};
  block.ids = {5, 1};
  block.confidence = {0.95f, 0.8f};
  block.step(options);
  CHECK(block.rule == (Rules{0, 0}));
}

TEST(cells_beside_an_anchor_need_less) {
  StepOptions options = no_rules();
  options.neighbour = {.radius = 2, .threshold = 0.75f};
  CHECK(rules_of(options, {0.8f, 0.8f, 0.3f, 0.95f, 0.74f, 0.75f}) == (Rules{0, 7, 0, 1, 0, 7}));
  options.base.threshold = kNoThreshold;
  CHECK(rules_of(options, {0.8f, 0.95f}) == (Rules{0, 2}));
}

TEST(a_cell_that_predicts_the_mask_id_may_be_skipped) {
  StepOptions options = no_rules();
  options.window.window = 2;
  options.window.max_unmasked = 0;
  options.stability.steps = 1;
  options.mask_prediction = MaskPrediction::kSkip;
  Block block(3);
  block.ids = {1, kMask, 3};
  block.confidence = {0.3f, 0.99f, 0.85f};
  block.streak_count = {0, 7, 0};
  block.step(options);
  CHECK(block.rule == (Rules{0, 0, 2}));  // windows see it as decided; the best of the others goes
  CHECK(block.streak_count == (std::vector<int32_t>{1, 7, 0}));
  CHECK(block.remaining == 2 && block.counters[kBlockMasked] == 3);
}

TEST(a_decided_cell_takes_another_token_that_is_sure) {
  StepOptions options = no_rules();
  options.edit_threshold = 0.7f;
  Block block(6);
  block.tokens = {1, 2, 3, kMask, 5, 6};
  block.decided = {true, true, false, false, true, true};
  block.ids = {1, 7, 8, 4, kMask, 9};
  block.confidence = {0.99f, 0.7f, 0.99f, 0.2f, 0.99f, 0.69f};
  block.step(options);
  CHECK(block.rule == (Rules{0, 8, 0, 2, 0, 0}));
  CHECK(block.tokens == (Ids{1, 7, 3, 4, 5, 6}));
  CHECK(block.step_map == (std::vector<int16_t>{-1, 0, -1, 0, -1, -1}));
  CHECK(block.remaining == 0);
}

TEST(the_step_map_ends_at_the_greatest_number_that_it_holds) {
  Block block(2);
  block.ids = {1, 2};
  block.confidence = {0.5f, 0.25f};
  block.counters[kBlockStep] = 32766;
  block.step(no_rules());
  CHECK(block.step_map == (std::vector<int16_t>{32766, -1}));
  block.counters[kBlockStep] = 40000;
  block.step(no_rules());
  CHECK(block.step_map == (std::vector<int16_t>{32766, 32767}));
}

// ---- parameters of rows ----------------------------------------------------------------------

template <class Number, class Array>
bool takes(Array RowParams::*field, Number value) {
  RowParams rows;
  rows.*field = {&value, true};
  StepOptions options = no_rules();
  return take_options(rows, 0, options) && in_range(rows, 0);
}

TEST(a_row_takes_what_a_config_takes) {
  const double infinity = INFINITY, nan = NAN;
  for (auto field :
       {&RowParams::threshold, &RowParams::spatial_threshold, &RowParams::temporal_threshold,
        &RowParams::edit_threshold, &RowParams::top_p, &RowParams::min_p}) {
    for (double value : {0.0, 0.5, 1.0}) CHECK(takes(field, value));
    for (double value : {-0.01, 1.01, infinity, nan}) CHECK(!takes(field, value));
  }
  for (auto field :
       {&RowParams::error_budget, &RowParams::entropy_budget, &RowParams::temperature}) {
    for (double value : {0.0, 1e300}) CHECK(takes(field, value));
    for (double value : {-0.01, infinity, nan}) CHECK(!takes(field, value));
  }
  for (auto field : {&RowParams::quota, &RowParams::top_k}) {
    for (int64_t value : {0, 7}) CHECK(takes(field, value));
    CHECK(!takes(field, int64_t{-1}));
  }
}

TEST(a_row_has_its_own_values_and_the_config_s) {
  const float threshold[] = {0.25f, 0.5f}, spatial[] = {0.75f, 0.125f};
  const int32_t quota[] = {3, 4};
  const int64_t seed[] = {5, -6};
  RowParams rows;
  rows.threshold = {.data = threshold, .is_double = false};
  rows.spatial_threshold = {.data = spatial, .is_double = false};
  rows.quota = {.data = quota, .is_wide = false};
  rows.seed = {.data = seed, .is_wide = true};
  StepOptions options = no_rules();
  CHECK(take_options(rows, 1, options));
  CHECK(options.base.threshold == 0.5f && options.base.quota == 4);
  CHECK(options.window.min_confidence == 0.125f && options.run.min_confidence == 0.125f);
  CHECK(options.seed == static_cast<uint64_t>(-6) && options.base.error_budget == 0.1);
}

TEST(a_row_that_is_left_alone_keeps_its_state) {
  StepOptions options = no_rules();
  options.stability.steps = 2;
  Block block(2);
  block.ids = {1, 2};
  block.confidence = {1.0f, 0.5f};
  block.is_valid = false;
  block.step(options);
  CHECK(block.rule == (Rules{0, 0}) && block.remaining == 2);
  CHECK(block.tokens == (Ids{kMask, kMask}) && block.streak_count == (std::vector<int32_t>{0, 0}));
  CHECK(block.counters == (Ids{0, 0, 0, -1, 0}) &&
        block.step_map == (std::vector<int16_t>{-1, -1}));
}

TEST(no_rule_depends_on_the_order_of_its_cells) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  for (unsigned round = 0; round < 500; ++round) {
    StepOptions options = no_rules();
    options.base.rule = static_cast<BaseRule>(round % static_cast<unsigned>(BaseRule::kCount));
    options.base.quota = round % 5;
    options.base.last_free = round % 2 == 0;
    options.base.entropy_budget = 0.5;
    options.mask_prediction = static_cast<MaskPrediction>(round % 3);
    options.window.window = round % 4;
    options.neighbour.radius = round % 3;
    options.run.mode = static_cast<TokenCluster>(round / 3 % 4);
    options.stability.steps = 1 + round % 3;
    options.stability.mode = static_cast<TemporalEval>(round % 3);
    options.edit_threshold = 0.5f;
    Block ordered(1 + round % 40);
    for (size_t i = 0; i < ordered.tokens.size(); ++i) {
      ordered.ids.push_back(random() % 8 == 0 ? kMask : static_cast<int64_t>(random() % 3));
      ordered.confidence.push_back(uniform(random));
      ordered.entropy[i] = uniform(random);
      ordered.decided.push_back(random() % 4 == 0);
      if (ordered.decided.back()) ordered.tokens[i] = 1;
    }
    Block shuffled = ordered;
    for (int step = 0; step < 4; ++step) {
      ordered.step(options);
      shuffled.step(options, ShuffledContext(round));
      CHECK(ordered.tokens == shuffled.tokens && ordered.rule == shuffled.rule);
      CHECK(ordered.streak_sum == shuffled.streak_sum && ordered.step_map == shuffled.step_map);
    }
  }
}

TEST(merging_slices_is_exact_in_the_scale) {
  const OnlineSoftmax a{1.0, 1.0, 1.5}, b{-100.0, -144.0, 1.0}, none = OnlineSoftmax::empty();
  CHECK(merge(a, none).sum == 1.5 && merge(none, a).sum == 1.5);
  CHECK(merge(a, b).sum == 1.5 + std::ldexp(1.0, -145));
  CHECK(merge(b, a).max == 1.0);
  CHECK(!is_valid(merge(a, {0.0, 0.0, NAN})) && !is_valid(none));
  CHECK(!is_valid({INFINITY, 0.0, 1.0}));
}

TEST(rounding_to_sixteen_bits) {
  CHECK(round_to(0.9f, Rounding::kNone) == 0.9f);
  CHECK(round_to(0.9f, Rounding::kBFloat16) == 0.8984375f);
  CHECK(round_to(0.9f, Rounding::kHalf) == 0.89990234375f);
  CHECK(round_to(1.0f, Rounding::kBFloat16) == 1.0f);
  CHECK(round_to(0.998046875f, Rounding::kBFloat16) == 1.0f);  // tie, to even
  CHECK(std::isnan(round_to(NAN, Rounding::kHalf)));
  CHECK(round_to(3e-8f, Rounding::kHalf) == 5.9604644775390625e-8f);
}

TEST(philox_matches_the_published_vector) {
  // Random123, philox4x32-10, counter and key of zeros: 6627e8d5 e169c58d ...
  const double expected = static_cast<double>(0x6627e8d5e169c58dull >> 11) * 0x1.0p-53;
  CHECK(uniform(0, 0, 0, 0, Draw::kToken) == expected);
  CHECK(uniform(0, 0, 0, 0, Draw::kRun) != expected);
}

}  // namespace

int main() { return test::run_all(); }

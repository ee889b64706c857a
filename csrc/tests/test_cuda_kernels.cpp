// SPDX-License-Identifier: Apache-2.0
// The bodies of the CUDA kernels, lane by lane on the CPU: the pass over V against float64, all
// that follows bit for bit against the CPU back end's own context, in several orders of lanes and
// blocks.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>

#include "../cuda/decode_step.h"
#include "../cuda/rules.h"
#include "../cuda/token_confidence.h"
#include "check.h"
#include "cuda_error.h"
#include "cuda_logits.h"
#include "fibre_lane.h"

using namespace r2dllm;
using namespace r2dllm::cuda;
using test::ExactSoftmax;
using test::FibreLane;
using test::for_each_format;
using test::kPlace;
using test::kSumError;
using test::kTermError;
using test::Logits;

namespace {

// ---- the oracle ----------------------------------------------------------------------------

// The confidence of a token whose logit is so far below the greatest. Two last places beside the
// worst case: the errors of FibreLane::exp2 have either sign, and what many terms add cancels.
bool close(float got, const ExactSoftmax& row, long double below = 0) {
  if (row.prediction < 0) return got != got;
  const long double want = row.p() * std::exp(-below), error = std::abs(got - want);
  int exponent;
  std::frexp(static_cast<double>(want), &exponent);
  return error <= want * (row.mass_error + kPlace * (1 + row.mass_error)) &&
         error <= std::ldexp(2.0L, exponent - 24);
}

// ---- launches ------------------------------------------------------------------------------

constexpr SamplingOptions kGreedy{0.0, 0, 1.0, 0.0};

struct Workspace {
  std::unique_ptr<SlicePartial[]> partial;
  std::unique_ptr<double[]> tempered, moment;
  std::unique_ptr<float[]> cutoff;
  std::unique_ptr<Drawn[]> drawn;
  VocabWorkspace view;

  Workspace(int64_t rows, int64_t slices, const SamplingOptions& sampling = kGreedy)
      : partial(new SlicePartial[static_cast<size_t>(rows * slices)]),
        view{slices, partial.get(), nullptr, nullptr} {
    moment.reset(new double[static_cast<size_t>(rows * slices)]);
    view.moment = moment.get();
    if (sampling.temperature == 0.0) return;
    tempered.reset(new double[static_cast<size_t>(rows * slices)]);
    drawn.reset(new Drawn[static_cast<size_t>(rows)]);
    std::fill_n(drawn.get(), rows, Drawn{77, 77.0f, 77.0f});  // which nobody drew
    view.tempered = tempered.get();
    if (restricts(sampling)) {
      cutoff.reset(new float[static_cast<size_t>(rows)]);
      view.cutoff = cutoff.get();
    }
  }
};

template <class Format, Tempered kTempered = Tempered::kNone, bool kEntropy = false,
          class IsCandidate, class ScaleOf = SameScale>
void run_slices(const Logits<Format>& logits, const IsCandidate& is_candidate,
                const VocabWorkspace& workspace, unsigned seed, const ScaleOf& scale_of = {}) {
  test::launch<SliceShared>(logits.batch * logits.length * workspace.slices, kSliceThreads, seed,
                            sizeof(SliceShared), [&](FibreLane& lane, SliceShared* shared) {
                              slice_body<Format, kTempered, kEntropy>(
                                  lane, *shared, logits.view(), is_candidate, workspace, scale_of);
                            });
}

struct Confidences {
  std::vector<int64_t> prediction;
  std::vector<float> confidence;
};

// The second launch of token_confidence.
template <class Format>
Confidences merge_confidence(const Logits<Format>& logits, const bool* candidates,
                             const VocabWorkspace& workspace, unsigned seed) {
  const int64_t cells = logits.batch * logits.length;
  Confidences result{std::vector<int64_t>(static_cast<size_t>(cells), 77),
                     std::vector<float>(static_cast<size_t>(cells), 77)};
  const TokenConfidenceParams params{logits.view(), candidates, result.prediction.data(),
                                     result.confidence.data(), nullptr};
  test::launch<char>((cells + kCellsPerBlock - 1) / kCellsPerBlock, kCellThreads, seed, 1,
                     [&](FibreLane& lane, char*) {
                       confidence_body(lane, params, Flagged{candidates}, workspace);
                     });
  return result;
}

template <class Format>
Confidences run_confidence(const Logits<Format>& logits, const bool* candidates, unsigned seed) {
  const Workspace workspace(logits.batch * logits.length, logits.slices());
  run_slices(logits, Flagged{candidates}, workspace.view, seed);
  return merge_confidence(logits, candidates, workspace.view, seed);
}

template <class Format>
void check_confidence(const Logits<Format>& logits, const Confidences& got) {
  for (int64_t cell = 0; cell < logits.batch * logits.length; ++cell) {
    const ExactSoftmax want(logits, cell);
    CHECK(got.prediction[static_cast<size_t>(cell)] == want.prediction);
    CHECK(close(got.confidence[static_cast<size_t>(cell)], want));
  }
}

// ---- the pass over V -----------------------------------------------------------------------

TEST(confidence_matches_float64_at_any_width_and_alignment) {
  std::mt19937 random(1);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    for (int64_t vocab : {1, 2, 7, 127, 128, 1000, 4096, 8191, 8192, 8193, 20001}) {
      for (int64_t offset : {0, 1, 3}) {
        Logits<Format> logits(1, 2, vocab, offset, vocab % 3);
        logits.fill(random, vocab % 2 ? 1.0f : 4.0f);
        if (vocab > 2) logits.excluded = (vocab * 7 + 3) % vocab;
        check_confidence(logits, run_confidence(logits, nullptr, static_cast<unsigned>(vocab)));
      }
    }
  });
}

TEST(real_vocabularies) {
  std::mt19937 random(2);
  for (int64_t vocab : {126464, 126349, 152064}) {
    Logits<BFloat16> logits(1, 1, vocab, vocab % 2);
    logits.fill(random, 2.0f);
    logits.excluded = 126336;
    check_confidence(logits, run_confidence(logits, nullptr, 3));
  }
}

TEST(a_confident_row_keeps_its_last_bits) {
  std::mt19937 random(3);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    for (float spike : {2.0f, 6.0f, 8.0f, 9.0f, 10.0f, 12.0f, 16.0f}) {
      for (int64_t at : {0, 5000, 9999}) {
        Logits<Format> logits(1, 1, 10000);
        logits.fill(random, 1.0f);
        logits.set(0, at, spike);
        check_confidence(logits, run_confidence(logits, nullptr, 4));
      }
    }
  });
}

TEST(the_same_bits_in_any_order_place_and_batch) {
  std::mt19937 random(4);
  Logits<BFloat16> alone(1, 1, 9001), batch(2, 3, 9001, 1, 5);
  alone.fill(random);
  batch.fill(random);
  for (int64_t i = 0; i < 9001; ++i) {
    batch.set(4, i, static_cast<float>(alone.get(0, i)));
  }
  const Confidences want = run_confidence(alone, nullptr, 0);
  for (unsigned seed : {1u, 2u, 3u}) {
    const Confidences got = run_confidence(batch, nullptr, seed);
    CHECK(got.prediction[4] == want.prediction[0]);
    CHECK(got.confidence[4] == want.confidence[0]);
  }
}

TEST(ties_go_to_the_lowest_id_and_share_exactly) {
  for_each_format([&](auto format) {
    using Format = decltype(format);
    for (float top : {0.0f, 4.0f, -256.0f}) {
      Logits<Format> logits(1, 1, 20000);
      for (int64_t i = 0; i < 20000; ++i) logits.set(0, i, -30000.0f);
      for (int64_t i : {8191, 8192, 16384, 19999}) logits.set(0, i, i == 16384 ? top : top + 0.0f);
      if (top == 0.0f) logits.set(0, 16384, -0.0f);
      const Confidences got = run_confidence(logits, nullptr, 5);
      CHECK(got.prediction[0] == 8191);
      CHECK(got.confidence[0] == 0.25f);
    }
    Logits<Format> level(1, 1, 4096);
    for (int64_t i = 0; i < 4096; ++i) level.set(0, i, 1.5f);
    CHECK(run_confidence(level, nullptr, 6).confidence[0] == 1.0f / 4096);
  });
}

TEST(rows_without_a_prediction_and_infinite_logits) {
  for_each_format([&](auto format) {
    using Format = decltype(format);
    constexpr int64_t vocab = 3 * kSliceColumns<Format> / 2;
    for (int64_t at : {int64_t{0}, int64_t{100}, vocab / 2, vocab - 1}) {
      Logits<Format> logits(1, 7, vocab, 0, 8);
      for (int64_t cell = 0; cell < 7; ++cell) {
        const float rest[] = {0.0f, -3.0f, -INFINITY, -INFINITY, -INFINITY, -INFINITY, 2.0f};
        for (int64_t i = 0; i < vocab; ++i) logits.set(cell, i, rest[cell]);
      }
      logits.set(0, at, NAN);
      logits.set(1, at, INFINITY);
      logits.set(2, at, NAN);
      logits.set(3, at, INFINITY);
      logits.set(5, at, -5.0f);  // one finite logit; row 4 has none
      const Confidences got = run_confidence(logits, nullptr, 7);
      check_confidence(logits, got);
      CHECK(got.confidence[5] == 1.0f);
      CHECK(got.prediction[6] == 0);
    }
  });
}

TEST(huge_logits_stay_finite) {
  for (float top : {1e30f, -1e30f, 3e38f, 8e5f, -3.3e38f}) {
    Logits<Float32> logits(1, 1, 5000);
    for (int64_t i = 0; i < 5000; ++i) logits.set(0, i, -3.4e38f);
    logits.set(0, 3, top);
    logits.set(0, 4500, top);
    CHECK(run_confidence(logits, nullptr, 8).confidence[0] == 0.5f);
  }
}

TEST(rows_that_are_no_candidates_are_not_read) {
  std::mt19937 random(9);
  Logits<BFloat16> logits(2, 2, 300);
  logits.fill(random);
  const bool candidates[] = {true, false, false, true};
  for (int64_t i = 0; i < 300; ++i) logits.set(1, i, NAN);
  const Confidences got = run_confidence(logits, candidates, 9);
  CHECK(got.prediction[1] == -1 && got.confidence[1] == 0.0f);
  CHECK(got.prediction[2] == -1 && got.confidence[2] == 0.0f);
  CHECK(got.prediction[3] == ExactSoftmax(logits, 3).prediction);
}

// ---- entropy -------------------------------------------------------------------------------

// The launches of vocab_statistics.
template <class Format>
std::vector<double> run_statistics(const Logits<Format>& logits, bool with_entropy,
                                   int64_t first_id = 0, const bool* candidates = nullptr) {
  const int64_t cells = logits.batch * logits.length;
  const Workspace workspace(cells, logits.slices());
  if (with_entropy) {
    run_slices<Format, Tempered::kNone, true>(logits, Flagged{candidates}, workspace.view, 2);
  } else {
    run_slices(logits, Flagged{candidates}, workspace.view, 2);
  }
  std::vector<double> statistics(static_cast<size_t>(cells * kStatistics), 77.0);
  const VocabStatisticsParams params{.logits = logits.view(),
                                     .candidates = candidates,
                                     .first_id = first_id,
                                     .with_entropy = with_entropy,
                                     .statistics = statistics.data(),
                                     .workspace = nullptr};
  test::launch<char>((cells + kCellsPerBlock - 1) / kCellsPerBlock, kCellThreads, 2, 1,
                     [&](FibreLane& lane, char*) {
                       statistics_body(lane, params, Flagged{candidates}, workspace.view);
                     });
  return statistics;
}

template <class Format>
void check_entropy(const Logits<Format>& logits, int64_t cell, double entropy) {
  const ExactSoftmax row(logits, cell);
  CHECK(std::abs(entropy - row.entropy) <= row.entropy_error() + kLeastEntropy);
}

TEST(entropies_match_long_double_and_leave_the_rest_as_it_is) {
  std::mt19937 random(14);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    for (int64_t vocab : {int64_t{1}, int64_t{9}, int64_t{8191}, 3 * kSliceColumns<Format> + 5}) {
      Logits<Format> logits(1, 4, vocab, vocab % 2, 3);
      logits.fill(random, 3.0f);
      for (int64_t i = 0; i < vocab; i += 2) logits.set(1, i, -INFINITY);
      logits.set(1, vocab / 2, 0.0f);
      logits.set(2, vocab / 2, 24.0f);
      if (vocab > 9) logits.excluded = 11;
      const std::vector<double> got = run_statistics(logits, true),
                                without = run_statistics(logits, false);
      for (int64_t cell = 0; cell < 4; ++cell) {
        const double* one = got.data() + cell * kStatistics;
        const double* other = without.data() + cell * kStatistics;
        check_entropy(logits, cell, entropy_of(one));
        CHECK(one[kMaximum] == other[kMaximum] && one[kTokenId] == other[kTokenId]);
        CHECK(one[kMass] == other[kMass] && std::isnan(other[kMoment]));
      }
    }
  });
}

TEST(the_entropy_of_one_token_is_0_and_an_invalid_row_has_none) {
  for_each_format([&](auto format) {
    using Format = decltype(format);
    constexpr int64_t vocab = 2 * kSliceColumns<Format>;
    Logits<Format> logits(1, 6, vocab);
    for (int64_t cell = 0; cell < 6; ++cell) {
      for (int64_t i = 0; i < vocab; ++i) logits.set(cell, i, cell < 3 ? -INFINITY : 1.0f);
    }
    logits.set(0, vocab - 1, -2.0f);
    logits.set(2, 5, NAN);
    logits.set(3, 5, NAN);
    logits.set(4, 5, INFINITY);
    const bool candidates[] = {true, true, true, true, true, false};
    const std::vector<double> got = run_statistics(logits, true, 0, candidates);
    CHECK(entropy_of(got.data()) == 0.0);
    for (int64_t cell = 1; cell < 6; ++cell) {
      CHECK(std::isnan(entropy_of(got.data() + cell * kStatistics)));
    }
    CHECK(got[kStatistics + kMoment] == 0.0 && got[5 * kStatistics + kMoment] == 0.0);
    for (int64_t cell : {2, 3, 4}) CHECK(std::isnan(got[cell * kStatistics + kMoment]));
  });
}

TEST(the_entropy_comes_with_a_tempered_mass_too) {
  std::mt19937 random(15);
  Logits<BFloat16> logits(2, 2, 9001);
  logits.fill(random);
  const SamplingOptions sampling{0.7, 0, 1.0, 0.0};
  const SameScale scale{narrow_scale(tempering(sampling))};
  const Workspace both(4, logits.slices(), sampling), mass(4, logits.slices(), sampling),
      moment(4, logits.slices());
  run_slices<BFloat16, Tempered::kMass, true>(logits, Flagged{nullptr}, both.view, 3, scale);
  run_slices<BFloat16, Tempered::kMass>(logits, Flagged{nullptr}, mass.view, 3, scale);
  run_slices<BFloat16, Tempered::kNone, true>(logits, Flagged{nullptr}, moment.view, 3);
  for (int64_t i = 0; i < 4 * logits.slices(); ++i) {
    const auto at = static_cast<size_t>(i);
    CHECK(both.tempered[at] == mass.tempered[at] && both.moment[at] == moment.moment[at]);
    CHECK(both.partial[at].mass == mass.partial[at].mass);
  }
}

TEST(entropies_of_shards_merge) {
  std::mt19937 random(16);
  constexpr int64_t cells = 4, vocab = 900;
  Logits<Float32> logits(1, cells, vocab);
  logits.fill(random);
  for (int64_t i = 0; i < 300; ++i) logits.set(1, i, -INFINITY);  // a part without a maximum
  for (int64_t i = 0; i < vocab; ++i) logits.set(2, i, -INFINITY);
  logits.set(3, 400, NAN);
  const std::vector<double> want = run_statistics(logits, true);
  std::vector<double> parts, merged(cells * kStatistics);
  for (int64_t part = 0; part < 3; ++part) {
    Logits<Float32> shard(1, cells, 300);
    for (int64_t cell = 0; cell < cells; ++cell) {
      for (int64_t i = 0; i < 300; ++i) {
        shard.set(cell, i, static_cast<float>(logits.get(cell, 300 * part + i)));
      }
    }
    const std::vector<double> of_shard = run_statistics(shard, true, 300 * part);
    parts.insert(parts.end(), of_shard.begin(), of_shard.end());
  }
  const MergeStatisticsParams merge{3, cells, parts.data(), merged.data()};
  test::launch<char>(1, kCellThreads, 2, 1,
                     [&](FibreLane& lane, char*) { merge_statistics_body(lane, merge); });
  for (int64_t cell : {0, 1}) {
    const double* one = merged.data() + cell * kStatistics;
    check_entropy(logits, cell, entropy_of(one));
    CHECK(one[kTokenId] == want[static_cast<size_t>(cell * kStatistics + kTokenId)]);
  }
  CHECK(merged[2 * kStatistics + kMoment] == 0.0 && merged[2 * kStatistics + kTokenId] == -1.0);
  CHECK(merged[3 * kStatistics + kTokenId] == -1.0);  // a NaN in one part
  for (int64_t cell : {2, 3}) CHECK(std::isnan(entropy_of(merged.data() + cell * kStatistics)));
}

// ---- a whole step ---------------------------------------------------------------------------

constexpr int64_t kMask = 3;

StepOptions r2_options() {
  StepOptions options{};
  options.mask_id = kMask;
  options.base.threshold = 0.9f;
  options.base.factor = 1.0;
  options.base.error_budget = 0.3;
  options.window = {
      .window = 3, .max_unmasked = 1, .min_confidence = 0.3f, .rounding = Rounding::kNone};
  options.run = {.mode = TokenCluster::kConfidence, .min_run = 2, .min_confidence = 0.3f};
  options.stability = {.steps = 2, .min_confidence = 0.2f, .mode = TemporalEval::kLast};
  options.seed = 5;
  return options;
}

// All that a step reads and writes, beside the logits. The state has a row more than the batch has,
// and holds its rows in reverse.
struct StepMemory {
  std::vector<int64_t> tokens, prediction, streak_id, counters, slots;
  std::vector<float> confidence, entropy, streak_sum, streak_max;
  std::vector<int32_t> streak_count, remaining;
  std::vector<int16_t> step_map;
  std::vector<uint8_t> rule;

  StepMemory(int64_t batch, int64_t length) {
    const auto cells = static_cast<size_t>(batch * length);
    const auto state_cells = static_cast<size_t>((batch + 1) * length);
    tokens.assign(cells, kMask);
    prediction.assign(cells, 55);
    confidence.assign(cells, 55);
    entropy.assign(cells, 55);
    remaining.assign(static_cast<size_t>(batch), 55);
    rule.assign(cells, 55);
    streak_id.assign(state_cells, -1);
    streak_sum.assign(state_cells, 0);
    streak_max.assign(state_cells, 0);
    streak_count.assign(state_cells, 0);
    step_map.assign(state_cells, -1);
    for (int64_t b = 0; b <= batch; ++b) {
      counters.insert(counters.end(), {b, 0, 0, -1, 3 * b});
      if (b > 0) slots.insert(slots.begin(), b);
    }
  }

  DecodeStepParams params(const LogitsView& logits, const StepOptions& options,
                          const SamplingOptions& sampling, const double* statistics = nullptr) {
    return {.logits = logits,
            .statistics = statistics,
            .options = options,
            .sampling = sampling,
            .rows = {},
            .candidates = nullptr,
            .editable = nullptr,
            .proposed = nullptr,
            .tokens = {.data = tokens.data(),
                       .written = tokens.data(),
                       .is_wide = true,
                       .batch_stride = logits.length,
                       .length_stride = 1},
            .state = {.rows = static_cast<int64_t>(slots.size()) + 1,
                      .slots = slots.data(),
                      .streaks = {.count = streak_count.data(),
                                  .id = streak_id.data(),
                                  .sum = streak_sum.data(),
                                  .max = streak_max.data()},
                      .counters = counters.data(),
                      .step_map = step_map.data()},
            .prediction = prediction.data(),
            .confidence = confidence.data(),
            .rule = rule.data(),
            .remaining = remaining.data(),
            .entropy = entropy.data(),
            .workspace = nullptr};
  }

  bool operator==(const StepMemory& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::equal(a.begin(), a.end(), b.begin(),
                        [](float x, float y) { return x == y || (x != x && y != y); });
    };
    return tokens == other.tokens && prediction == other.prediction &&
           streak_id == other.streak_id && counters == other.counters &&
           same(confidence, other.confidence) && same(entropy, other.entropy) &&
           same(streak_sum, other.streak_sum) && same(streak_max, other.streak_max) &&
           streak_count == other.streak_count && step_map == other.step_map &&
           remaining == other.remaining && rule == other.rule;
  }
};

void run_rows(const DecodeStepParams& params, const VocabWorkspace& workspace, const Drawn* drawn,
              unsigned seed) {
  const int64_t length = params.logits.length;
  test::launch<unsigned char>(params.logits.batch, row_block_threads(length), seed,
                              static_cast<size_t>(RowShared(nullptr, length).bytes),
                              [&](FibreLane& lane, unsigned char* shared) {
                                row_body(lane, shared, params, workspace, drawn);
                              });
}

// One step as decode_step.cu launches it; what it drew stays in `workspace`.
template <class Format>
void run_step(const Logits<Format>& logits, const DecodeStepParams& params,
              const Workspace& workspace, unsigned seed) {
  const int64_t cells = logits.batch * logits.length;
  const ReadCells is_read(params);
  const Candidates is_candidate(params);
  const RowSampling sampling = params.row_sampling();
  if (params.may_draw()) {
    run_slices<Format, Tempered::kMass, true>(logits, is_read, workspace.view, seed,
                                              RowScale<RowSampling>{sampling});
  } else {
    run_slices<Format, Tempered::kNone, true>(logits, is_read, workspace.view, seed);
  }
  if (params.may_restrict()) {
    test::launch<CutoffShared>(cells, kCutoffThreads, seed, sizeof(CutoffShared),
                               [&](FibreLane& lane, CutoffShared* shared) {
                                 cutoff_body<Format>(lane, *shared, logits.view(), is_candidate,
                                                     workspace.view, sampling);
                               });
  }
  if (params.may_draw()) {
    test::launch<DrawShared>(cells, kSliceThreads, seed, sizeof(DrawShared),
                             [&](FibreLane& lane, DrawShared* shared) {
                               draw_body<Format>(lane, *shared, logits.view(), is_candidate,
                                                 workspace.view, sampling, workspace.drawn.get());
                             });
  }
  run_rows(params, workspace.view, workspace.drawn.get(), seed);
}

// Logits whose predictions repeat along the row, with all degrees of confidence and a bad cell.
template <class Format>
void fill_block(Logits<Format>& logits, std::mt19937& random) {
  std::uniform_real_distribution<float> spike(0.0f, 12.0f);
  logits.fill(random, 1.0f);
  for (int64_t cell = 0; cell < logits.batch * logits.length; ++cell) {
    logits.set(cell, (cell / 2 * 5) % logits.vocab, spike(random));
    if (cell % 17 == 16) logits.set(cell, 1, NAN);
  }
}

// What the pass says of every cell of `logits`, as statistics.
template <class Format>
std::vector<double> statistics_of(const Logits<Format>& logits, const VocabWorkspace& workspace) {
  const int64_t cells = logits.batch * logits.length;
  std::vector<double> statistics(static_cast<size_t>(cells * kStatistics));
  const VocabStatisticsParams params{.logits = logits.view(),
                                     .candidates = nullptr,
                                     .first_id = 0,
                                     .with_entropy = true,
                                     .statistics = statistics.data(),
                                     .workspace = nullptr};
  test::launch<char>(
      (cells + kCellsPerBlock - 1) / kCellsPerBlock, kCellThreads, 2, 1,
      [&](FibreLane& lane, char*) { statistics_body(lane, params, Flagged{nullptr}, workspace); });
  return statistics;
}

// All launches of a step against the CPU's step from the same statistics.
template <class Format>
void check_steps(int64_t batch, int64_t length, unsigned seed) {
  std::mt19937 random(seed);
  const StepOptions options = r2_options();
  StepMemory got(batch, length), want(batch, length);
  for (unsigned step = 0; step < 3; ++step) {
    Logits<Format> logits(batch, length, 40, step, 3);
    logits.excluded = kMask;
    logits.shift = step == 1;
    fill_block(logits, random);
    const Workspace workspace(batch * length, logits.slices());
    run_step(logits, got.params(logits.view(), options, kGreedy), workspace, seed + step);
    run_slices<Format, Tempered::kNone, true>(logits, Flagged{nullptr}, workspace.view, seed);
    const std::vector<double> statistics = statistics_of(logits, workspace.view);
    cpu::decode_step(want.params(logits.view(), options, kGreedy, statistics.data()));
    CHECK(got == want);
  }
}

TEST(a_step_is_bit_equal_to_the_cpu_after_the_pass) {
  for (int64_t length : {1, 2, 33}) {
    check_steps<BFloat16>(2, length, static_cast<unsigned>(length));
    check_steps<Float32>(1, length, static_cast<unsigned>(length));
  }
}

TEST(proposed_tokens_are_judged_by_their_own_logits) {
  std::mt19937 random(8);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    constexpr int64_t length = 6, vocab = 40;
    Logits<Format> logits(1, length, vocab, 1, 2);
    logits.fill(random, 2.0f);
    logits.set(5, 1, NAN);
    logits.excluded = kMask;
    const int64_t proposed[length] = {5, vocab - 1, kMask, vocab, -1, 5};
    StepOptions options{};
    options.mask_id = kMask;
    options.base.threshold = kNoThreshold;
    StepMemory memory(1, length);
    DecodeStepParams params = memory.params(logits.view(), options, kGreedy);
    params.proposed = proposed;
    run_step(logits, params, Workspace(length, logits.slices()), 3);
    CHECK(memory.prediction == (std::vector<int64_t>{5, vocab - 1, kMask, -1, -1, -1}));
    for (size_t i = 0; i < 2; ++i) {
      const auto cell = static_cast<int64_t>(i);
      const ExactSoftmax top(logits, cell);
      CHECK(close(memory.confidence[i], top, top.max - logits.get(cell, proposed[i])));
    }
    CHECK(memory.confidence[2] == 0.0f);
    for (size_t i = 3; i < 6; ++i) CHECK(std::isnan(memory.confidence[i]));
    CHECK(memory.remaining[0] == length);
  });
}

// From random judgements: the launch after the pass alone, several steps of a block. `change` adds
// to the parameters of a step.
template <class Change>
void check_rules(int64_t batch, int64_t length, const StepOptions& options, unsigned seed,
                 Change change) {
  std::mt19937 random(seed);
  const auto cells = static_cast<size_t>(batch * length);
  const LogitsView shape{nullptr, LogitType::kFloat, batch, length, 0, 0, 0, -1, 0};
  StepMemory got(batch, length), want(batch, length);
  std::vector<double> statistics(cells * kStatistics);
  std::vector<int64_t> ids(cells);
  const double levels[] = {0.05, 0.2, 0.25, 0.3, 0.5, 0.8, 0.9, 0.95, 1.0};
  for (unsigned step = 0; step < 4; ++step) {
    for (size_t i = 0; i < cells; ++i) {
      const double p = levels[random() % 9];
      const bool keeps = step > 0 && random() % 3 != 0;         // its prediction, for the streaks
      if (!keeps) ids[i] = static_cast<int64_t>(random() % 4);  // kMask is among them
      const double mass = random() % 23 == 0 ? NAN : 1.0 / p;
      const double moment = random() % 23 == 0 ? NAN : -mass * levels[random() % 9];
      store_statistics(statistics.data() + i * kStatistics, 1.0, mass, ids[i], moment);
    }
    run_rows(change(got.params(shape, options, kGreedy, statistics.data())), {}, nullptr,
             seed + step);
    cpu::decode_step(change(want.params(shape, options, kGreedy, statistics.data())));
    CHECK(got == want);
  }
}

void check_rules(int64_t batch, int64_t length, const StepOptions& options, unsigned seed) {
  check_rules(batch, length, options, seed, [](const DecodeStepParams& params) { return params; });
}

TEST(the_rules_are_bit_equal_to_the_cpu_for_any_block_length) {
  for (int64_t length : {1, 2, 31, 32, 33, 64, 100, 1000, 1024}) {
    check_rules(2, length, r2_options(), static_cast<unsigned>(length));
  }
}

TEST(the_rules_are_bit_equal_to_the_cpu_in_every_mode) {
  unsigned seed = 0;
  for (int base = 0; base < static_cast<int>(BaseRule::kCount); ++base) {
    for (TokenCluster cluster : {TokenCluster::kOff, TokenCluster::kConfidence, TokenCluster::kMid,
                                 TokenCluster::kRandom}) {
      for (Rounding rounding : {Rounding::kNone, Rounding::kBFloat16}) {
        StepOptions options = r2_options();
        options.base.rule = static_cast<BaseRule>(base);
        options.run.mode = cluster;
        options.rounding = rounding;
        options.base.steps_per_block = 4;
        options.stability.mode = static_cast<TemporalEval>(seed % 3);
        options.window.window = seed % 4;
        options.base.quota = seed % 5;
        options.compare = static_cast<Compare>(seed % 2);
        options.base.last_free = seed % 3 != 0;
        options.mask_prediction = static_cast<MaskPrediction>(seed % 3);
        options.neighbour.radius = seed % 4 == 1 ? 2 : 0;
        check_rules(1, seed % 2 ? 20 : 50, options, seed);
        ++seed;
      }
    }
  }
}

TEST(edits_and_rows_of_their_own_are_bit_equal_to_the_cpu) {
  constexpr int64_t batch = 4, length = 20;
  std::mt19937 random(7);
  const std::unique_ptr<bool[]> editable(new bool[batch * length]);
  for (int64_t i = 0; i < batch * length; ++i) editable[i] = random() % 2 != 0;
  const float threshold[batch] = {0.2f, 0.9f, 1.5f, 0.3f};  // the third is out of range
  const int32_t quota[batch] = {0, 3, 1, 2};
  const double edit_threshold[batch] = {0.25, 0.9, 0.5, 0.0};
  for (int64_t outside : {int64_t{-1}, batch + 1}) {
    const int64_t slots[batch] = {2, 0, 3, outside};
    check_rules(batch, length, r2_options(), 9, [&](DecodeStepParams params) {
      params.editable = editable.get();
      params.rows.threshold = {.data = threshold, .is_double = false};
      params.rows.quota = {.data = quota, .is_wide = false};
      params.rows.edit_threshold = {.data = edit_threshold, .is_double = true};
      params.state.slots = slots;
      return params;
    });
  }
}

TEST(a_row_without_cells) {
  StepMemory memory(1, 0);
  const LogitsView shape{nullptr, LogitType::kFloat, 1, 0, 0, 0, 0, -1, 0};
  run_rows(memory.params(shape, r2_options(), kGreedy), {}, nullptr, 1);
  CHECK(memory.remaining[0] == 0);
  CHECK(memory.counters[kCounters + kStep] == 0);  // of slot 1: it had no candidate
  CHECK(memory.counters[kCounters + kBlockStep] == 1);
}

TEST(a_step_from_statistics_of_shards) {
  std::mt19937 random(12);
  constexpr int64_t batch = 2, length = 20, vocab = 300;
  Logits<Float32> logits(batch, length, vocab);
  fill_block(logits, random);
  logits.excluded = kMask;
  StepMemory got(batch, length), want(batch, length);
  run_step(logits, want.params(logits.view(), r2_options(), kGreedy),
           Workspace(batch * length, logits.slices()), 1);

  const int64_t bounds[] = {0, 100, 101, 300};
  constexpr int64_t parts = 3, cells = batch * length;
  std::vector<double> statistics(parts * cells * kStatistics), merged(cells * kStatistics);
  for (int64_t part = 0; part < parts; ++part) {
    Logits<Float32> shard(batch, length, bounds[part + 1] - bounds[part]);
    for (int64_t cell = 0; cell < cells; ++cell) {
      for (int64_t i = 0; i < shard.vocab; ++i) {
        shard.set(cell, i, static_cast<float>(logits.get(cell, bounds[part] + i)));
      }
    }
    const Workspace workspace(cells, shard.slices());
    run_slices<Float32, Tempered::kNone, true>(shard, Flagged{nullptr}, workspace.view, 2);
    const VocabStatisticsParams params{
        shard.view(), nullptr, bounds[part], true, statistics.data() + part * cells * kStatistics,
        nullptr};
    test::launch<char>((cells + kCellsPerBlock - 1) / kCellsPerBlock, kCellThreads, 2, 1,
                       [&](FibreLane& lane, char*) {
                         statistics_body(lane, params, Flagged{nullptr}, workspace.view);
                       });
  }
  const MergeStatisticsParams merge{parts, cells, statistics.data(), merged.data()};
  test::launch<char>(1, kCellThreads, 2, 1,
                     [&](FibreLane& lane, char*) { merge_statistics_body(lane, merge); });
  run_rows(got.params(logits.view(), r2_options(), kGreedy, merged.data()), {}, nullptr, 2);
  CHECK(got.tokens == want.tokens);
  CHECK(got.rule == want.rule);
  for (size_t i = 0; i < cells; ++i) {
    CHECK(close(got.confidence[i], ExactSoftmax(logits, static_cast<int64_t>(i))));
  }
}

// ---- drawing -------------------------------------------------------------------------------

// The distribution in long double.
struct ExactDraw {
  int64_t id = -1;                    // where `u` falls
  long double margin = 1.0;           // from the nearest border
  std::vector<long double> tempered;  // of every column
  long double error;  // relative, of a mass; a border is off by twice as much of the whole
};

template <class Format>
ExactDraw exact_draw(const Logits<Format>& logits, int64_t cell, const SamplingOptions& sampling,
                     double u) {
  const long double max = ExactSoftmax(logits, cell).max;
  std::vector<double> sorted;
  for (int64_t i = 0; i < logits.vocab; ++i) sorted.push_back(logits.get(cell, i));
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto mass = [&](double z) {
    return std::exp((static_cast<long double>(z) - max) / sampling.temperature);
  };
  double lowest = -FLT_MAX;
  if (sampling.top_k > 0 && sampling.top_k < logits.vocab) {
    lowest = std::max(lowest, sorted[static_cast<size_t>(sampling.top_k - 1)]);
  }
  long double total = 0.0, kept = 0.0;
  for (double z : sorted) total += z >= lowest ? mass(z) : 0.0L;
  if (sampling.top_p < 1.0) {
    for (double z : sorted) {
      kept += mass(z);
      if (kept >= sampling.top_p * total) {
        lowest = std::max(lowest, z);
        break;
      }
    }
  }
  if (sampling.min_p > 0.0) {
    lowest = std::max(lowest,
                      static_cast<double>(max) + std::log(sampling.min_p) * sampling.temperature);
  }
  total = 0.0;
  for (double z : sorted) total += z >= lowest ? mass(z) : 0.0L;
  ExactDraw draw;
  long double before = 0.0, mean = 0.0;
  for (int64_t i = 0; i < logits.vocab; ++i) {
    const double z = logits.get(cell, i);
    draw.tempered.push_back(z >= lowest ? mass(z) / total : 0.0L);
    if (!(z >= lowest)) continue;
    before += mass(z);
    if (mass(z) > 0) mean += mass(z) / total * ((max - z) / sampling.temperature);
    draw.margin = std::min(draw.margin, std::abs(before / total - u));
    if (draw.id < 0 && before > u * total) draw.id = i;
  }
  draw.error = (kTermError + kSumError + 3 * mean) * kPlace;
  return draw;
}

template <class Format>
void check_draws(const SamplingOptions& sampling, int64_t vocab, float spread, unsigned seed,
                 int64_t batch = 2, int64_t length = 2) {
  std::mt19937 random(seed);
  Logits<Format> logits(batch, length, vocab, seed % 2);
  logits.fill(random, spread);
  logits.excluded = kMask;
  StepOptions options = r2_options();
  options.window.window = options.stability.steps = 0;
  options.run.mode = TokenCluster::kOff;
  options.base.threshold = 0.0f;
  options.seed = seed;
  StepMemory memory(batch, length);
  const auto row_of = [&](int64_t b) { return memory.slots[static_cast<size_t>(b)]; };
  for (int64_t b = 0; b < batch; ++b) memory.counters[row_of(b) * kCounters + kStep] = 9;
  const Workspace workspace(batch * length, logits.slices(), sampling);
  run_step(logits, memory.params(logits.view(), options, sampling), workspace, seed);
  for (int64_t cell = 0; cell < batch * length; ++cell) {
    const double u = uniform(seed + 3 * row_of(cell / length), row_of(cell / length), 9,
                             cell % length, Draw::kToken);
    const ExactDraw want = exact_draw(logits, cell, sampling, u);
    const int64_t got = memory.tokens[static_cast<size_t>(cell)];
    CHECK(got == want.id || want.margin < 2 * want.error);
    const long double tempered = want.tempered[static_cast<size_t>(got)];
    CHECK(tempered > 0);
    CHECK(std::abs(workspace.drawn[static_cast<size_t>(cell)].tempered - tempered) <=
          (want.error + kPlace) * tempered);
    const ExactSoftmax top(logits, cell);
    CHECK(
        close(memory.confidence[static_cast<size_t>(cell)], top, top.max - logits.get(cell, got)));
  }
}

TEST(a_token_is_drawn_by_the_inverse_of_the_distribution) {
  unsigned seed = 20;
  for (double temperature : {0.3, 1.0, 2.5, 1e-9}) {
    for (int64_t vocab : {5, 300, 9001, 30000}) {
      check_draws<BFloat16>({temperature, 0, 1.0, 0.0}, vocab, 2.0f, ++seed);
      if (vocab < 9001) check_draws<Float32>({temperature, 0, 1.0, 0.0}, vocab, 2.0f, ++seed);
    }
  }
}

TEST(more_slices_than_a_warp_has_lanes) {
  check_draws<Float32>({1.0, 0, 1.0, 0.0}, 40 * kSliceColumns<Float32> + 17, 0.5f, 3);
}

TEST(top_k_and_top_p_keep_what_sorting_keeps) {
  unsigned seed = 60;  // one cell each: these are blocks of 1024 fibres
  for (int64_t top_k : {0, 1, 5, 5000}) {
    for (double top_p : {0.05, 0.9, 1.0}) {
      if (top_k == 0 && top_p == 1.0) continue;
      check_draws<BFloat16>({0.8, top_k, top_p, 0.0}, 500, 2.0f, ++seed, 1, 1);
    }
  }
  check_draws<cuda::Half>({0.8, 20, 0.9, 0.0}, 9000, 2.0f, ++seed, 1, 2);
  check_draws<Float32>({1.5, 3, 0.7, 0.0}, 5000, 2.0f, ++seed, 2, 1);
}

TEST(min_p_keeps_what_the_argmax_does_not_dwarf) {
  unsigned seed = 80;
  for (double min_p : {1e-3, 0.2, 1.0}) {
    check_draws<BFloat16>({0.8, 0, 1.0, min_p}, 500, 2.0f, ++seed, 1, 1);
    check_draws<Float32>({2.5, 40, 0.9, min_p}, 500, 2.0f, ++seed, 1, 1);
  }
}

// Fault 11: a scale narrowed to a subnormal float32, or to 0, makes NaN of -inf.
TEST(every_finite_temperature_draws_from_that_temperature) {
  unsigned seed = 90;
  for (double temperature : {5e-324, 1e-300, 1e-20, 1e20, 4e36, 5e36, 1e38, 1e39, 1e60, 1e300}) {
    check_draws<BFloat16>({temperature, 0, 1.0, 0.0}, 300, 3.0f, ++seed);
    check_draws<Float32>({temperature, 0, 1.0, 0.0}, 300, 3.0f, ++seed);
    if (temperature > 1.0)
      check_draws<Float32>({temperature, 30, 0.51, 0.0}, 300, 3.0f, ++seed, 1, 1);
  }
}

// Row by row: what a RowOptions says of row b.
struct OptionsOfRows {
  const SamplingOptions* options;
  const uint64_t* seeds;

  SamplingOptions operator()(int64_t row) const { return options[row]; }
  double uniform(int64_t row, int64_t position) const {
    return r2dllm::uniform(seeds[row], row, 9, position, Draw::kToken);
  }
};

TEST(rows_with_options_of_their_own_draw_as_if_alone) {
  std::mt19937 random(31);
  constexpr int64_t batch = 5, length = 2;
  Logits<Float32> logits(batch, length, 700, 1, 2);
  logits.fill(random, 2.0f);
  logits.excluded = kMask;
  const SamplingOptions options[batch] = {{0.25, 0, 1.0, 0.0},
                                          {0.0, 0, 1.0, 0.0},
                                          {2.0, 7, 0.8, 0.0},
                                          {0.5, 0, 1.0, 0.05},
                                          {1e39, 0, 1.0, 0.0}};
  const uint64_t seeds[batch] = {4, 5, 6, 7, 8};
  const auto draw = [&](const VocabWorkspace& view, const auto& scale_of, const auto& row_options,
                        Drawn* drawn) {
    run_slices<Float32, Tempered::kMass>(logits, Flagged{nullptr}, view, 1, scale_of);
    if (view.cutoff != nullptr) {
      test::launch<CutoffShared>(batch * length, kCutoffThreads, 1, sizeof(CutoffShared),
                                 [&](FibreLane& lane, CutoffShared* shared) {
                                   cutoff_body<Float32>(lane, *shared, logits.view(),
                                                        Flagged{nullptr}, view, row_options);
                                 });
    }
    test::launch<DrawShared>(batch * length, kSliceThreads, 1, sizeof(DrawShared),
                             [&](FibreLane& lane, DrawShared* shared) {
                               draw_body<Float32>(lane, *shared, logits.view(), Flagged{nullptr},
                                                  view, row_options, drawn);
                             });
  };
  const Workspace all(batch * length, logits.slices(), options[2]);  // which restricts
  const OptionsOfRows of_rows{options, seeds};
  draw(all.view, RowScale<OptionsOfRows>{of_rows}, of_rows, all.drawn.get());
  for (int64_t b = 0; b < batch; ++b) {
    const Drawn* got = all.drawn.get() + b * length;
    if (options[b].temperature == 0.0) {
      CHECK(got[0].id == -1 && got[1].id == -1);
      continue;
    }
    std::vector<int64_t> counters;
    for (int64_t i = 0; i < batch; ++i) counters.insert(counters.end(), {i, 9, 0, -1, 0});
    StateView state;
    state.rows = batch;
    state.counters = counters.data();
    const RowSampling same{options[b], {}, seeds[b], state};
    CHECK(same.uniform(b, 1) == of_rows.uniform(b, 1));
    const Workspace alone(batch * length, logits.slices(), options[b]);
    draw(alone.view, RowScale<RowSampling>{same}, same, alone.drawn.get());
    for (int64_t l = 0; l < length; ++l) {
      const Drawn& want = alone.drawn[static_cast<size_t>(b * length + l)];
      CHECK(got[l].id == want.id && want.id >= 0);
      CHECK(got[l].confidence == want.confidence && got[l].tempered == want.tempered);
      // One slice: what it weighs is what the draw's borders hang on.
      const auto cell = static_cast<size_t>(b * length + l);
      CHECK(all.tempered[cell] == alone.tempered[cell]);
    }
  }
}

// ---- the rules alone -----------------------------------------------------------------------

TEST(the_rules_alone_agree_with_a_loop) {
  std::mt19937 random(30);
  std::uniform_real_distribution<float> uniform01(0.0f, 1.0f);
  for (int64_t length : {1, 5, 32, 70}) {
    constexpr int64_t batch = 2;
    const auto cells = static_cast<size_t>(batch * length);
    std::vector<float> confidence(cells);
    std::vector<int64_t> prediction(cells), rows{4, 9};
    const std::unique_ptr<bool[]> masked(new bool[cells]), marked(new bool[cells]),
        chosen(new bool[cells]);
    for (size_t i = 0; i < cells; ++i) {
      confidence[i] = uniform01(random);
      prediction[i] = static_cast<int64_t>(3 * uniform01(random));
      masked[i] = uniform01(random) < 0.7f;
    }
    const WindowOptions window{
        .window = 3, .max_unmasked = 1, .min_confidence = 0.5f, .rounding = Rounding::kNone};
    const RunOptions run{.mode = TokenCluster::kRandom, .min_run = 2, .min_confidence = 0.5f};
    const WindowPoolParams pool{.batch = batch,
                                .length = length,
                                .confidence = confidence.data(),
                                .is_masked = masked.get(),
                                .options = window,
                                .marked = marked.get()};
    test::launch<uint8_t>(
        batch, row_threads(length), 1, static_cast<size_t>(length),
        [&](FibreLane& lane, uint8_t* shared) { window_pool_body(lane, shared, pool); });
    const PositionalAmbiguityParams ambiguity{.batch = batch,
                                              .length = length,
                                              .prediction = prediction.data(),
                                              .confidence = confidence.data(),
                                              .is_masked = masked.get(),
                                              .options = run,
                                              .seed = 7,
                                              .row = rows.data(),
                                              .step = 3,
                                              .chosen = chosen.get()};
    test::launch<char>(batch, row_threads(length), 1, 1,
                       [&](FibreLane& lane, char*) { positional_ambiguity_body(lane, ambiguity); });
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t first = b * length;
      std::vector<bool> want_chosen(static_cast<size_t>(length));
      const bool* is_masked = masked.get() + first;
      const float* p = confidence.data() + first;
      const RunCells run_cells{.length = length,
                               .masked = is_masked,
                               .prediction = prediction.data() + first,
                               .confidence = p};
      for (int64_t i = 0; i < length; ++i) {
        bool inside = false;
        for (int64_t start = std::max<int64_t>(0, i - 2); start <= std::min(i, length - 3);
             ++start) {
          inside |= window_passes(start, window, is_masked, p);
        }
        CHECK(marked[static_cast<size_t>(first + i)] == (inside && is_masked[i]));
        if (!run_cells.begins(i)) continue;
        const int64_t cell = chosen_cell(run_cells, i, run, [&] {
          return uniform(7, rows[static_cast<size_t>(b)], 3, i, Draw::kRun);
        });
        if (cell >= 0) want_chosen[static_cast<size_t>(cell)] = true;
      }
      for (int64_t i = 0; i < length; ++i) {
        CHECK(chosen[static_cast<size_t>(first + i)] == want_chosen[static_cast<size_t>(i)]);
      }
    }
  }
}

}  // namespace

int main() { return test::run_all(); }

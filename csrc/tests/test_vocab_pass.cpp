// SPDX-License-Identifier: Apache-2.0
// What the CPU back end asks of whole rows, which are several slices long: entropies and draws,
// against long double and sorting.
#include <algorithm>
#include <cfloat>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "../cpu/sampling.h"
#include "../cpu/vocab_pass.h"
#include "check.h"
#include "entropy_bound.h"

using namespace r2dllm;
using namespace r2dllm::cpu;

namespace {

using Row = std::vector<double>;

// One sequence of `rows.size()` cells, in the precision of `type`.
struct Block {
  std::vector<Row> rows;  // as stored
  std::vector<char> bytes;
  LogitsView view;
  std::unique_ptr<bool[]> all;

  Block(std::vector<Row> values, LogitType type, int64_t excluded = -1) : rows(std::move(values)) {
    const auto cells = static_cast<int64_t>(rows.size());
    const auto vocab = static_cast<int64_t>(rows[0].size());
    const VocabKernels& kernels = vocab_kernels(type);
    bytes.resize(static_cast<size_t>(cells * vocab * kLogitBytes[static_cast<int>(type)]));
    all.reset(new bool[static_cast<size_t>(cells)]);
    for (int64_t cell = 0; cell < cells; ++cell) {
      all[static_cast<size_t>(cell)] = true;
      for (int64_t i = 0; i < vocab; ++i) {
        double& z = rows[static_cast<size_t>(cell)][static_cast<size_t>(i)];
        kernels.store(bytes.data(), cell * vocab + i, z);
        z = i == excluded ? -INFINITY : kernels.load(bytes.data(), cell * vocab + i);
      }
    }
    view = {bytes.data(), type, 1, cells, vocab, cells * vocab, vocab, excluded, 0};
  }

  VocabPass pass(bool with_entropy) const { return {view, all.get(), 0.0, with_entropy}; }
};

Row random_row(std::mt19937& random, int64_t vocab, double spread) {
  std::normal_distribution<double> normal(0.0, spread);
  Row row;
  for (int64_t i = 0; i < vocab; ++i) row.push_back(normal(random));
  return row;
}

const LogitType kTypes[] = {LogitType::kFloat, LogitType::kBFloat16, LogitType::kHalf,
                            LogitType::kDouble};

// ---- entropy -------------------------------------------------------------------------------

TEST(an_excluded_column_has_no_probability) {
  for (LogitType type : kTypes) {
    const Block block({{1.0, 30.0, 2.0}, {1.0, -3.0, 1.0}}, type, 1);
    const VocabPass pass = block.pass(false);
    for (int64_t i = 0; i < 2; ++i) {
      CHECK(pass.probability(i, 1) == 0.0f && pass.token_stats(i, 1).max == -INFINITY);
    }
    CHECK(pass.probability(1, 0) == 0.5f && pass.argmax(0) == 2);
  }
}

TEST(entropies_of_long_rows_are_within_the_documented_bound) {
  std::mt19937 random(1);
  for (LogitType type : kTypes) {
    for (int64_t vocab : {1, 7, 4096, 4097, 30001}) {
      std::vector<Row> rows;
      for (double spread : {0.01, 1.0, 4.0, 12.0})
        rows.push_back(random_row(random, vocab, spread));
      for (float spike : {12.0f, 20.0f, 35.0f}) {
        rows.push_back(random_row(random, vocab, 1.0));
        rows.back()[static_cast<size_t>(vocab / 2)] = spike;
      }
      const Block block(rows, type, vocab > 7 ? 5 : -1);
      const VocabPass pass = block.pass(true), without = block.pass(false);
      for (int64_t i = 0; i < pass.cells(); ++i) {
        const test::ExactEntropy want(block.rows[static_cast<size_t>(i)]);
        CHECK(std::abs(pass.entropy(i) - want.nats) <= want.bound());
        CHECK(pass.stats(i).sum == without.stats(i).sum && pass.argmax(i) == without.argmax(i));
      }
    }
  }
}

TEST(the_entropy_of_a_level_row_is_the_log_of_its_size) {
  for (LogitType type : kTypes) {
    Row row(9000, -2.5);
    std::fill(row.begin() + 1000, row.begin() + 2000, -INFINITY);
    const Block block({row}, type);
    CHECK(std::abs(block.pass(true).entropy(0) - std::log(8000.0)) <=
          test::ExactEntropy(block.rows[0]).bound());
  }
}

TEST(a_row_of_one_token_has_entropy_0_and_an_invalid_row_none) {
  for (LogitType type : kTypes) {
    Row one(9000, -INFINITY), nothing = one,
                              nan = random_row(*std::make_unique<std::mt19937>(4), 9000, 1.0),
                              infinite = nan;
    one[8000] = -3.0;
    nan[5000] = NAN;
    infinite[1] = INFINITY;
    const Block block({one, nothing, nan, infinite}, type);
    const VocabPass pass = block.pass(true);
    CHECK(pass.entropy(0) == 0.0);
    for (int64_t i : {1, 2, 3}) CHECK(std::isnan(pass.entropy(i)));
    CHECK(pass.moment(1) == 0.0 && std::isnan(pass.moment(2)) && std::isnan(pass.moment(3)));
  }
}

TEST(logits_that_leave_float32_keep_their_entropy) {
  std::mt19937 random(5);
  for (double offset : {1e5, -1e5, 22700.0, -22800.0}) {
    Row row = random_row(random, 9000, 2.0);
    for (double& z : row) z += offset;
    row[17] = -INFINITY;
    const Block block({row}, LogitType::kFloat);
    const test::ExactEntropy want(block.rows[0]);
    CHECK(std::abs(block.pass(true).entropy(0) - want.nats) <= want.bound());
  }
}

// ---- draws ---------------------------------------------------------------------------------

struct Distribution {
  double max, lowest = -DBL_MAX;
  std::vector<long double> mass;  // of what is kept
  long double total = 0;

  // By sorting.
  Distribution(const Row& row, const SamplingOptions& options) {
    Row sorted = row;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    max = sorted[0];
    const auto term = [&](double z) {
      return z == -INFINITY ? 0.0L
                            : std::exp((static_cast<long double>(z) - max) / options.temperature);
    };
    if (options.top_k > 0 && options.top_k < static_cast<int64_t>(row.size())) {
      lowest = std::max(lowest, sorted[static_cast<size_t>(options.top_k - 1)]);
    }
    if (options.top_p < 1.0) {
      long double all = 0, kept = 0;
      for (double z : sorted) all += z >= lowest ? term(z) : 0.0L;
      for (double z : sorted) {
        kept += term(z);
        if (kept < options.top_p * all) continue;
        lowest = std::max(lowest, z);
        break;
      }
    }
    if (options.min_p > 0.0) {
      lowest = std::max(lowest, max + std::log(options.min_p) * options.temperature);
    }
    for (double z : row) mass.push_back(z >= lowest ? term(z) : 0.0L);
    for (long double m : mass) total += m;
  }
};

// Relative, of a tempered mass (vocab_kernels.h); one more: an exponent that is rounded to float32.
constexpr double kMassError = (cpu::kTermError + cpu::kSumError + 1) * 0x1p-24;

void check_draws(const Block& block, const SamplingOptions& options) {
  const VocabPass pass = block.pass(false);
  for (int64_t i = 0; i < pass.cells(); ++i) {
    const Distribution want(block.rows[static_cast<size_t>(i)], options);
    for (double uniform : {0.0, 0.1, 0.37, 0.5, 0.77, 0.93, 1 - 0x1p-53}) {
      const DrawnToken got = draw_token(pass, i, options, uniform);
      const auto column = static_cast<size_t>(got.column);
      long double before = 0;
      for (size_t c = 0; c < column; ++c) before += want.mass[c];
      const long double p = want.mass[column] / want.total, from = before / want.total;
      // A border is off by what the sum up to it and the whole sum are.
      constexpr double kBorder = 2 * kMassError;
      CHECK(p > 0);
      CHECK(uniform > from - kBorder && uniform < from + p + kBorder);
      CHECK(std::abs(got.tempered - p) <= (kMassError + 0x1p-24) * p);
    }
  }
}

TEST(draws_follow_the_distribution_that_sorting_gives) {
  std::mt19937 random(7);
  for (LogitType type : kTypes) {
    Row ties(5000, -1.0);
    for (size_t i : {3, 4200, 4999}) ties[i] = 2.0;
    const Block block({random_row(random, 5000, 2.0), ties}, type, 11);
    for (double temperature : {0.3, 1.0, 7.0}) {
      for (int64_t top_k : {0, 2, 40}) {
        for (double top_p : {0.5, 1.0}) {
          for (double min_p : {0.0, 0.02, 0.6, 1.0}) {
            check_draws(block, {temperature, top_k, top_p, min_p});
          }
        }
      }
    }
  }
}

// Fault 11: above 4e36 the scale and what it divides left float32, and the last column won.
TEST(every_finite_temperature_draws_from_that_temperature) {
  std::mt19937 random(8);
  for (LogitType type : kTypes) {
    Row row = random_row(random, 5000, 3.0), wide = row;
    for (size_t i = 0; i < row.size(); i += 7) row[i] = -INFINITY;
    if (type == LogitType::kFloat) {
      for (double& z : wide) z *= 1e37;
    }
    const Block block({row, wide}, type);
    for (double temperature : {5e-324, 1e-300, 1e-36, 1e-20, 1e20, 3e35, 4e36, 5e36, 1e38, 3e38,
                               1e39, 1e45, 1e60, 1e300, DBL_MAX}) {
      check_draws(block, {temperature, 0, 1.0, 0.0});
      if (temperature > 1.0) check_draws(block, {temperature, 100, 0.5, 0.0});
    }
  }
}

// The least logit that min-p keeps is no float32: which of its neighbours is kept must not hang on
// how it is rounded.
TEST(min_p_is_decided_in_double) {
  const float above = std::nextafterf(-1.0f, 0.0f), below = std::nextafterf(-1.0f, -2.0f);
  const Row row{0.0, above, -1.0, below, -1.5};
  for (double cutoff : {-1.0 + 1e-9, -1.0, -1.0 - 1e-9}) {
    const Block block({row}, LogitType::kFloat);
    const SamplingOptions options{1.0, 0, 1.0, std::exp(cutoff)};
    const double least = min_p_cutoff(0.0, options);
    int64_t kept = 0;
    for (double z : row) kept += z >= least;
    CHECK(kept == (cutoff > -1.0 + 1e-10 ? 2 : cutoff < -1.0 - 1e-10 ? 3 : kept));
    const DrawnToken last = draw_token(block.pass(false), 0, options, 1 - 0x1p-53);
    CHECK(last.column == kept - 1);
    double mass = 0;
    for (int64_t i = 0; i < kept; ++i) mass += std::exp(row[static_cast<size_t>(i)]);
    CHECK(std::abs(last.tempered * mass / std::exp(row[static_cast<size_t>(kept - 1)]) - 1) <
          kMassError + 0x1p-24);
  }
}

}  // namespace

int main() { return test::run_all(); }

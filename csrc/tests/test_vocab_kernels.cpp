// SPDX-License-Identifier: Apache-2.0
// The pass over a slice, on every instruction set that this machine runs, against long double.
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/vocab_kernels.h"
#include "../rules/vocab_statistics.h"
#include "check.h"
#include "entropy_bound.h"

using namespace r2dllm;
using namespace r2dllm::cpu;

namespace {

std::vector<InstructionSet> sets() {
  std::vector<InstructionSet> all;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.is_supported()) all.push_back(set);
  }
  return all;
}

constexpr double kU = 0x1p-24;

// vocab_kernels.h; `rest` = 1 - p, or 1 where the sum is not corrected.
double probability_error(double rest, double p, double vocab) {
  const double below = std::log1p(p * vocab / std::max(1 - p, 1e-9));
  return (rest * (2 * kTermError + kSumError + kLog2eError * below) + 1) * kU;
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// A heap block of exactly n elements: reading past either end is an error under AddressSanitizer.
struct Row {
  LogitType type;
  std::vector<double> exact;
  std::unique_ptr<char[]> data;
  const VocabKernels* kernels;

  Row(LogitType type, const std::vector<float>& values, const VocabKernels* all)
      : type(type), kernels(all + static_cast<int>(type)) {
    const int64_t bytes = kLogitBytes[static_cast<int>(type)];
    data.reset(new char[values.size() * bytes]);
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t sixteen = to_bfloat16(values[i]);
      if (type == LogitType::kFloat) {
        std::memcpy(data.get() + i * 4, &values[i], 4);
      } else {
        std::memcpy(data.get() + i * 2, &sixteen, 2);
      }
      exact.push_back(kernels->load(data.get(), static_cast<int64_t>(i)));
    }
  }

  OnlineSoftmax stats() const { return kernels->stats(data.get(), size()); }
  int64_t size() const { return static_cast<int64_t>(exact.size()); }
};

const LogitType kTypes[] = {LogitType::kFloat, LogitType::kBFloat16, LogitType::kHalf};

template <class F>
void for_each_row(const std::vector<float>& values, F f) {
  for (const InstructionSet& set : sets()) {
    for (LogitType type : kTypes) f(Row(type, values, set.kernels));
  }
}

TEST(the_best_set_is_chosen_and_one_that_is_not_there_is_refused) {
  CHECK(choose_kernels(nullptr) == sets().front().kernels);
  CHECK(choose_kernels("") == sets().front().kernels);
  CHECK(choose_kernels(" \t") == sets().front().kernels);
  for (const InstructionSet& set : instruction_sets()) {
    for (const char* name : {set.name, "sse"}) {
      bool refused = false;
      try {
        CHECK(choose_kernels(name)->instruction_set == std::string(set.name));
      } catch (const std::invalid_argument& error) {
        refused = std::strstr(error.what(), "R2DLLM_CPU") != nullptr;
      }
      CHECK(refused == !(set.is_supported() && name == set.name));
    }
  }
}

// The polynomial, its table and the reduction of the argument, without any sum around them.
TEST(a_term_is_as_exact_as_documented) {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> uniform(-60.0f, 60.0f);
  for (const InstructionSet& set : sets()) {
    double worst = 0;
    for (int trial = 0; trial < 400000; ++trial) {
      const float z = uniform(random);
      const OnlineSoftmax term = set.kernels->stats(&z, 1);
      const long double exact = exp2l(static_cast<long double>(z) * 1.4426950408889634074L -
                                      static_cast<long double>(term.exponent));
      worst = std::max(worst, std::abs(static_cast<double>(term.sum / exact - 1)));
    }
    CHECK(worst < kTermError * kU);
    CHECK(worst > 1.5 * kU);  // a bound that is out of reach would hold nothing
  }
}

// Against the kernel's own terms: what is left are the roundings of the sum, and no term is lost.
TEST(a_sum_is_as_exact_as_documented) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-3.0f, 3.0f);
  for (int64_t n : {5, 64, 511, 512, 513, 4096}) {
    std::vector<float> values;
    for (int64_t i = 0; i < n; ++i) values.push_back(uniform(random));
    for (const InstructionSet& set : sets()) {
      const OnlineSoftmax stats = set.kernels->stats(values.data(), n);
      long double sum = 0;
      for (const float& z : values) {
        const OnlineSoftmax term = set.kernels->stats(&z, 1);
        sum += std::ldexp(static_cast<long double>(term.sum),
                          static_cast<int>(term.exponent - stats.exponent));
      }
      // One more rounding of a term where fraction * power is no power of 2, and kLog2e over 6
      // nats.
      CHECK(std::abs(stats.sum / sum - 1) < (kSumError + 1 + 6 * kLog2eError) * kU);
    }
  }
}

TEST(statistics_match_long_double) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0.0f, 4.0f);
  for (int64_t n : {1, 2, 7, 63, 64, 65, 127, 1000, 4095, 4096}) {
    std::vector<float> values;
    for (int64_t i = 0; i < n; ++i) values.push_back(normal(random));
    for_each_row(values, [&](const Row& row) {
      if (row.type == LogitType::kHalf) {
        // The bits of a bfloat16, read as a half, may be NaN or huge: only finite rows count.
        for (double x : row.exact) {
          if (!(std::abs(x) < 1e4)) return;
        }
      }
      const OnlineSoftmax stats = row.stats();
      const double max = *std::max_element(row.exact.begin(), row.exact.end());
      long double sum = 0;
      for (double x : row.exact) {
        sum += std::exp2((static_cast<long double>(x)) * kLog2eWide - stats.exponent);
      }
      CHECK(stats.max == max);
      const double below = std::log(static_cast<double>(n));
      CHECK(std::abs(stats.sum / sum - 1) < (kTermError + kSumError + kLog2eError * below) * kU);
      const OnlineSoftmax token =
          row.kernels->stats(row.data.get() + row.kernels->find(row.data.get(), row.size(), max) *
                                                  kLogitBytes[static_cast<int>(row.type)],
                             1);
      long double shifted = 0;
      for (double x : row.exact) shifted += std::exp(static_cast<long double>(x) - max);
      const double p = static_cast<double>(1 / shifted);
      CHECK(std::abs(probability(token, stats) * shifted - 1) < probability_error(1, p, n));
    });
  }
}

TEST(a_term_that_is_most_of_the_row_costs_one_rounding) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  for (int trial = 0; trial < 40; ++trial) {
    std::vector<float> values;
    for (int i = 0; i < 4000; ++i) values.push_back(normal(random));
    const int64_t top = 97 * trial;
    values[static_cast<size_t>(top)] = 13.0f + 0.05f * static_cast<float>(trial);
    for (const InstructionSet& set : sets()) {
      for (LogitType type : {LogitType::kFloat, LogitType::kBFloat16}) {
        const Row row(type, values, set.kernels);
        const char* token = row.data.get() + top * kLogitBytes[static_cast<int>(type)];
        OnlineSoftmax stats = row.stats();
        stats.sum += row.kernels->correction(row.data.get(), row.size(), top, stats);
        long double sum = 0;
        for (double x : row.exact) sum += std::exp(static_cast<long double>(x) - stats.max);
        const long double error = probability(row.kernels->stats(token, 1), stats) - 1 / sum;
        const double p = static_cast<double>(1 / sum);
        CHECK(std::abs(error) < probability_error(1 - p, p, 4000) * p);
      }
    }
  }
}

TEST(a_logit_alone_has_the_term_that_it_has_in_a_sum) {
  for (float z = -3e4f; z < 3e4f; z += 1.37f) {
    for (const InstructionSet& set : sets()) {
      for (LogitType type : {LogitType::kFloat, LogitType::kBFloat16}) {
        const Row row(type, {z / 300.0f, -INFINITY}, set.kernels);
        const OnlineSoftmax alone = row.kernels->stats(row.data.get(), 1), pair = row.stats();
        CHECK(alone.max == pair.max && alone.exponent == pair.exponent && alone.sum == pair.sum);
      }
    }
  }
}

TEST(ties_in_one_lane_are_exact) {
  for (float top : {-7.25f, 0.3f, 1e4f}) {
    for (int64_t n : {2, 4}) {
      std::vector<float> values(600, top - 1e4f);
      for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(64 * i)] = top;
      for (const InstructionSet& set : sets()) {
        const Row row(LogitType::kFloat, values, set.kernels);
        const OnlineSoftmax token = row.kernels->stats(row.data.get(), 1);
        CHECK(probability(token, row.stats()) == 1.0f / static_cast<float>(n));
      }
    }
  }
}

TEST(ties_are_exact_and_the_lowest_index_is_found) {
  for (float top : {0.0f, 3.7f, -250.0f, 1000.0f}) {
    std::vector<float> values(300, top - 1e4f);
    for (size_t i : {70, 71, 200, 299}) values[i] = top;
    for (const InstructionSet& set : sets()) {
      const Row row(LogitType::kFloat, values, set.kernels);
      const OnlineSoftmax stats = row.stats();
      CHECK(row.kernels->find(row.data.get(), 300, stats.max) == 70);
      CHECK(probability(row.kernels->stats(row.data.get() + 70 * 4, 1), stats) == 0.25f);
    }
  }
}

TEST(rows_without_a_prediction) {
  for (int64_t n : {1, 64, 100}) {
    for (int64_t at : {int64_t{0}, n / 2, n - 1}) {
      for (float rest : {0.0f, -3.0f, -INFINITY}) {
        for (const InstructionSet& set : sets()) {
          for (LogitType type : {LogitType::kFloat, LogitType::kBFloat16}) {
            std::vector<float> values(static_cast<size_t>(n), rest);
            if (rest == -INFINITY) CHECK(!is_valid(Row(type, values, set.kernels).stats()));
            for (float bad : {NAN, -NAN, INFINITY}) {
              values[static_cast<size_t>(at)] = bad;
              CHECK(!is_valid(Row(type, values, set.kernels).stats()));
            }
          }
        }
      }
    }
  }
}

TEST(a_nan_with_any_payload_is_noticed) {
  for (uint32_t bits : {0x7FC00000u, 0x7F800001u, 0x7FFFFFFFu, 0xFFFFFFFFu, 0xFF800001u}) {
    float nan;
    std::memcpy(&nan, &bits, sizeof nan);
    for (const InstructionSet& set : sets()) {
      std::vector<float> values(130, 1.0f);
      std::unique_ptr<char[]> data(new char[130 * 4]);
      std::memcpy(data.get(), values.data(), 130 * 4);
      std::memcpy(data.get() + 65 * 4, &nan, 4);
      CHECK(!is_valid(set.kernels->stats(data.get(), 130)));
    }
  }
}

TEST(minus_infinity_counts_as_nothing) {
  std::vector<float> values(200, -INFINITY);
  values[130] = -5.0f;
  for (const InstructionSet& set : sets()) {
    const Row row(LogitType::kFloat, values, set.kernels);
    const OnlineSoftmax stats = row.stats();
    CHECK(is_valid(stats));
    CHECK(probability(row.kernels->stats(row.data.get() + 130 * 4, 1), stats) == 1.0f);
  }
}

TEST(differences_of_large_logits_are_kept_on_both_sides_of_the_narrow_limit) {
  for (float top : {1e5f, -1e5f, 22700.0f, -22700.0f, 22800.0f, -22800.0f}) {
    std::vector<float> values;
    for (int i = 0; i < 700; ++i) values.push_back(top - static_cast<float>(i * 37 % 300) / 16.0f);
    for (const InstructionSet& set : sets()) {
      const Row row(LogitType::kFloat, values, set.kernels);
      long double shifted = 0;
      for (double x : row.exact) shifted += std::exp(static_cast<long double>(x) - top);
      const OnlineSoftmax token = row.kernels->stats(row.data.get(), 1);
      const double p = static_cast<double>(1 / shifted);
      CHECK(std::abs(probability(token, row.stats()) * shifted - 1) < probability_error(1, p, 700));
    }
  }
}

TEST(huge_logits_stay_finite) {
  for (float top : {1e30f, -1e30f, 3e38f, 8e5f}) {
    std::vector<float> values(70, -3.4e38f);
    values[3] = values[40] = top;
    for (const InstructionSet& set : sets()) {
      const Row row(LogitType::kFloat, values, set.kernels);
      CHECK(probability(row.kernels->stats(row.data.get() + 3 * 4, 1), row.stats()) == 0.5f);
    }
  }
}

TEST(half_values_convert) {
  const uint16_t bits[] = {0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x8001, 0xBC00, 0xFBFF};
  const double values[] = {0, 0x1p-24, 0x1.FF8p-15, 0x1p-14, 1, 65504, -0x1p-24, -1, -65504};
  for (const InstructionSet& set : sets()) {
    const VocabKernels& kernels = set.kernels[static_cast<int>(LogitType::kHalf)];
    for (int64_t i = 0; i < 9; ++i) CHECK(kernels.load(bits, i) == values[i]);
    CHECK(kernels.stats(bits, 9).max == 65504);
  }
}

TEST(tempered_mass_keeps_what_reaches_the_cutoff) {
  const std::vector<float> values{0.0f, -1.0f, -2.0f, -3.0f, -INFINITY};
  for (const InstructionSet& set : sets()) {
    const Row row(LogitType::kFloat, values, set.kernels);
    const double mass = row.kernels->tempered_mass(row.data.get(), 5, 0.0, 2 * kLog2eWide, -2.0);
    const double want = 1 + std::exp(-2.0) + std::exp(-4.0);
    CHECK(std::abs(mass - want) < (kTermError + kSumError + 1) * kU * want);
  }
}

TEST(the_moment_comes_with_the_same_statistics) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (int64_t n : {1, 5, 64, 511, 513, 4096}) {
    for (float offset : {0.0f, 300.0f, -1e5f}) {
      std::vector<float> values;
      for (int64_t i = 0; i < n; ++i) values.push_back(offset + normal(random));
      if (n > 5) values[3] = -INFINITY;
      for (const InstructionSet& set : sets()) {
        for (LogitType type : {LogitType::kFloat, LogitType::kBFloat16}) {
          const Row row(type, values, set.kernels);
          double moment = NAN;
          const OnlineSoftmax got = row.kernels->stats_and_moment(row.data.get(), n, &moment),
                              want = row.stats();
          CHECK(got.max == want.max && got.exponent == want.exponent && got.sum == want.sum);
          long double exact = 0;
          for (double z : row.exact) {
            if (z == -INFINITY) continue;
            const long double term =
                exp2l(static_cast<long double>(z) * 1.4426950408889634074L - got.exponent);
            exact += term * (static_cast<long double>(z) - got.max);
          }
          const test::ExactEntropy bound(row.exact);
          CHECK(std::abs(moment - exact) <=
                std::abs(exact) *
                        (kTermError + kSumError + 2 + kLog2eError * bound.mean_of_products) * kU +
                    1e-27);  // what is below the floor
        }
      }
    }
  }
}

TEST(an_entropy_is_as_exact_as_documented) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  double worst = 0;
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<float> values;
    for (int i = 0; i < 4000; ++i) values.push_back(normal(random) * (trial % 3 ? 1.0f : 6.0f));
    const int64_t top = 61 * trial;
    values[static_cast<size_t>(top)] = 0.5f * static_cast<float>(trial);
    for (const InstructionSet& set : sets()) {
      for (LogitType type : {LogitType::kFloat, LogitType::kBFloat16}) {
        const Row row(type, values, set.kernels);
        double moment = NAN;
        OnlineSoftmax stats = row.kernels->stats_and_moment(row.data.get(), 4000, &moment);
        const int64_t column = row.kernels->find(row.data.get(), 4000, stats.max);
        stats.sum += row.kernels->correction(row.data.get(), 4000, column, stats);
        const OnlineSoftmax token =
            row.kernels->stats(row.data.get() + column * kLogitBytes[static_cast<int>(type)], 1);
        const double term =
            std::ldexp(token.sum, static_cast<int>(token.exponent - stats.exponent));
        const test::ExactEntropy want(row.exact);
        const double error =
            std::abs(entropy_of(stats.sum / term, moment / term) - want.nats) / want.bound();
        CHECK(error <= 1);
        worst = std::max(worst, error);
      }
    }
  }
  CHECK(worst > 0.02);  // a bound that is out of reach would hold nothing
}

TEST(rows_without_a_prediction_have_no_moment) {
  for (const InstructionSet& set : sets()) {
    for (LogitType type : {LogitType::kFloat, LogitType::kBFloat16}) {
      double moment = 1;
      const Row nothing(type, std::vector<float>(70, -INFINITY), set.kernels);
      nothing.kernels->stats_and_moment(nothing.data.get(), 70, &moment);
      CHECK(moment == 0.0);
      for (float bad : {NAN, INFINITY}) {
        std::vector<float> values(70, 1.0f);
        values[69] = bad;
        const Row row(type, values, set.kernels);
        row.kernels->stats_and_moment(row.data.get(), 70, &moment);
        CHECK(std::isnan(moment));
      }
    }
  }
}

TEST(a_scale_that_leaves_float32_is_kept_in_double) {
  const std::vector<float> values{0.0f, -1.0f, -FLT_MAX, -INFINITY};
  for (double scale : {1e-300, 3e-38, 3.3e-37, 0.9e-36, 1.1e-36, 1e-30, 2e30, 1e300}) {
    for (const InstructionSet& set : sets()) {
      const Row row(LogitType::kFloat, values, set.kernels);
      double mass = 0, moment = 0;
      for (size_t i = 0; i < 3; ++i) {
        const double u = row.exact[i] * scale;
        mass += std::exp2(u);
        moment += u > -2000 ? u * std::exp2(u) : 0.0;
      }
      const double got = row.kernels->tempered_mass(row.data.get(), 4, 0.0, scale, -FLT_MAX);
      CHECK(std::abs(got / mass - 1) < 8 * kU);
      const TemperedSums sums = row.kernels->tempered_sums(row.data.get(), 4, 0.0, scale);
      CHECK(std::abs(sums.mass / mass - 1) < 8 * kU);
      CHECK(std::abs(sums.moment - moment) <= 8 * kU * std::abs(moment) + 64 * 115 * 0x1p-115);
    }
  }
}

TEST(float64_is_exact) {
  const double values[] = {1.0, 1.0 + 1e-15, -INFINITY};
  const VocabKernels& kernels = vocab_kernels(LogitType::kDouble);
  CHECK(kernels.find(values, 3, kernels.stats(values, 3).max) == 1);
}

}  // namespace

int main() { return test::run_all(); }

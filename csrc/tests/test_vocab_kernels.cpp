// SPDX-License-Identifier: Apache-2.0
// The pass over a slice, on every instruction set that this machine runs, against long double.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>

#include "../cpu/vocab_kernels.h"
#include "check.h"

using namespace r2dllm;
using namespace r2dllm::cpu;

namespace {

struct Set {
  const char* name;
  const VocabKernels* kernels;
};

std::vector<Set> sets() {
  std::vector<Set> all{{"portable", portable_kernels()}};
#if defined(__x86_64__)
  if (avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.push_back({"avx2", avx2_kernels()});
  }
  if (avx512_kernels() && __builtin_cpu_supports("avx512bw")) {
    all.push_back({"avx512", avx512_kernels()});
  }
#endif
  return all;
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

  VocabStats stats() const { return kernels->stats(data.get(), size()); }
  int64_t size() const { return static_cast<int64_t>(exact.size()); }
};

const LogitType kTypes[] = {LogitType::kFloat, LogitType::kBFloat16, LogitType::kHalf};

template <class F>
void for_each_row(const std::vector<float>& values, F f) {
  for (const Set& set : sets()) {
    for (LogitType type : kTypes) f(Row(type, values, set.kernels));
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
      const VocabStats stats = row.stats();
      const double max = *std::max_element(row.exact.begin(), row.exact.end());
      long double sum = 0;
      for (double x : row.exact) {
        sum += std::exp2((static_cast<long double>(x)) * kLog2eWide - stats.exponent);
      }
      CHECK(stats.max == max);
      CHECK(std::abs(stats.sum / sum - 1) < 2e-6);
      // The probability does not depend on the base of the exponentials: 1e-7 is float32.
      const VocabStats token =
          row.kernels->stats(row.data.get() + row.kernels->find(row.data.get(), row.size(), max) *
                                                  kLogitBytes[static_cast<int>(row.type)],
                             1);
      long double shifted = 0;
      for (double x : row.exact) shifted += std::exp(static_cast<long double>(x) - max);
      CHECK(std::abs(probability(token, stats) * shifted - 1) < 1.5e-7);
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
    for (const Set& set : sets()) {
      for (LogitType type : {LogitType::kFloat, LogitType::kBFloat16}) {
        const Row row(type, values, set.kernels);
        const char* token = row.data.get() + top * kLogitBytes[static_cast<int>(type)];
        VocabStats stats = row.stats();
        stats.sum += row.kernels->correction(row.data.get(), row.size(), top, stats);
        long double sum = 0;
        for (double x : row.exact) sum += std::exp(static_cast<long double>(x) - stats.max);
        const long double error = probability(row.kernels->stats(token, 1), stats) - 1 / sum;
        CHECK(std::abs(error) < 0.55 * 0x1p-24);
      }
    }
  }
}

TEST(ties_in_one_lane_are_exact) {
  for (float top : {-7.25f, 0.3f, 1e4f}) {
    for (int64_t n : {2, 4}) {
      std::vector<float> values(600, top - 1e4f);
      for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(64 * i)] = top;
      for (const Set& set : sets()) {
        const Row row(LogitType::kFloat, values, set.kernels);
        const VocabStats token = row.kernels->stats(row.data.get(), 1);
        CHECK(probability(token, row.stats()) == 1.0f / static_cast<float>(n));
      }
    }
  }
}

TEST(ties_are_exact_and_the_lowest_index_is_found) {
  for (float top : {0.0f, 3.7f, -250.0f, 1000.0f}) {
    std::vector<float> values(300, top - 1e4f);
    for (size_t i : {70, 71, 200, 299}) values[i] = top;
    for (const Set& set : sets()) {
      const Row row(LogitType::kFloat, values, set.kernels);
      const VocabStats stats = row.stats();
      CHECK(row.kernels->find(row.data.get(), 300, stats.max) == 70);
      CHECK(probability(row.kernels->stats(row.data.get() + 70 * 4, 1), stats) == 0.25f);
    }
  }
}

TEST(rows_without_a_prediction) {
  for (int64_t n : {1, 64, 100}) {
    for (int64_t at : {int64_t{0}, n / 2, n - 1}) {
      for (float rest : {0.0f, -3.0f, -INFINITY}) {
        for (const Set& set : sets()) {
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
    for (const Set& set : sets()) {
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
  for (const Set& set : sets()) {
    const Row row(LogitType::kFloat, values, set.kernels);
    const VocabStats stats = row.stats();
    CHECK(is_valid(stats));
    CHECK(probability(row.kernels->stats(row.data.get() + 130 * 4, 1), stats) == 1.0f);
  }
}

TEST(differences_of_large_logits_are_kept_on_both_sides_of_the_narrow_limit) {
  for (float top : {1e5f, -1e5f, 22700.0f, -22700.0f, 22800.0f, -22800.0f}) {
    std::vector<float> values;
    for (int i = 0; i < 700; ++i) values.push_back(top - static_cast<float>(i * 37 % 300) / 16.0f);
    for (const Set& set : sets()) {
      const Row row(LogitType::kFloat, values, set.kernels);
      long double shifted = 0;
      for (double x : row.exact) shifted += std::exp(static_cast<long double>(x) - top);
      const VocabStats token = row.kernels->stats(row.data.get(), 1);
      CHECK(std::abs(probability(token, row.stats()) * shifted - 1) < 3e-7);
    }
  }
}

TEST(huge_logits_stay_finite) {
  for (float top : {1e30f, -1e30f, 3e38f, 8e5f}) {
    std::vector<float> values(70, -3.4e38f);
    values[3] = values[40] = top;
    for (const Set& set : sets()) {
      const Row row(LogitType::kFloat, values, set.kernels);
      CHECK(probability(row.kernels->stats(row.data.get() + 3 * 4, 1), row.stats()) == 0.5f);
    }
  }
}

TEST(half_values_convert) {
  const uint16_t bits[] = {0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x8001, 0xBC00, 0xFBFF};
  const double values[] = {0, 0x1p-24, 0x1.FF8p-15, 0x1p-14, 1, 65504, -0x1p-24, -1, -65504};
  for (const Set& set : sets()) {
    const VocabKernels& kernels = set.kernels[static_cast<int>(LogitType::kHalf)];
    for (int64_t i = 0; i < 9; ++i) CHECK(kernels.load(bits, i) == values[i]);
    CHECK(kernels.stats(bits, 9).max == 65504);
  }
}

TEST(tempered_mass_keeps_what_reaches_the_cutoff) {
  const std::vector<float> values{0.0f, -1.0f, -2.0f, -3.0f, -INFINITY};
  for (const Set& set : sets()) {
    const Row row(LogitType::kFloat, values, set.kernels);
    const double mass = row.kernels->tempered_mass(row.data.get(), 5, 0.0, 2 * kLog2eWide, -2.0);
    CHECK(std::abs(mass - (1 + std::exp(-2.0) + std::exp(-4.0))) < 1e-6);
  }
}

TEST(float64_is_exact) {
  const double values[] = {1.0, 1.0 + 1e-15, -INFINITY};
  const VocabKernels& kernels = vocab_kernels(LogitType::kDouble);
  CHECK(kernels.find(values, 3, kernels.stats(values, 3).max) == 1);
}

}  // namespace

int main() { return test::run_all(); }

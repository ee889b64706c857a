// SPDX-License-Identifier: Apache-2.0
// The loss of a row and its gradient: the rules against long double and finite differences, the
// kernels of every instruction set that this machine runs against the rules.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>

#include "../cpu/vocab_kernels.h"
#include "../rules/row_stats.h"
#include "../rules/sft_loss.h"
#include "check.h"

using namespace r2dllm;
using namespace r2dllm::cpu;

namespace {

std::vector<const VocabKernels*> sets() {
  std::vector<const VocabKernels*> all{portable_kernels()};
#if defined(__x86_64__)
  if (avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.push_back(avx2_kernels());
  }
  if (avx512_kernels() && __builtin_cpu_supports("avx512bw")) all.push_back(avx512_kernels());
#endif
  return all;
}

std::vector<double> random_row(int64_t n, double spread) {
  std::mt19937 random(static_cast<unsigned>(n));
  std::normal_distribution<double> normal(0.0, spread);
  std::vector<double> row;
  for (int64_t i = 0; i < n; ++i) row.push_back(normal(random));
  return row;
}

struct Exact {
  long double nll, entropy;
};

Exact exact(const std::vector<double>& z, int64_t target, double temperature) {
  const long double max = *std::max_element(z.begin(), z.end());
  long double sum = 0, mass = 0, moment = 0;
  for (double x : z) {
    const long double u = (x - max) / static_cast<long double>(temperature);
    sum += std::exp(x - max);
    mass += std::exp(u);
    moment += u * std::exp(u);
  }
  return {std::log(sum) + max - z[static_cast<size_t>(target)], std::log(mass) - moment / mass};
}

// By the float64 kernels, slice by slice.
RowState state_of(const std::vector<double>& z, int64_t target, double temperature,
                  int64_t slice_width) {
  const VocabKernels& kernels = vocab_kernels(LogitType::kDouble);
  const int64_t n = static_cast<int64_t>(z.size());
  const double scale = tempered_scale(temperature);
  OnlineSoftmax row = OnlineSoftmax::empty();
  for (int64_t i = 0; i < n; i += slice_width) {
    row = merge(row, kernels.stats(&z[static_cast<size_t>(i)], std::min(slice_width, n - i)));
  }
  TemperedSums tempered{0.0, 0.0};
  for (int64_t i = 0; i < n; i += slice_width) {
    const double* slice = &z[static_cast<size_t>(i)];
    const int64_t size = std::min(slice_width, n - i);
    const double max = kernels.stats(slice, size).max;
    if (!(max > -INFINITY)) continue;
    const TemperedSums part =
        rebased(kernels.tempered_sums(slice, size, max, scale), (max - row.max) * scale);
    tempered.mass += part.mass;
    tempered.moment += part.moment;
  }
  const OnlineSoftmax token = kernels.stats(&z[static_cast<size_t>(target)], 1);
  return {row.max,       row.exponent,   row.sum, negative_log_likelihood(token, row),
          tempered.mass, tempered.moment};
}

TEST(loss_and_entropy_match_long_double_in_any_slices) {
  for (double spread : {0.0, 1.0, 20.0}) {
    for (double temperature : {0.3, 1.0, 5.0}) {
      const std::vector<double> z = random_row(257, spread);
      const Exact want = exact(z, 100, temperature);
      for (int64_t width : {1, 7, 64, 257}) {
        const RowState row = state_of(z, 100, temperature, width);
        // A sum of 257 in float64, and numbers below 100 beside it: 257 + 100 places and a few.
        CHECK(std::abs(row.nll - want.nll) < 1e-12);
        CHECK(std::abs(entropy({row.mass, row.moment}) - want.entropy) < 1e-12);
      }
    }
  }
}

TEST(a_slice_of_minus_infinity_adds_nothing) {
  std::vector<double> z = random_row(64, 2.0);
  const RowState want = state_of(z, 3, 0.5, 64);
  z.insert(z.end(), 128, -INFINITY);
  const RowState got = state_of(z, 3, 0.5, 64);
  CHECK(got.nll == want.nll && got.mass == want.mass && got.moment == want.moment);
}

TEST(gradient_is_the_derivative) {
  const std::vector<double> z = random_row(40, 1.5);
  const int64_t target = 11;
  const double temperature = 0.7, d_nll = 0.8, d_entropy = -1.7, h = 1e-5;
  const RowState state = state_of(z, target, temperature, 16);
  const RowGradient row = row_gradient(state, d_nll, d_entropy, tempered_scale(temperature));
  for (int64_t k = 0; k < 40; ++k) {
    const size_t i = static_cast<size_t>(k);
    std::vector<double> above = z, below = z;
    above[i] += h;
    below[i] -= h;
    const Exact a = exact(above, target, temperature), b = exact(below, target, temperature);
    const long double slope =
        (d_nll * (a.nll - b.nll) + d_entropy * (a.entropy - b.entropy)) / (2 * h);
    const double got =
        k == target ? target_gradient(row, z[i], d_nll, state.nll) : logit_gradient(row, z[i]);
    // Third derivatives are below 10 / temperature^3: the difference is h^2 / 6 of that off.
    CHECK(std::abs(got - slope) < 1e-9);
  }
}

TEST(rows_without_a_loss) {
  const OnlineSoftmax fine{1.0, 1.0, 1.5}, none = OnlineSoftmax::empty(), nan{1.0, 0.0, NAN};
  CHECK(negative_log_likelihood(fine, none) != negative_log_likelihood(fine, none));
  CHECK(negative_log_likelihood(fine, nan) != negative_log_likelihood(fine, nan));
  CHECK(negative_log_likelihood(none, fine) == INFINITY);
  CHECK(negative_log_likelihood(fine, fine) == 0.0);
  CHECK(is_nan(row_gradient({1.0, 0.0, NAN, NAN, 0.0, 0.0}, 1.0, 0.0, 1.0)));
  CHECK(!is_nan(row_gradient({1.0, 0.0, 1.0, 0.0, 0.0, 0.0}, 1.0, 0.0, 1.0)));
}

TEST(rows_add_up) {
  const LossSums sums = LossSums{2.0, 3.0, 1, 1} + LossSums{4.0, 0.0, 2, 0};
  const Loss mean = loss_of(sums, static_cast<double>(sums.rows), 0.5);
  CHECK(mean.value == 2.0 + 1.5 && mean.d_nll == 1.0 / 3 && mean.d_entropy == 0.5);
  const Loss no_rows = loss_of({0.0, 0.0, 0, 0}, 0.0, 0.5);
  CHECK(no_rows.value == 0.0 && no_rows.d_nll == 0.0 && no_rows.d_entropy == 0.0);
  CHECK(passes(EntropyGate::kAll, 1, 2) && !passes(EntropyGate::kCorrect, 1, 2));
}

// ---- kernels ---------------------------------------------------------------------------------

// A heap block of exactly n elements, rounded to the type by the kernels themselves.
struct Data {
  LogitType type;
  const VocabKernels& kernels;
  int64_t n;
  std::unique_ptr<char[]> bytes;

  Data(LogitType type, const VocabKernels* all, const std::vector<double>& values)
      : type(type),
        kernels(all[static_cast<int>(type)]),
        n(static_cast<int64_t>(values.size())),
        bytes(new char[values.size() * static_cast<size_t>(size_of_one())]) {
    for (int64_t i = 0; i < n; ++i) {
      kernels.store(bytes.get(), i, values[static_cast<size_t>(i)]);
    }
  }
  int64_t size_of_one() const { return kLogitBytes[static_cast<int>(type)]; }
  double operator[](int64_t i) const { return kernels.load(bytes.get(), i); }
};

// Relative error of a sum of terms (vocab_kernels.h) and one product with it; an exponent u that is
// rounded to float32 counts where its term is large, and there u is small.
constexpr double kRelative = (kTermError + kSumError + 1) * 0x1p-24;

// Half of the last place kept, relative to the least number that has it.
double rounding(LogitType type) {
  return type == LogitType::kFloat ? 0x1p-24 : type == LogitType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

const LogitType kTypes[] = {LogitType::kFloat, LogitType::kBFloat16, LogitType::kHalf};

template <class F>
void for_each_data(const std::vector<double>& values, F f) {
  for (const VocabKernels* set : sets()) {
    for (LogitType type : kTypes) f(Data(type, set, values));
  }
}

TEST(tempered_sums_match_long_double) {
  for (int64_t n : {1, 63, 64, 65, 1000, 4096}) {
    std::vector<double> values = random_row(n, 4.0);
    if (n > 2) values[1] = -INFINITY;
    for (double temperature : {0.1, 0.5, 1.0, 20.0}) {
      const double scale = tempered_scale(temperature);
      for_each_data(values, [&](const Data& data) {
        const double max = data.kernels.stats(data.bytes.get(), n).max;
        const TemperedSums got = data.kernels.tempered_sums(data.bytes.get(), n, max, scale);
        long double mass = 0, moment = 0;
        for (int64_t i = 0; i < n; ++i) {
          if (data[i] == -INFINITY) continue;
          const long double u = (static_cast<long double>(data[i]) - max) * scale;
          mass += std::exp2(u);
          moment += u * std::exp2(u);
        }
        CHECK(std::abs(got.mass - mass) < kRelative * mass);
        CHECK(std::abs(got.moment - moment) <= kRelative * std::abs(moment) + 1e-20);
      });
    }
  }
}

TEST(gradients_match_the_rules_and_may_overwrite_the_logits) {
  for (int64_t n : {1, 2, 63, 64, 65, 500}) {
    for (double offset : {0.0, 300.0, -3e6}) {
      std::vector<double> values = random_row(n, 3.0);
      for (double& value : values) value += offset;
      if (n > 2) values[2] = -INFINITY;
      for_each_data(values, [&](const Data& data) {
        if (data.type == LogitType::kHalf && std::abs(offset) > 6e4) return;
        const OnlineSoftmax stats = data.kernels.stats(data.bytes.get(), n);
        const double scale = tempered_scale(0.5);
        const TemperedSums sums = data.kernels.tempered_sums(data.bytes.get(), n, stats.max, scale);
        const RowState state{stats.max, stats.exponent, stats.sum, 0.0, sums.mass, sums.moment};
        std::vector<double> loaded;
        for (int64_t i = 0; i < n; ++i) loaded.push_back(data[i]);
        const RowState wide = state_of(loaded, 0, 0.5, n);
        for (double d_entropy : {0.0, 0.6}) {
          const RowGradient row = row_gradient(state, 0.9, d_entropy, scale);
          Data copy(data.type, &data.kernels - static_cast<int>(data.type), values);
          const std::unique_ptr<char[]> out(new char[static_cast<size_t>(n * data.size_of_one())]);
          data.kernels.gradient(data.bytes.get(), out.get(), n, row);
          data.kernels.gradient(copy.bytes.get(), copy.bytes.get(), n, row);
          CHECK(std::memcmp(out.get(), copy.bytes.get(),
                            static_cast<size_t>(n * data.size_of_one())) == 0);
          for (int64_t i = 0; i < n; ++i) {
            const double want = logit_gradient(row_gradient(wide, 0.9, d_entropy, scale), data[i]);
            const double got = copy[i];
            // The least subnormal half is 2^-24; what is below the floor counts as 0.
            const double least = data.type == LogitType::kHalf ? 0x1p-25 : 1e-30;
            // q (u - mean) cancels: both products, below 1 each, are as far off.
            CHECK(std::abs(got - want) <= std::abs(want) * (rounding(data.type) + kRelative) +
                                              least + (d_entropy != 0.0 ? 2 * kRelative : 0.0));
            if (data[i] == -INFINITY) CHECK(got == 0.0);
          }
        }
      });
    }
  }
}

TEST(a_row_of_nan_has_a_gradient_of_nan) {
  const std::vector<double> values = random_row(70, 1.0);
  for_each_data(values, [&](const Data& data) {
    const RowGradient row = row_gradient({0.0, 0.0, NAN, NAN, 0.0, 0.0}, 1.0, 0.0, 1.0);
    data.kernels.gradient(data.bytes.get(), data.bytes.get(), 70, row);
    for (int64_t i = 0; i < 70; ++i) CHECK(data[i] != data[i]);
  });
}

// Scalar and vector stores, of every set, against rounding in double.
TEST(stores_round_to_nearest_even) {
  std::vector<double> values;
  std::mt19937 random(1);
  std::uniform_real_distribution<double> exponent(-30.0, 15.9), sign(-1.0, 1.0);
  for (int i = 0; i < 4000; ++i) {
    const float value = static_cast<float>(std::exp2(exponent(random)));
    values.push_back(sign(random) < 0 ? -value : value);
  }
  for (double tie : {1.00390625, 1.01171875, 1 + 0x1p-11, 1 + 3 * 0x1p-11, 0x1p-25, 3 * 0x1p-25,
                     65519.0, 0x1p-24, 0x1p-14, 0.0}) {
    values.push_back(tie);
  }
  for (const VocabKernels* set : sets()) {
    for (LogitType type : {LogitType::kBFloat16, LogitType::kHalf}) {
      const Data data(type, set, values);
      for (size_t i = 0; i < values.size(); ++i) {
        int e;
        std::frexp(values[i], &e);
        const int bits = type == LogitType::kHalf ? 11 : 8;
        const int ulp = std::max(e - bits, type == LogitType::kHalf ? -24 : -133);
        const double want = std::ldexp(std::nearbyint(std::ldexp(values[i], -ulp)), ulp);
        CHECK(data[static_cast<int64_t>(i)] == want);
      }
      // The vector store: softmax * 2^0 of logits that are all the maximum is the coefficient.
      for (size_t i = 0; i < values.size(); i += 37) {
        const Data zeros(type, set, std::vector<double>(64, 0.0));
        zeros.kernels.gradient(zeros.bytes.get(), zeros.bytes.get(), 64,
                               {0.0, 0.0, values[i], 1.0, 0.0, 0.0});
        CHECK(zeros[0] == data[static_cast<int64_t>(i)]);
        CHECK(zeros[63] == data[static_cast<int64_t>(i)]);
      }
    }
  }
  for (const VocabKernels* set : sets()) {
    const Data huge(LogitType::kHalf, set, {65520.0, -1e30, INFINITY});
    CHECK(huge[0] == INFINITY && huge[1] == -INFINITY && huge[2] == INFINITY);
  }
}

}  // namespace

int main() { return test::run_all(); }

// SPDX-License-Identifier: Apache-2.0
// The bodies of the loss's CUDA kernels, lane by lane on the CPU, against long double.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>

#include "../cpu/vocab_kernels.h"
#include "../cuda/row_stats.h"
#include "../cuda/sft_loss.h"
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
using test::Logits;

namespace {

constexpr int64_t kIgnore = -100;

// ---- launches, as row_stats.cu and sft_loss.cu do them ---------------------------------------

struct Rows {
  std::vector<float> nll, entropy, confidence;
  std::vector<int64_t> prediction;
  std::vector<RowState> state;

  explicit Rows(size_t rows)
      : nll(rows, 77), entropy(rows, 77), confidence(rows, 77), prediction(rows, 77), state(rows) {}
};

// `temperature` 0: no entropy.
template <class Format>
Rows run_forward(const LogitsView& logits, const std::vector<int64_t>& targets, double temperature,
                 unsigned seed) {
  const int64_t cells = logits.batch * logits.length;
  const int64_t slices = (logits.vocab + kSliceColumns<Format> - 1) / kSliceColumns<Format>;
  const auto partials = static_cast<size_t>(cells * slices);
  const bool with_entropy = temperature != 0.0;
  const double scale = with_entropy ? tempered_scale(temperature) : 0.0;
  const std::unique_ptr<SlicePartial[]> partial(new SlicePartial[partials]);
  const std::unique_ptr<double[]> mass(with_entropy ? new double[partials] : nullptr),
      moment(with_entropy ? new double[partials] : nullptr);
  const VocabWorkspace workspace{
      .slices = slices, .partial = partial.get(), .tempered = mass.get(), .moment = moment.get()};
  Rows rows(static_cast<size_t>(cells));
  const RowStatsParams params{.logits = logits,
                              .targets = targets.data(),
                              .ignore_index = kIgnore,
                              .temperature = temperature,
                              .nll = {rows.nll.data(), false},
                              .entropy = {rows.entropy.data(), false},
                              .confidence = rows.confidence.data(),
                              .prediction = rows.prediction.data(),
                              .state = rows.state.data(),
                              .workspace = nullptr};
  const HasTarget has_target{targets.data(), kIgnore};
  test::launch<SliceShared>(cells * slices, kSliceThreads, seed, sizeof(SliceShared),
                            [&](FibreLane& lane, SliceShared* shared) {
                              if (with_entropy) {
                                slice_body<Format, Tempered::kMoment, false>(
                                    lane, *shared, logits, has_target, workspace,
                                    SameScale{narrow_scale(scale)});
                              } else {
                                slice_body<Format, Tempered::kNone, false>(
                                    lane, *shared, logits, has_target, workspace, SameScale{});
                              }
                            });
  constexpr int64_t kRows = 2;  // of a block
  test::launch<char>(
      (cells + kRows - 1) / kRows, kRows * kWarp, seed, 1,
      [&](FibreLane& lane, char*) { row_stats_body<Format>(lane, params, workspace, scale); });
  return rows;
}

template <class Format>
Rows run_forward(const Logits<Format>& logits, const std::vector<int64_t>& targets,
                 double temperature = 0.0, unsigned seed = 1) {
  return run_forward<Format>(logits.view(), targets, temperature, seed);
}

// The derivatives of a loss by each row's nll and entropy.
struct Derivatives {
  std::vector<float> nll, entropy;  // no entropy: none is given
};

template <class Format>
void run_backward(const LogitsView& logits, const std::vector<int64_t>& targets, const Rows& rows,
                  const Derivatives& by, double temperature, Logits<Format>& gradient,
                  unsigned seed = 1, int64_t first_id = 0) {
  const auto* d_entropy = by.entropy.empty() ? nullptr : by.entropy.data();
  const LogitsView out = gradient.view();
  const RowStatsBackwardParams params{logits,
                                      first_id,
                                      targets.data(),
                                      kIgnore,
                                      temperature,
                                      rows.state.data(),
                                      {const_cast<float*>(by.nll.data()), false},
                                      {const_cast<float*>(d_entropy), false},
                                      const_cast<void*>(out.data),
                                      out.batch_stride,
                                      out.length_stride};
  const int64_t slices = gradient.slices();
  test::launch<RowGradient>(logits.batch * logits.length * slices, kSliceThreads, seed,
                            sizeof(RowGradient), [&](FibreLane& lane, RowGradient* shared) {
                              gradient_body<Format>(lane, *shared, params, slices,
                                                    tempered_scale(temperature));
                            });
}

// ---- the oracle ------------------------------------------------------------------------------

template <class Format>
long double exact_nll(const Logits<Format>& logits, int64_t cell, int64_t target) {
  const ExactSoftmax row(logits, cell);
  return row.log_mass + (row.max - logits.get(cell, target));
}

// What is within `error` before it is rounded to float32.
bool close(float got, long double want, long double error) {
  return std::abs(got - want) <= error + kPlace * (std::abs(want) + error);
}

template <class Format>
void check_statistics(const Logits<Format>& logits, const std::vector<int64_t>& targets,
                      double temperature, const Rows& got) {
  for (int64_t cell = 0; cell < logits.batch * logits.length; ++cell) {
    const auto c = static_cast<size_t>(cell);
    const ExactSoftmax row(logits, cell);
    CHECK(got.prediction[c] == row.prediction);
    CHECK(close(got.nll[c], exact_nll(logits, cell, targets[c]), row.mass_error));
    CHECK(close(got.confidence[c], row.p(), row.p() * row.mass_error));
    if (temperature == 0.0) {
      CHECK(got.entropy[c] == 0.0f);
      continue;
    }
    const ExactSoftmax tempered(logits, cell, temperature);
    CHECK(close(got.entropy[c], tempered.entropy, tempered.entropy_error()));
  }
}

// Half of the last place kept.
double half_place(Float32) { return 0x1p-24; }
double half_place(BFloat16) { return 0x1p-8; }
double half_place(cuda::Half) { return 0x1p-11; }
// Half of the least number.
double least(Float32) { return 0x1p-150; }
double least(BFloat16) { return 0x1p-134; }
double least(cuda::Half) { return 0x1p-25; }

// All columns of a row that has a target. A coefficient is rounded to float32, its product with a
// term, and the sum of both; a term below 2^-126 counts as 0.
template <class Format>
void check_gradient(const Logits<Format>& logits, int64_t cell, int64_t target, double d_nll,
                    double d_entropy, double temperature, const Logits<Format>& got) {
  const ExactSoftmax row(logits, cell), tempered(logits, cell, temperature);
  const long double nll = exact_nll(logits, cell, target);
  for (int64_t i = 0; i < logits.vocab; ++i) {
    const long double below = row.max - logits.get(cell, i);
    const bool none = !(below < INFINITY);
    const long double p = none ? 0.0L : std::exp(-below - row.log_mass);
    // p - 1 without cancellation where p is near 1.
    const long double of_nll = d_nll * (i == target ? std::expm1(-nll) : p);
    long double want = of_nll, error = std::abs(d_nll) * 0x1p-126L;
    if (i == target) {
      error += std::abs(d_nll) * p * row.mass_error;
    } else if (p > 0.0L) {
      error += std::abs(of_nll) * (row.mass_error + row.term_error(below) + 2 * kPlace);
    }
    if (!none && d_entropy != 0.0) {
      const long double depth = below / temperature, q = std::exp(-depth - tempered.log_mass),
                        above_mean = tempered.mean - depth,  // log q + H
          rate = std::abs(d_entropy) / temperature,
                        relative = tempered.mass_error + tempered.term_error(depth) + 3 * kPlace,
                        of_mean = tempered.mean_error + (tempered.mean + 3 * depth) * kPlace;
      want -= d_entropy * q * above_mean / temperature;
      error += rate * (q * (std::abs(above_mean) * relative + of_mean) +
                       0x1p-126L * (126 + tempered.mean));
    }
    error += kPlace * (std::abs(want) + error);
    const double value = got.get(cell, i);
    CHECK(std::abs(value - want) <=
          error + half_place(Format()) * (std::abs(want) + error) + least(Format()));
    if (none && i != target) CHECK(value == 0.0);
  }
}

// ---- statistics ------------------------------------------------------------------------------

TEST(statistics_match_long_double_at_any_width_and_alignment) {
  std::mt19937 random(1);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    for (int64_t vocab : {1, 2, 7, 127, 1000, 4096, 8191, 8193, 20001}) {
      for (int64_t offset : {0, 1, 3}) {
        Logits<Format> logits(1, 3, vocab, offset, vocab % 3);
        logits.fill(random, vocab % 2 ? 1.0f : 4.0f);
        const std::vector<int64_t> targets{0, vocab / 2, vocab - 1};
        const double temperature = std::vector<double>{0.3, 1.0, 5.0}[vocab % 3];
        check_statistics(logits, targets, temperature, run_forward(logits, targets, temperature));
        check_statistics(logits, targets, 0.0, run_forward(logits, targets));
      }
    }
  });
}

TEST(a_confident_row_keeps_the_digits_of_its_loss_and_entropy) {
  std::mt19937 random(2);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    for (float spike : {6.0f, 12.0f, 20.0f, 32.0f}) {
      for (int64_t at : {0, 5000, 9999}) {
        Logits<Format> logits(1, 1, 10000);
        logits.fill(random, 1.0f);
        logits.set(0, at, spike);
        const Rows got = run_forward(logits, {at}, 1.0);
        check_statistics(logits, {at}, 1.0, got);
        // The digits: the bounds above are as small as the loss and the entropy themselves are.
        const ExactSoftmax want(logits, 0);
        CHECK(want.prediction == at && want.mass_error < 1e-4L * want.log_mass);
        CHECK(want.entropy_error() < 1e-4L * want.entropy);
      }
    }
    Logits<Format> all(1, 1, 9000);
    for (int64_t i = 0; i < 9000; ++i) all.set(0, i, -60000.0f);
    all.set(0, 8999, 100.0f);
    const Rows got = run_forward(all, {8999}, 1.0);
    CHECK(got.nll[0] == 0.0f && got.entropy[0] == 0.0f && got.confidence[0] == 1.0f);
  });
}

TEST(slices_of_minus_infinity_and_wide_logits) {
  std::mt19937 random(3);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    Logits<Format> logits(1, 1, 3 * kSliceColumns<Format>);
    for (int64_t i = 0; i < logits.vocab; ++i) logits.set(0, i, -INFINITY);
    for (int64_t i = 0; i < 100; ++i) {
      logits.set(0, kSliceColumns<Format> + i, static_cast<float>(i % 7));
    }
    const std::vector<int64_t> targets{kSliceColumns<Format> + 3};
    for (double temperature : {1e-6, 1.0, 1e6}) {
      check_statistics(logits, targets, temperature, run_forward(logits, targets, temperature));
    }
  });
  for (float level : {3e38f, -3e38f, 1e30f, -3e6f, 8e5f}) {
    Logits<Float32> logits(1, 2, 5000);
    for (int64_t i = 0; i < 5000; ++i) {
      logits.set(0, i, level + static_cast<float>(i % 5));
      logits.set(1, i, i == 4321 ? level : -3.4e38f);
    }
    const std::vector<int64_t> targets{11, 4321};
    check_statistics(logits, targets, 0.7, run_forward(logits, targets, 0.7));
  }
}

TEST(rows_without_a_target_are_not_read) {
  std::mt19937 random(4);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    Logits<Format> logits(1, 1, 9000), gradient(1, 2, 9000, 1, 1);
    logits.fill(random);
    LogitsView view = logits.view();
    view.length = 2;
    view.length_stride = int64_t{1} << 40;  // no memory is there
    const std::vector<int64_t> targets{7, kIgnore};
    const Rows got = run_forward<Format>(view, targets, 1.0, 4);
    CHECK(got.nll[1] == 0.0f && got.entropy[1] == 0.0f && got.confidence[1] == 0.0f);
    CHECK(got.prediction[1] == -1 && got.state[1].sum == 0.0);
    run_backward(view, targets, got, {{0.5f, NAN}, {0.5f, NAN}}, 1.0, gradient);
    check_gradient(logits, 0, 7, 0.5, 0.5, 1.0, gradient);
    for (int64_t i = 0; i < 9000; ++i) CHECK(gradient.get(1, i) == 0.0);
  });
}

TEST(the_same_bits_in_any_order_and_batch) {
  std::mt19937 random(5);
  Logits<BFloat16> alone(1, 1, 9001), batch(2, 3, 9001, 1, 5), want(1, 1, 9001),
      got(2, 3, 9001, 0, 2);
  alone.fill(random);
  batch.fill(random);
  for (int64_t i = 0; i < 9001; ++i) batch.set(4, i, static_cast<float>(alone.get(0, i)));
  const Rows row = run_forward(alone, {8500}, 0.7, 9);
  run_backward(alone.view(), {8500}, row, {{0.3f}, {0.2f}}, 0.7, want);
  const std::vector<int64_t> targets(6, 8500);
  for (unsigned seed : {1u, 2u}) {
    const Rows rows = run_forward(batch, targets, 0.7, seed);
    CHECK(rows.nll[4] == row.nll[0] && rows.entropy[4] == row.entropy[0]);
    CHECK(rows.state[4].nll == row.state[0].nll && rows.state[4].mass == row.state[0].mass);
    run_backward(batch.view(), targets, rows,
                 {std::vector<float>(6, 0.3f), std::vector<float>(6, 0.2f)}, 0.7, got, seed);
    for (int64_t i = 0; i < 9001; ++i) CHECK(got.get(4, i) == want.get(0, i));
  }
}

// ---- gradient --------------------------------------------------------------------------------

constexpr float kSentinel = 12.0f;

template <class Format>
void fill_all(Logits<Format>& logits) {
  const LogitsView view = logits.view();
  const int64_t elements =
      logits.offset + (view.batch * view.length - 1) * logits.pitch + view.vocab;
  for (int64_t i = 0; i < elements; ++i) {
    logits.memory[static_cast<size_t>(i)] = test::encode<Format>(kSentinel);
  }
}

// What lies before, between and behind the rows.
template <class Format>
bool untouched_outside(const Logits<Format>& logits) {
  const typename Format::Bits sentinel = test::encode<Format>(kSentinel);
  for (int64_t i = 0; i < logits.offset; ++i) {
    if (logits.memory[static_cast<size_t>(i)] != sentinel) return false;
  }
  for (int64_t cell = 0; cell + 1 < logits.batch * logits.length; ++cell) {
    for (int64_t i = logits.vocab; i < logits.pitch; ++i) {
      if (logits.memory[static_cast<size_t>(logits.offset + cell * logits.pitch + i)] != sentinel) {
        return false;
      }
    }
  }
  return true;
}

// Rows with targets in the first, a middle and the last column, and one without that is NaN.
template <class Format>
void check_gradients(Logits<Format>& logits, int64_t offset, int64_t pad, double temperature,
                     const std::vector<float>& d_entropy) {
  const int64_t vocab = logits.vocab;
  for (int64_t i = 0; i < vocab; ++i) logits.set(2, i, NAN);
  const std::vector<int64_t> targets{0, vocab / 2, kIgnore, vocab - 1};
  const Rows rows = run_forward(logits, targets, d_entropy.empty() ? 0.0 : temperature);
  const Derivatives by{{0.8f, -0.3f, NAN, 1.5f}, d_entropy};
  Logits<Format> gradient(logits.batch, logits.length, vocab, offset, pad);
  fill_all(gradient);
  run_backward(logits.view(), targets, rows, by, temperature, gradient, 2);
  CHECK(untouched_outside(gradient));
  for (int64_t cell = 0; cell < 4; ++cell) {
    const auto c = static_cast<size_t>(cell);
    if (targets[c] == kIgnore) {
      for (int64_t i = 0; i < vocab; ++i) CHECK(gradient.get(cell, i) == 0.0);
    } else {
      check_gradient(logits, cell, targets[c], by.nll[c],
                     d_entropy.empty() ? 0.0 : static_cast<double>(d_entropy[c]), temperature,
                     gradient);
    }
  }
  run_backward(logits.view(), targets, rows, by, temperature, logits, 3);
  CHECK(untouched_outside(logits));
  bool same = true;
  for (int64_t cell = 0; cell < 4; ++cell) {
    for (int64_t i = 0; i < vocab; ++i) same = same && logits.get(cell, i) == gradient.get(cell, i);
  }
  CHECK(same);
}

TEST(some_columns_have_the_gradient_of_the_whole_row) {
  std::mt19937 random(8);
  constexpr int64_t vocab = 9001;
  Logits<BFloat16> logits(1, 3, vocab), whole(1, 3, vocab);
  logits.fill(random);
  const std::vector<int64_t> targets{0, 4100, vocab - 1};
  const Rows rows = run_forward(logits, targets, 0.7);
  const Derivatives by{{0.8f, -0.3f, 1.5f}, {0.1f, 0.2f, 0.3f}};
  run_backward(logits.view(), targets, rows, by, 0.7, whole);
  const int64_t bounds[] = {0, 1, 4100, 4101, vocab};
  for (int k = 0; k < 4; ++k) {
    const int64_t first = bounds[k];
    Logits<BFloat16> part(1, 3, bounds[k + 1] - first);
    LogitsView view = logits.view();
    view.data = static_cast<const uint16_t*>(view.data) + first;
    view.vocab = part.vocab;
    run_backward(view, targets, rows, by, 0.7, part, 2, first);
    bool same = true;
    for (int64_t cell = 0; cell < 3; ++cell) {
      for (int64_t i = 0; i < part.vocab; ++i) {
        same = same && part.get(cell, i) == whole.get(cell, first + i);
      }
    }
    CHECK(same);
  }
}

TEST(gradients_match_long_double_in_place_and_out_of_place) {
  std::mt19937 random(6);
  for_each_format([&](auto format) {
    using Format = decltype(format);
    for (int64_t vocab : {1, 2, 7, 15, 16, 129, 1003, 4096, 8192, 8197, 20000}) {
      for (int64_t offset : {0, 1}) {
        for (const std::vector<float>& d_entropy :
             {std::vector<float>{}, std::vector<float>{-1.7f, 0.9f, NAN, 0.0f}}) {
          Logits<Format> logits(2, 2, vocab, offset, vocab % 2 ? 3 : 0);
          fill_all(logits);
          logits.fill(random, 3.0f);
          if (vocab > 100) logits.set(0, 50, -INFINITY);
          check_gradients(logits, (offset + vocab) % 3, vocab % 5, 0.7, d_entropy);
        }
      }
    }
  });
}

TEST(gradients_at_extreme_temperatures_and_of_wide_logits) {
  std::mt19937 random(7);
  for (double temperature : {1e-6, 0.05, 30.0}) {
    Logits<Float32> logits(2, 2, 700);
    logits.fill(random, 3.0f);
    check_gradients(logits, 0, 0, temperature, {1e-6f, -1e-6f, 0.0f, 1e-6f});
  }
  for (float level : {3e38f, -3e38f, 1e30f, -3e6f, 8e5f}) {
    Logits<Float32> logits(2, 2, 700);
    for (int64_t cell = 0; cell < 4; ++cell) {
      for (int64_t i = 0; i < 700; ++i) {
        logits.set(cell, i, i % 3 ? level + static_cast<float>(i % 5) : -3.4e38f);
      }
    }
    check_gradients(logits, 0, 0, 0.7, {0.5f, 0.0f, 0.0f, -0.5f});
  }
}

TEST(the_target_of_a_confident_row_keeps_its_digits) {
  for_each_format([&](auto format) {
    using Format = decltype(format);
    for (float spike : {10.0f, 20.0f, 30.0f}) {
      Logits<Format> logits(1, 1, 9000), gradient(1, 1, 9000);
      for (int64_t i = 0; i < 9000; ++i) logits.set(0, i, static_cast<float>(i % 3));
      logits.set(0, 8500, spike);
      const Rows rows = run_forward(logits, {8500});
      run_backward(logits.view(), {8500}, rows, {{1024.0f}, {}}, 1.0, gradient);
      check_gradient(logits, 0, 8500, 1024.0, 0.0, 1.0, gradient);
    }
  });
}

TEST(rows_without_a_loss_are_nan) {
  for_each_format([&](auto format) {
    using Format = decltype(format);
    constexpr int64_t vocab = 3 * kSliceColumns<Format> / 2;
    const auto bad = [&](int64_t target, auto set) {
      Logits<Format> logits(1, 1, vocab), gradient(1, 1, vocab);
      for (int64_t i = 0; i < vocab; ++i) logits.set(0, i, 1.0f);
      set(logits);
      const Rows rows = run_forward(logits, {target}, 1.0);
      CHECK(rows.nll[0] != rows.nll[0]);
      run_backward(logits.view(), {target}, rows, {{1.0f}, {}}, 1.0, gradient);
      bool nan = true;
      for (int64_t i = 0; i < vocab; ++i) nan = nan && gradient.get(0, i) != gradient.get(0, i);
      CHECK(nan);
      return rows;
    };
    for (int64_t target : {int64_t{-1}, vocab, INT64_MAX, INT64_MIN}) {
      const Rows rows = bad(target, [](auto&) {});
      CHECK(rows.prediction[0] == 0);
      CHECK(rows.entropy[0] == std::log(static_cast<float>(vocab)));
    }
    for (int64_t at : {int64_t{0}, int64_t{99}, vocab - 1}) {
      for (float value : {static_cast<float>(NAN), static_cast<float>(INFINITY)}) {
        const Rows rows = bad(3, [&](auto& logits) { logits.set(0, at, value); });
        CHECK(rows.prediction[0] == -1 && rows.entropy[0] != rows.entropy[0] &&
              rows.confidence[0] != rows.confidence[0]);
      }
    }
    const Rows none = bad(3, [&](auto& logits) {
      for (int64_t i = 0; i < vocab; ++i) logits.set(0, i, -INFINITY);
    });
    CHECK(none.prediction[0] == -1 && none.entropy[0] != none.entropy[0]);
  });
}

TEST(a_target_of_minus_infinity_has_a_gradient) {
  std::mt19937 random(8);
  Logits<Float32> logits(1, 1, 5000), gradient(1, 1, 5000);
  logits.fill(random);
  logits.set(0, 4500, -INFINITY);
  const Rows rows = run_forward(logits, {4500}, 1.0);
  CHECK(rows.nll[0] == INFINITY);
  run_backward(logits.view(), {4500}, rows, {{0.5f}, {0.0f}}, 1.0, gradient);
  CHECK(gradient.get(0, 4500) == -0.5);
  check_gradient(logits, 0, 4500, 0.5, 0.0, 1.0, gradient);
}

TEST(a_derivative_of_nan_reaches_every_column) {
  Logits<BFloat16> logits(1, 2, 300), gradient(1, 2, 300);
  for (int64_t cell : {0, 1}) {
    for (int64_t i = 0; i < 300; ++i) logits.set(cell, i, i == 5 ? -INFINITY : 1.0f);
  }
  const std::vector<int64_t> targets{5, 5};
  const Rows rows = run_forward(logits, targets, 1.0);
  run_backward(logits.view(), targets, rows, {{NAN, 1.0f}, {0.0f, NAN}}, 1.0, gradient);
  for (int64_t cell : {0, 1}) {
    for (int64_t i = 0; i < 300; ++i) CHECK(gradient.get(cell, i) != gradient.get(cell, i));
  }
}

// ---- rounding --------------------------------------------------------------------------------

TEST(packing_rounds_as_the_cpu_does) {
  std::mt19937 random(9);
  std::vector<float> values{0.0f,         -0.0f,        1.0f,     65519.0f,  65520.0f,
                            -1e30f,       0x1p-14f,     0x1p-24f, 0x1p-25f,  0x1.8p-25f,
                            0x1.ffcp-15f, 0x1.ffep-15f, INFINITY, -INFINITY, 3.4e38f};
  for (int i = 0; i < 100000; ++i) {
    const float scale = std::ldexp(1.0f, static_cast<int>(random() % 60) - 40);
    const auto mantissa = static_cast<float>(static_cast<int32_t>(random() % 16384) - 8192);
    values.push_back(mantissa / 4096.0f * scale);  // many ties
  }
  bool same = true;
  for_each_format([&](auto format) {
    using Format = decltype(format);
    const r2dllm::cpu::VocabKernels& cpu =
        r2dllm::cpu::portable_kernels()[static_cast<int>(test::type_of(format))];
    for (float value : values) {
      typename Format::Bits want;
      cpu.store(&want, 0, static_cast<double>(value));
      same = same && round_to_format<Format>(value) == want;
    }
    const float nan = Format::value(round_to_format<Format>(NAN));
    CHECK(nan != nan);
  });
  CHECK(same);
}

// ---- the loss of a batch ---------------------------------------------------------------------

TEST(the_loss_of_a_batch_and_its_derivatives) {
  std::mt19937 random(10);
  std::uniform_real_distribution<float> uniform(0.0f, 3.0f);
  for (int64_t rows : {0, 1, 31, 255, 256, 257, 1000}) {
    const auto n = static_cast<size_t>(rows);
    std::vector<float> nll(n), entropy(n), weight(n), d_nll(n), d_entropy(n);
    std::vector<int64_t> prediction(n), targets(n);
    for (size_t i = 0; i < n; ++i) {
      nll[i] = uniform(random);
      entropy[i] = uniform(random);
      weight[i] = uniform(random);
      prediction[i] = static_cast<int64_t>(random() % 3);
      targets[i] = random() % 4 == 0 ? kIgnore : static_cast<int64_t>(random() % 3);
    }
    const double given = 17.0;
    for (EntropyGate gate : {EntropyGate::kCorrect, EntropyGate::kAll}) {
      for (bool plain : {true, false}) {
        float loss = 77.0f;
        const SftReduceParams params{.rows = rows,
                                     .nll = {nll.data(), false},
                                     .entropy = {entropy.data(), false},
                                     .prediction = prediction.data(),
                                     .targets = targets.data(),
                                     .ignore_index = kIgnore,
                                     .weight = plain ? nullptr : weight.data(),
                                     .normalizer = plain ? nullptr : &given,
                                     .entropy_weight = 0.25,
                                     .gate = gate,
                                     .loss = {&loss, false},
                                     .d_nll = {d_nll.data(), false},
                                     .d_entropy = {d_entropy.data(), false}};
        test::launch<LossSums>(
            1, kReduceThreads, static_cast<unsigned>(rows), kReduceThreads * sizeof(LossSums),
            [&](FibreLane& lane, LossSums* sums) { sft_reduce_body(lane, sums, params); });
        double sum = 0.0, sum_entropy = 0.0;
        int64_t counted = 0, gated = 0;
        for (size_t i = 0; i < n; ++i) {
          if (targets[i] == kIgnore) continue;
          sum += (plain ? 1.0 : static_cast<double>(weight[i])) * static_cast<double>(nll[i]);
          ++counted;
          if (gate == EntropyGate::kCorrect && prediction[i] != targets[i]) continue;
          sum_entropy += static_cast<double>(entropy[i]);
          ++gated;
        }
        const double normalizer = plain ? static_cast<double>(counted) : given;
        const double want = (counted ? sum / normalizer : 0.0) +
                            (gated ? 0.25 * sum_entropy / static_cast<double>(gated) : 0.0);
        // Nothing is negative: a rounding to float32, and of doubles one a row.
        CHECK(std::abs(static_cast<double>(loss) - want) <=
              want * (0x1p-24 + static_cast<double>(rows + 4) * 0x1p-53));
        for (size_t i = 0; i < n; ++i) {
          const bool counts = targets[i] != kIgnore;
          const bool passes = counts && (gate == EntropyGate::kAll || prediction[i] == targets[i]);
          const double w = plain ? 1.0 : static_cast<double>(weight[i]);
          const double derivative = counts ? w / normalizer : 0.0;
          CHECK(std::abs(static_cast<double>(d_nll[i]) - derivative) <=
                derivative * (0x1p-24 + 4 * 0x1p-53));
          CHECK(d_entropy[i] ==
                (passes ? static_cast<float>(0.25 / static_cast<double>(gated)) : 0.0f));
        }
      }
    }
  }
}

}  // namespace

int main() { return test::run_all(); }

// SPDX-License-Identifier: Apache-2.0
#include "sampling.h"

#include <algorithm>
#include <array>
#include <cfloat>

namespace r2dllm::cpu {
namespace {

// The least logit that a restriction keeps, by radix selection: histograms over parts of
// the sort key, in place of sorting V logits. Ties at the border are kept.
class Cutoff {
 public:
  Cutoff(const VocabPass& pass, int64_t cell, double scale)
      : pass_(pass), cell_(cell), max_(pass.stats(cell).max), scale_(scale) {}

  // Keep logits from the greatest down until `enough` of them (or of their mass) are kept.
  template <class Weight>
  uint64_t find(uint64_t least, double enough, Weight weight) const {
    uint64_t prefix = 0;
    double above = 0.0;
    // The last 20 bits of the key of a float are zero.
    const int parts = pass_.logit_bytes() == 8 ? 6 : 4;
    for (int part = 0; part < parts; ++part) {
      const int shift = kShifts[part], bits = kBits[part];
      std::array<double, 2048> histogram{};
      for_each_logit([&](double logit) {
        const uint64_t key = logit_key(logit);
        if (key < least || (part > 0 && (key >> kShifts[part - 1]) != prefix)) return;
        histogram[(key >> shift) & ((uint64_t{1} << bits) - 1)] += weight(logit);
      });
      uint32_t chosen = 0;
      double above_chosen = above;
      for (uint32_t bin = 1u << bits; bin-- > 0;) {
        if (histogram[bin] == 0.0) continue;
        chosen = bin;
        above_chosen = above;
        above += histogram[bin];
        if (above >= enough) break;
      }
      above = above_chosen;
      prefix = (prefix << bits) | chosen;
    }
    return prefix << kShifts[parts - 1];
  }

  template <class F>
  void for_each_logit(F f) const {
    for (int64_t slice = 0; slice < pass_.slices(); ++slice) {
      pass_.with_slice(cell_, slice, [&](const char* data) {
        for (int64_t i = 0; i < pass_.slice_size(slice); ++i) f(pass_.kernels().load(data, i));
        return 0;
      });
    }
  }

  double term(double logit) const { return exp2((logit - max_) * scale_); }

 private:
  static constexpr int kBits[] = {11, 11, 11, 11, 10, 10};
  static constexpr int kShifts[] = {53, 42, 31, 20, 10, 0};

  const VocabPass& pass_;
  int64_t cell_;
  double max_, scale_;
};

// The kernels count what vanishes beside the maximum, whose term is 1, as 2^-115. Nothing may be
// drawn from among that alone: 4096 of these are less than kLeastOfSlice, 64 less than
// kLeastOfGroup, and what is more has a part that is more.
constexpr double kLeastOfSlice = 1e-30, kLeastOfGroup = 1e-32;
static_assert(kSliceWidth * 0x1p-115 < kLeastOfSlice && 64 * 0x1p-115 < kLeastOfGroup &&
              kLeastOfSlice / (kSliceWidth / 64) > kLeastOfGroup && kLeastOfGroup / 64 > 0x1p-115);

// The first i whose cumulative mass exceeds `target`, which becomes the remainder within i.
// Rounding may leave no such i: then the last one of any mass, which is more than `least`.
template <class Mass>
int64_t choose(int64_t n, double& target, double least, Mass mass) {
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double m = mass(i);
    if (!(m > least)) continue;
    last = i;
    if (target < m) return i;
    target -= m;
  }
  target = INFINITY;
  return last;
}

}  // namespace

DrawnToken draw_token(const VocabPass& pass, int64_t cell, const SamplingOptions& options,
                      double uniform) {
  // Finite: the greatest logit has a term of 1 at any temperature.
  const double scale = std::min(tempered_scale(options.temperature), DBL_MAX);
  const double max = pass.stats(cell).max;
  const VocabKernels& kernels = pass.kernels();
  const Cutoff cutoff(pass, cell, scale);

  uint64_t least = logit_key(pass.logit_bytes() == 8 ? -DBL_MAX : -FLT_MAX);
  if (options.top_k > 0) {
    const uint64_t kth =
        cutoff.find(least, static_cast<double>(options.top_k), [](double) { return 1.0; });
    least = std::max(least, kth);
  }
  if (options.top_p < 1.0) {
    double mass = 0.0;
    cutoff.for_each_logit([&](double logit) {
      if (logit_key(logit) >= least) mass += cutoff.term(logit);
    });
    least = std::max(least, cutoff.find(least, options.top_p * mass,
                                        [&](double logit) { return cutoff.term(logit); }));
  }
  if (options.min_p > 0.0) least = std::max(least, logit_key(min_p_cutoff(max, options)));
  const double lowest = logit_of_key(least);

  // Inverse CDF by levels: a slice, 64 columns of it, one of these.
  std::vector<double> mass(pass.slices());
  double total = 0.0;
  for (int64_t slice = 0; slice < pass.slices(); ++slice) {
    mass[slice] = pass.with_slice(cell, slice, [&](const char* data) {
      return kernels.tempered_mass(data, pass.slice_size(slice), max, scale, lowest);
    });
    total += mass[slice];
  }
  double target = uniform * total;
  const int64_t slice =
      choose(pass.slices(), target, kLeastOfSlice, [&](int64_t i) { return mass[i]; });
  return pass.with_slice(cell, slice, [&](const char* data) -> DrawnToken {
    constexpr int64_t kWidth = 64;
    const int64_t size = pass.slice_size(slice);
    const int64_t group =
        choose((size + kWidth - 1) / kWidth, target, kLeastOfGroup, [&](int64_t i) {
          return kernels.tempered_mass(data + i * kWidth * pass.logit_bytes(),
                                       std::min(kWidth, size - i * kWidth), max, scale, lowest);
        });
    const int64_t first = group * kWidth;
    const auto term = [&](int64_t i) {
      const double logit = kernels.load(data, first + i);
      return logit >= lowest ? cutoff.term(logit) : 0.0;
    };
    const int64_t chosen = choose(std::min(kWidth, size - first), target, 0.0, term);
    return {slice * kSliceWidth + first + chosen, term(chosen) / total};
  });
}

}  // namespace r2dllm::cpu

// SPDX-License-Identifier: Apache-2.0
// The pass over V: one thread block per slice. A thread issues all its loads before it looks at the
// first value, tracks no index, and meets the others of its block twice.
//
// Terms are exp(z - max of the slice) by one exp2 each; the greatest is 1 exactly, and -inf, +inf
// and NaN lead to the right sums (0, NaN, NaN) without a branch.
#pragma once

#include "../rules/row_stats.h"
#include "vocab_row.h"

namespace r2dllm::cuda {

struct SliceShared {
  float max[kSliceThreads / kWarp];
  int32_t first[kSliceThreads / kWarp];
  double mass[kSliceThreads / kWarp];
  TemperedSums other[kSliceThreads / kWarp];
};

// Which of a slice's sums at the temperature are wanted; the moment comes with the mass.
enum class Tempered { kNone, kMass, kMoment };

template <class Format, class Lane>
R2D_DEVICE void load_slice(Lane& lane, const VocabRow<Format>& row, int64_t begin,
                           Words (&vectors)[kLoads]) {
  constexpr int64_t kStep = kSliceThreads * kVector<Format>;
  const int64_t mine = begin + lane.thread() * kVector<Format>;
  if (begin + kSliceColumns<Format> <= row.vocab && is_aligned(row.data + begin)) {
    const auto* data = row.data + mine;
    R2D_UNROLL
    for (int g = 0; g < kLoads; ++g) vectors[g] = lane.load(data + g * kStep);
  } else {
    R2D_UNROLL
    for (int g = 0; g < kLoads; ++g) vectors[g] = load_columns(lane, row, mine + g * kStep);
  }
  if (row.excluded >= begin && row.excluded < begin + kSliceColumns<Format>) {
    R2D_UNROLL
    for (int g = 0; g < kLoads; ++g) hide(row, mine + g * kStep, vectors[g]);
  }
}

// In float32, as a tree: no chain of roundings.
template <class Format, class Term>
R2D_DEVICE auto sum_of_terms(const Words& vector, Term term) {
  decltype(term(0.0f)) terms[kVector<Format>];
  R2D_UNROLL
  for (int i = 0; i < kVector<Format>; ++i) terms[i] = term(value<Format>(vector, i));
  R2D_UNROLL
  for (int width = kVector<Format> / 2; width > 0; width /= 2) {
    R2D_UNROLL
    for (int i = 0; i < width; ++i) terms[i] += terms[i + width];
  }
  return terms[0];
}

constexpr float kLog2eFloat = 1.44269502f;

struct FloatSums {
  float mass, moment;
  R2D_DEVICE void operator+=(const FloatSums& other) {
    mass += other.mass;
    moment += other.moment;
  }
};

// 2^x is 0 in float32 from here on down, and x * 2^x no NaN.
constexpr float kLeastExponent = -200.0f;

// Thread 0 gets the partial, and of `other` what kTempered says; with kEntropy its moment is that
// at temperature 1. `scale` = log2(e) / temperature.
template <class Format, Tempered kTempered, bool kEntropy, class Lane>
R2D_DEVICE SlicePartial slice_partial(Lane& lane, SliceShared& shared, const VocabRow<Format>& row,
                                      int64_t begin, float scale, TemperedSums* other) {
  static_assert(!kEntropy || kTempered != Tempered::kMoment, "there is room for one moment");
  constexpr int kWarps = kSliceThreads / kWarp;
  constexpr bool kIsTempered = kTempered != Tempered::kNone;
  constexpr bool kMoment = kTempered == Tempered::kMoment;
  constexpr bool kIsMoment = kMoment || kEntropy;
  Words vectors[kLoads];
  load_slice(lane, row, begin, vectors);
  lane.release_next();

  uint32_t pairs = Format::kNegativeInfinity;
  R2D_UNROLL
  for (int g = 0; g < kLoads; ++g) {
    R2D_UNROLL
    for (int w = 0; w < 4; ++w) pairs = Format::max(pairs, vectors[g].word[w]);
  }
  const float my_max = greatest<Format>(pairs);
  const float max_of_warp = warp_max(lane, my_max);
  if (place_in_warp(lane) == 0) shared.max[warp_of(lane)] = max_of_warp;
  lane.sync(kSliceThreads);
  float max = shared.max[0];
  R2D_UNROLL
  for (int w = 1; w < kWarps; ++w) max = fmaxf(max, shared.max[w]);

  // If all is -inf, z - zero is not NaN but -inf.
  const float zero = fmaxf(max, -FLT_MAX);
  const auto term = [&](float z) { return lane.exp2((z - zero) * kLog2eFloat); };
  const auto tempered_term = [&](float z) {
    if constexpr (kMoment) {
      const float u = fmaxf((z - zero) * scale, kLeastExponent), power = lane.exp2(u);
      return FloatSums{power, power * u};
    } else {
      return FloatSums{lane.exp2((z - zero) * scale), 0.0f};
    }
  };
  double mass = 0.0;
  TemperedSums sums{0.0, 0.0};
  R2D_UNROLL
  for (int g = 0; g < kLoads; ++g) {
    if constexpr (kEntropy) {
      // The moment as a chain: a tree takes more registers than there are.
      float moment = 0.0f;
      mass += static_cast<double>(sum_of_terms<Format>(vectors[g], [&](float z) {
        const float u = (z - zero) * kLog2eFloat, power = lane.exp2(u);
        moment += power * fmaxf(u, kLeastExponent);
        return power;
      }));
      sums.moment += static_cast<double>(moment);
    } else {
      mass += static_cast<double>(sum_of_terms<Format>(vectors[g], term));
    }
    if constexpr (kIsTempered) {
      const FloatSums of_vector = sum_of_terms<Format>(vectors[g], tempered_term);
      sums.mass += static_cast<double>(of_vector.mass);
      if constexpr (kMoment) sums.moment += static_cast<double>(of_vector.moment);
    }
  }

  int32_t first = INT32_MAX;
  if (my_max == max) {
    int32_t found = 0;
    Words winner = vectors[0];
    R2D_UNROLL
    for (int g = kLoads - 1; g >= 0; --g) {
      uint32_t of_vector = vectors[g].word[0];
      R2D_UNROLL
      for (int w = 1; w < 4; ++w) of_vector = Format::max(of_vector, vectors[g].word[w]);
      if (greatest<Format>(of_vector) == max) {
        found = g;
        winner = vectors[g];
      }
    }
    // The vector with the greatest term again, in double: there a rounding of float32 would be as
    // large as the last bit of the result.
    mass -= static_cast<double>(sum_of_terms<Format>(winner, term));
    if constexpr (kMoment) {
      sums.mass -= static_cast<double>(sum_of_terms<Format>(winner, tempered_term).mass);
    }
    const int32_t column = (found * kSliceThreads + lane.thread()) * kVector<Format>;
    R2D_UNROLL
    for (int i = kVector<Format> - 1; i >= 0; --i) {
      const float z = value<Format>(winner, i);
      mass += static_cast<double>(term(z));
      if constexpr (kMoment) sums.mass += static_cast<double>(tempered_term(z).mass);
      if (z == max) first = column + i;
    }
  }

  mass = warp_sum(lane, mass);
  first = -lane.max(-first);
  if constexpr (kIsTempered) sums.mass = warp_sum(lane, sums.mass);
  if constexpr (kIsMoment) sums.moment = warp_sum(lane, sums.moment);
  if (place_in_warp(lane) == 0) {
    shared.mass[warp_of(lane)] = mass;
    shared.first[warp_of(lane)] = first;
    if constexpr (kIsTempered || kIsMoment) shared.other[warp_of(lane)] = sums;
  }
  lane.sync(kSliceThreads);
  if (lane.thread() != 0) return {};
  R2D_UNROLL
  for (int w = 1; w < kWarps; ++w) {
    mass += shared.mass[w];
    first = shared.first[w] < first ? shared.first[w] : first;
    if constexpr (kIsTempered) sums.mass += shared.other[w].mass;
    if constexpr (kIsMoment) sums.moment += shared.other[w].moment;
  }
  if constexpr (kIsTempered || kIsMoment) *other = sums;
  return {mass, max, static_cast<int32_t>(begin) + first};
}

// In float32, and no less than its least normal number: -inf times 0 would be no weight but NaN.
R2D_HOST_DEVICE float narrow_scale(double scale) {
  const auto narrow = static_cast<float>(scale);
  return narrow > FLT_MIN ? narrow : FLT_MIN;
}

// One scale for all rows.
struct SameScale {
  float scale;
  R2D_DEVICE float operator()(int64_t) const { return scale; }
};

// Block `cell * slices + slice`. `is_candidate(cell)`: the logits of cells that are none are not
// read. `scale_of(row)`: log2(e) / temperature, asked if anything is tempered.
template <class Format, Tempered kTempered, bool kEntropy, class Lane, class IsCandidate,
          class ScaleOf>
R2D_DEVICE void slice_body(Lane& lane, SliceShared& shared, const LogitsView& logits,
                           const IsCandidate& is_candidate, const VocabWorkspace& workspace,
                           const ScaleOf& scale_of) {
  const auto block = static_cast<uint32_t>(lane.block()),
             slices = static_cast<uint32_t>(workspace.slices);
  const int64_t cell = block / slices, slice = block % slices;
  if (!is_candidate(cell)) return;
  float scale = 0.0f;
  if constexpr (kTempered != Tempered::kNone) scale = scale_of(row_number(logits, cell));
  TemperedSums other;
  const SlicePartial partial = slice_partial<Format, kTempered, kEntropy>(
      lane, shared, row_of<Format>(logits, cell), slice * kSliceColumns<Format>, scale, &other);
  if (lane.thread() != 0) return;
  workspace.partial[lane.block()] = partial;
  if constexpr (kTempered != Tempered::kNone) workspace.tempered[lane.block()] = other.mass;
  if constexpr (kTempered == Tempered::kMoment || kEntropy) {
    workspace.moment[lane.block()] = other.moment;
  }
}

}  // namespace r2dllm::cuda

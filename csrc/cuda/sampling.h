// SPDX-License-Identifier: Apache-2.0
// Drawing a token at temperature > 0: inverse CDF in the order of the vocabulary, by levels - a
// slice by its mass, 512 bytes of it, 16 bytes of these, a column - so that of the row only one
// slice is read again and one random number is spent. top-k and top-p first find the least logit
// that they keep, by bisection of its bits: sums and counts alone, no sort and no atomics; min-p
// knows it.
//
// Rows may differ in their options. A RowOptions has
//   operator()(row)           SamplingOptions; a temperature that is not > 0: the row draws nothing
//   uniform(row, position)    the random number of a cell, in [0, 1)
#pragma once

#include "../rules/decode_step.h"
#include "../rules/random.h"
#include "../rules/sampling.h"
#include "vocab_merge.h"
#include "vocab_slice.h"

namespace r2dllm::cuda {

// log2(e) / temperature; a temperature near 0 is the argmax.
R2D_HOST_DEVICE double tempering(const SamplingOptions& options) {
  const double scale = tempered_scale(options.temperature);
  return scale < 1e30 ? scale : 1e30;
}

// The scales of a RowOptions for the pass over V.
template <class RowOptions>
struct RowScale {
  RowOptions options;
  R2D_DEVICE float operator()(int64_t row) const { return narrow_scale(tempering(options(row))); }
};

R2D_DEVICE int lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

R2D_DEVICE int highest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(static_cast<int>(bits));
#else
  return 31 - __builtin_clz(bits);
#endif
}

// The first lane whose cumulative mass exceeds `target`, which becomes the remainder within it.
// Rounding may leave no such lane: then the last one of any mass.
template <class Lane>
R2D_DEVICE int choose_lane(Lane& lane, double mass, double& target) {
  const int place = place_in_warp(lane);
  double cumulative = mass;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double before = lane.shuffle(cumulative, place < offset ? place : place - offset);
    if (place >= offset) cumulative += before;
  }
  const uint32_t beyond = lane.ballot(mass > 0.0 && target < cumulative),
                 some = lane.ballot(mass > 0.0);
  const int chosen = beyond != 0 ? lowest_bit(beyond) : some != 0 ? highest_bit(some) : 0;
  const double before = lane.shuffle(cumulative, chosen > 0 ? chosen - 1 : 0);
  target = beyond == 0 ? static_cast<double>(INFINITY) : chosen > 0 ? target - before : target;
  return chosen;
}

struct DrawShared {
  double scale;  // log2(e) / temperature of the cell's row; 0: nothing is drawn
  double uniform;
  double total;        // mass of the row at the temperature; here since registers are full
  double mass[kWarp];  // of 512 bytes each, in the order of the vocabulary
};

struct Drawn {
  int32_t id;        // -1: nothing is drawn
  float confidence;  // untempered probability
  float tempered;    // probability in the distribution that it was drawn from
};

static_assert(kLoads * kSliceThreads == kWarp * kWarp, "a warp chooses among a slice's parts");

// kSliceThreads threads; one of them gets the token (id >= 0), the others id -1.
template <class Format, class Lane>
R2D_DEVICE Drawn draw(Lane& lane, DrawShared& shared, const VocabRow<Format>& row,
                      const SlicePartial& merged, const SlicePartial* partial,
                      const double* tempered, int64_t slices, float lowest, double scale,
                      double uniform) {
  // The total is 1 at least. A slice with less than this counts as nothing: its terms may all
  // vanish in float32, and nothing must be drawn from there.
  constexpr double kLeastMass = 1e-30;
  const auto slice_mass = [&](int64_t i) {
    if (!(tempered[i] > 0.0)) return 0.0;
    const double mass = tempered[i] * weight(partial[i].max, merged.max, scale);
    return mass > kLeastMass ? mass : 0.0;
  };
  // Every warp does the same up to here.
  double total = 0.0;
  for (int64_t i = place_in_warp(lane); i < slices; i += kWarp) total += slice_mass(i);
  total = warp_sum(lane, total);
  double target = uniform * total;
  int64_t begin = 0, end = slices;
  do {
    const int64_t share = (end - begin + kWarp - 1) / kWarp;
    const int64_t from = begin + place_in_warp(lane) * share;
    double mass = 0.0;
    for (int64_t i = from; i < from + share && i < end; ++i) mass += slice_mass(i);
    begin += choose_lane(lane, mass, target) * share;
    end = begin + share < end ? begin + share : end;
  } while (end - begin > 1);

  // The slice again: 32 runs of 512 bytes, run g * warps + w by warp w.
  constexpr int kWarps = kSliceThreads / kWarp;
  const float narrow = narrow_scale(scale);
  const auto term = [&](float z) {
    return z >= lowest ? lane.exp2((z - merged.max) * narrow) : 0.0f;
  };
  constexpr int64_t kStep = kSliceThreads * kVector<Format>;
  const int64_t mine = begin * kSliceColumns<Format> + lane.thread() * kVector<Format>;
  R2D_UNROLL
  for (int g = 0; g < kLoads; ++g) {
    const Words vector = load_vector(lane, row, mine + g * kStep);
    const double of_warp = warp_sum(lane, static_cast<double>(sum_of_terms<Format>(vector, term)));
    if (place_in_warp(lane) == 0) shared.mass[g * kWarps + warp_of(lane)] = of_warp;
  }
  if (lane.thread() == 0) shared.total = total;
  lane.sync(kSliceThreads);
  const int run = choose_lane(lane, shared.mass[place_in_warp(lane)], target);
  const int64_t column = mine + run / kWarps * kStep;
  const Words vector = load_vector(lane, row, column);
  const auto my_mass = static_cast<double>(sum_of_terms<Format>(vector, term));
  const int place = choose_lane(lane, my_mass, target);
  if (warp_of(lane) != run % kWarps || place_in_warp(lane) != place) {
    return {-1, 0.0f, 0.0f};
  }

  int chosen = 0;
  float logit = merged.max;
  bool open = true;
  R2D_UNROLL
  for (int i = 0; i < kVector<Format>; ++i) {
    const float z = value<Format>(vector, i), m = term(z);
    if (open && m > 0.0f) {
      chosen = i;
      logit = z;
      open = !(target < static_cast<double>(m));
      target -= static_cast<double>(m);
    }
  }
  return {static_cast<int32_t>(column + chosen),
          static_cast<float>(weight(logit, merged.max, kLog2eWide) / merged.mass),
          static_cast<float>(weight(logit, merged.max, scale) / shared.total)};
}

// Block = cell.
template <class Format, class Lane, class IsCandidate, class RowOptions>
R2D_DEVICE void draw_body(Lane& lane, DrawShared& shared, const LogitsView& logits,
                          const IsCandidate& is_candidate, const VocabWorkspace& workspace,
                          const RowOptions& row_options, Drawn* drawn) {
  const int64_t cell = lane.block(), slices = workspace.slices;
  if (!is_candidate(cell)) return;
  const int64_t b = row_number(logits, cell);
  if (lane.thread() == 0) {
    const SamplingOptions options = row_options(b);
    const bool draws = options.temperature > 0.0;
    shared.scale = draws ? tempering(options) : 0.0;
    if (draws) {
      shared.uniform = row_options.uniform(b, cell - b * logits.length);
    } else {
      drawn[cell].id = -1;
    }
  }
  lane.sync(kSliceThreads);
  if (!(shared.scale > 0.0)) return;
  const SlicePartial* partial = workspace.partial + cell * slices;
  const SlicePartial merged = merge_slices(lane, partial, slices);
  if (!(merged.mass > 0.0)) return;
  const Drawn result = draw<Format>(lane, shared, row_of<Format>(logits, cell), merged, partial,
                                    workspace.tempered + cell * slices, slices,
                                    workspace.cutoff != nullptr ? workspace.cutoff[cell] : -FLT_MAX,
                                    shared.scale, shared.uniform);
  if (result.id >= 0) drawn[cell] = result;
}

// ---- top-k, top-p, min-p ------------------------------------------------------------------------

constexpr int kCutoffThreads = 1024;

struct CutoffShared {
  SamplingOptions options;  // of the cell's row
  double part[kCutoffThreads / kWarp];
};

template <class Lane>
R2D_DEVICE double block_sum(Lane& lane, CutoffShared& shared, double x) {
  const double of_warp = warp_sum(lane, x);
  if (place_in_warp(lane) == 0) shared.part[warp_of(lane)] = of_warp;
  lane.sync(kCutoffThreads);
  const double total = warp_sum(lane, shared.part[place_in_warp(lane)]);
  lane.sync(kCutoffThreads);
  return total;
}

// Keys are unsigned integers that order like the logits; some are the bits of a NaN.
R2D_DEVICE float logit_of(uint32_t key) {
  return bit_cast<float>(ordered(static_cast<int32_t>(key ^ 0x80000000u)));
}

// Block = cell, kCutoffThreads threads: workspace.cutoff, and workspace.tempered of what is kept. A
// row that keeps everything keeps the masses that the pass over V left there.
template <class Format, class Lane, class IsCandidate, class RowOptions>
R2D_DEVICE void cutoff_body(Lane& lane, CutoffShared& shared, const LogitsView& logits,
                            const IsCandidate& is_candidate, const VocabWorkspace& workspace,
                            const RowOptions& row_options) {
  const int64_t cell = lane.block(), slices = workspace.slices;
  if (!is_candidate(cell)) return;
  if (lane.thread() == 0) shared.options = row_options(row_number(logits, cell));
  lane.sync(kCutoffThreads);
  const SamplingOptions& options = shared.options;
  if (!(options.temperature > 0.0)) return;
  if (!restricts(options)) {
    if (lane.thread() == 0) workspace.cutoff[cell] = -FLT_MAX;
    return;
  }
  const float narrow = narrow_scale(tempering(options));
  const SlicePartial* partial = workspace.partial + cell * slices;
  const SlicePartial merged = merge_slices(lane, partial, slices);
  if (!(merged.mass > 0.0)) return;
  const VocabRow<Format> row = row_of<Format>(logits, cell);

  // Sum of weight(logit) over logits in [begin, end) that are at least `lowest`.
  const auto total = [&](int64_t begin, int64_t end, float lowest, auto weight) {
    double sum = 0.0;
    for (int64_t column = begin + lane.thread() * kVector<Format>; column < end;
         column += kCutoffThreads * kVector<Format>) {
      sum += static_cast<double>(sum_of_terms<Format>(
          load_vector(lane, row, column), [&](float z) { return z >= lowest ? weight(z) : 0.0f; }));
    }
    return block_sum(lane, shared, sum);
  };
  const auto one = [](float) { return 1.0f; };
  const auto term = [&](float z) { return lane.exp2((z - merged.max) * narrow); };
  // The greatest logit such that it and all above it weigh `enough`; `lowest` if all of these
  // don't.
  const auto least_of = [&](float lowest, double enough, auto weight) {
    uint32_t key = 0;
    for (int bit = 31; bit >= 32 - Format::kKeyBits; --bit) {
      const uint32_t higher = key | 1u << bit;
      const float candidate = logit_of(higher);
      if (candidate <= lowest ||
          (candidate > lowest && total(0, row.vocab, candidate, weight) >= enough)) {
        key = higher;
      }
    }
    const float found = logit_of(key);
    return found > lowest ? found : lowest;
  };

  float lowest = -FLT_MAX;
  if (options.top_k > 0) lowest = least_of(lowest, static_cast<double>(options.top_k), one);
  if (options.top_p < 1.0) {
    lowest = least_of(lowest, options.top_p * total(0, row.vocab, lowest, term), term);
  }
  if (options.min_p > 0.0) {
    lowest = fmaxf(lowest, least_float(min_p_cutoff(merged.max, options)));
  }
  if (lane.thread() == 0) workspace.cutoff[cell] = lowest;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t begin = slice * kSliceColumns<Format>,
                  end = begin + kSliceColumns<Format> < row.vocab ? begin + kSliceColumns<Format>
                                                                  : row.vocab;
    const float max = partial[slice].max;
    double mass = 0.0;
    if (max >= lowest) {
      mass = total(begin, end, lowest, [&](float z) { return lane.exp2((z - max) * narrow); });
    }
    if (lane.thread() == 0) workspace.tempered[cell * slices + slice] = mass;
  }
}

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
// The loss of rows: its statistics after the pass over V, and the gradient, 16 bytes read for 16
// bytes written.
#pragma once

#include "../ops/row_stats.h"
#include "vocab_merge.h"
#include "vocab_slice.h"

namespace r2dllm::cuda {

struct HasTarget {
  const int64_t* targets;
  int64_t ignore_index;
  R2D_DEVICE bool operator()(int64_t cell) const { return targets[cell] != ignore_index; }
};

// ---- statistics ------------------------------------------------------------------------------

// A warp per cell. A target that is no id makes the row NaN: to raise would take a synchronisation.
// `scale` = log2(e) / temperature; 0: no entropy.
template <class Format, class Lane>
R2D_DEVICE void row_stats_body(Lane& lane, const RowStatsParams& params,
                               const VocabWorkspace& workspace, double scale) {
  const int64_t cell = lane.block() * (lane.threads() / kWarp) + warp_of(lane);
  if (cell >= params.logits.batch * params.logits.length) return;
  const int64_t target = params.targets[cell], slices = workspace.slices, first = cell * slices;
  const bool writes = place_in_warp(lane) == 0;
  lane.await_previous();
  if (target == params.ignore_index) {
    if (!writes) return;
    params.nll.set(cell, 0.0);
    params.entropy.set(cell, 0.0);
    params.confidence[cell] = 0.0f;
    params.prediction[cell] = -1;
    params.state[cell] = RowState{};
    return;
  }
  const SlicePartial merged = merge_slices(lane, workspace.partial + first, slices);
  TemperedSums tempered{0.0, 0.0};
  if (scale != 0.0) {
    for (int64_t i = first + place_in_warp(lane); i < first + slices; i += kWarp) {
      const double below =
          static_cast<double>(workspace.partial[i].max) - static_cast<double>(merged.max);
      const TemperedSums part =
          rebased({workspace.tempered[i], workspace.moment[i]}, below * scale);
      tempered.mass += part.mass;
      tempered.moment += part.moment;
    }
    tempered = {warp_sum(lane, tempered.mass), warp_sum(lane, tempered.moment)};
  }
  if (!writes) return;

  const Top top = top_of(merged.mass, merged.argmax);
  const bool valid = top.id >= 0, is_id = target >= 0 && target < params.logits.vocab;
  RowState state{merged.max, 0.0, NAN, NAN, tempered.mass, tempered.moment};
  if (valid && is_id) {
    const OnlineSoftmax row = stats_of(merged.max, merged.mass);
    const float logit = Format::value(row_of<Format>(params.logits, cell).data[target]);
    state.exponent = row.exponent;
    state.sum = row.sum;
    state.nll = negative_log_likelihood(stats_of(logit, 1.0), row);
  }
  params.nll.set(cell, state.nll);
  params.entropy.set(cell, scale == 0.0 ? 0.0 : valid ? entropy(tempered) : NAN);
  params.prediction[cell] = top.id;
  params.confidence[cell] = top.confidence;
  params.state[cell] = state;
}

// ---- gradient --------------------------------------------------------------------------------

// A Lane for load_slice of memory that the thread writes afterwards.
template <class Lane>
struct OwnColumns {
  Lane& lane;
  R2D_DEVICE int thread() const { return lane.thread(); }
  R2D_DEVICE Words load(const void* p) const { return lane.load_own(p); }
};

// The other way from load_slice: what lies beyond the row is not written.
template <class Format, class Lane>
R2D_DEVICE void store_slice(Lane& lane, typename Format::Bits* row, int64_t vocab, int64_t begin,
                            const Words (&vectors)[kLoads]) {
  constexpr int64_t kStep = kSliceThreads * kVector<Format>;
  const int64_t mine = begin + lane.thread() * kVector<Format>;
  if (begin + kSliceColumns<Format> <= vocab && is_aligned(row + begin)) {
    R2D_UNROLL
    for (int g = 0; g < kLoads; ++g) lane.store(row + mine + g * kStep, vectors[g]);
    return;
  }
  R2D_UNROLL
  for (int g = 0; g < kLoads; ++g) {
    const int64_t column = mine + g * kStep;
    if (column + kVector<Format> <= vocab && is_aligned(row + column)) {
      lane.store(row + column, vectors[g]);
      continue;
    }
    R2D_UNROLL
    for (int i = 0; i < kVector<Format>; ++i) {
      if (column + i < vocab) row[column + i] = bits<Format>(vectors[g], i);
    }
  }
}

// logit_gradient of the columns of a vector, in float32. -inf has a gradient of exactly 0; a row
// that is_nan gives NaN everywhere without a branch.
template <class Format, bool kEntropy, class Lane>
R2D_DEVICE Words gradient_of(Lane& lane, const RowGradient& row, const Words& logits) {
  const float max = static_cast<float>(row.max), softmax = static_cast<float>(row.softmax),
              scale = static_cast<float>(row.scale), entropy = static_cast<float>(row.entropy),
              mean = static_cast<float>(row.mean);
  float gradient[kVector<Format>];
  R2D_UNROLL
  for (int i = 0; i < kVector<Format>; ++i) {
    const float below = value<Format>(logits, i) - max;
    gradient[i] = softmax * lane.exp2(below * kLog2eFloat);
    if constexpr (kEntropy) {
      const float u = fmaxf(below * scale, kLeastExponent);
      gradient[i] = fmaf(entropy * lane.exp2(u), u - mean, gradient[i]);
    }
  }
  Words rounded;
  R2D_UNROLL
  for (int w = 0; w < 4; ++w) rounded.word[w] = Format::pack(gradient + w * kPair<Format>);
  return rounded;
}

// Block `cell * slices + slice`, kSliceThreads threads. `params.gradient` may be the logits: a
// thread writes the columns that it has read, and no others. Rows without a target are not read.
template <class Format, class Lane>
R2D_DEVICE void gradient_body(Lane& lane, RowGradient& shared, const RowStatsBackwardParams& params,
                              int64_t slices, double scale) {
  const auto block = static_cast<uint32_t>(lane.block()),
             length = static_cast<uint32_t>(params.logits.length);
  const int64_t cell = block / static_cast<uint32_t>(slices),
                begin = block % static_cast<uint32_t>(slices) * kSliceColumns<Format>;
  const int64_t vocab = params.logits.vocab, target = params.targets[cell] - params.first_id;
  auto* out = static_cast<typename Format::Bits*>(params.gradient) +
              static_cast<uint32_t>(cell) / length * params.gradient_batch_stride +
              static_cast<uint32_t>(cell) % length * params.gradient_length_stride;
  Words vectors[kLoads] = {};
  bool owns_target = false;
  float target_logit = 0.0f;
  if (params.targets[cell] != params.ignore_index) {
    const VocabRow<Format> row = row_of<Format>(params.logits, cell);
    OwnColumns<Lane> own{lane};
    load_slice(own, row, begin, vectors);
    if (lane.thread() == 0) {
      const double d_entropy = params.d_entropy.data ? params.d_entropy.get(cell) : 0.0;
      shared = row_gradient(params.state[cell], params.d_nll.get(cell), d_entropy, scale);
    }
    lane.sync(kSliceThreads);
    const RowGradient gradient = shared;
    // The thread that has the target's column reads its logit now and writes it last.
    const uint64_t offset = static_cast<uint64_t>(target) - static_cast<uint64_t>(begin);
    owns_target =
        offset < kSliceColumns<Format> && target < vocab &&
        offset / kVector<Format> % kSliceThreads == static_cast<uint64_t>(lane.thread()) &&
        !is_nan(gradient);
    if (owns_target) target_logit = Format::value(row.data[target]);
    if (gradient.entropy != 0.0) {
      R2D_UNROLL
      for (int g = 0; g < kLoads; ++g) {
        vectors[g] = gradient_of<Format, true>(lane, gradient, vectors[g]);
      }
    } else {
      R2D_UNROLL
      for (int g = 0; g < kLoads; ++g) {
        vectors[g] = gradient_of<Format, false>(lane, gradient, vectors[g]);
      }
    }
  }
  store_slice<Format>(lane, out, vocab, begin, vectors);
  if (!owns_target) return;
  out[target] = round_to_format<Format>(static_cast<float>(
      target_gradient(shared, target_logit, params.d_nll.get(cell), params.state[cell].nll)));
}

}  // namespace r2dllm::cuda

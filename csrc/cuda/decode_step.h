// SPDX-License-Identifier: Apache-2.0
// Everything after the pass over V: one thread block per batch row. What does not depend on the
// pass is fetched while it still runs; the rules then work on shared memory alone.
#pragma once

#include "../ops/decode_step.h"
#include "carve.h"
#include "row_context.h"
#include "sampling.h"

namespace r2dllm::cuda {

// Asked by the launches of a step before the last one writes the tokens.
struct Candidates {
  const bool* flags;  // [B, L]; null: tokens == mask_id
  const int64_t* tokens;
  int64_t batch_stride, length_stride, length, mask_id;

  R2D_DEVICE bool operator()(int64_t cell) const {
    if (flags != nullptr) return flags[cell];
    const auto c = static_cast<uint32_t>(cell), n = static_cast<uint32_t>(length);
    return tokens[c / n * batch_stride + c % n * length_stride] == mask_id;
  }
};

// A warp per cell merges the slices; of these, row_threads(L) go on with the rules.
R2D_HOST_DEVICE int row_block_threads(int64_t length) {
  return static_cast<int>(length < 1 ? 1 : length > kMaxWarps ? kMaxWarps : length) * kWarp;
}

// Shared memory: one array per field, L cells each, and scratch.
struct RowShared {
  uint64_t *scratch, *keys;
  int64_t *counters, *top_id, *prediction;
  float *top_confidence, *confidence;
  Streaks streaks;
  int32_t* order;
  uint8_t *selected, *rule;
  bool* masked;
  int64_t bytes;

  R2D_HOST_DEVICE RowShared(unsigned char* memory, int64_t length) {
    Carve carve{memory};
    scratch = carve.take<uint64_t>(kMaxWarps);
    counters = carve.take<int64_t>(kCounters);
    keys = carve.take<uint64_t>(length);
    top_id = carve.take<int64_t>(length);
    prediction = carve.take<int64_t>(length);
    streaks.id = carve.take<int64_t>(length);
    top_confidence = carve.take<float>(length);
    confidence = carve.take<float>(length);
    streaks.sum = carve.take<float>(length);
    streaks.max = carve.take<float>(length);
    streaks.count = carve.take<int32_t>(length);
    order = carve.take<int32_t>(length);
    selected = carve.take<uint8_t>(length);
    rule = carve.take<uint8_t>(length);
    masked = carve.take<bool>(length);
    bytes = carve.bytes;
  }
};

template <class Lane>
R2D_DEVICE Top merged_top(Lane& lane, const VocabWorkspace& workspace, int64_t cell) {
  const SlicePartial row =
      merge_slices(lane, workspace.partial + cell * workspace.slices, workspace.slices);
  return top_of(row.mass, row.argmax);
}

template <class Lane>
R2D_DEVICE void row_body(Lane& lane, unsigned char* memory, const DecodeStepParams& params,
                         const Candidates& is_candidate, const VocabWorkspace& workspace,
                         const Drawn* drawn) {
  const int64_t length = params.logits.length, b = lane.block(), cells = b * length;
  const RowShared row(memory, length);
  int64_t* const counters = params.counters + b * kCounters;
  const auto each_cell = [&](auto f) {
    for (int64_t i = lane.thread(); i < length; i += lane.threads()) f(i);
  };
  each_cell([&](int64_t i) {
    row.masked[i] = is_candidate(cells + i);
    row.streaks.store(i, params.streaks.load(cells + i));
  });
  if (lane.thread() < kCounters) row.counters[lane.thread()] = counters[lane.thread()];
  lane.sync(lane.threads());
  lane.await_previous();

  for (int64_t i = warp_of(lane); i < length; i += lane.threads() / kWarp) {
    Top top{-1, 0.0f};
    if (row.masked[i]) {
      top = params.statistics != nullptr ? top_of(params.statistics + (cells + i) * kStatistics)
                                         : merged_top(lane, workspace, cells + i);
    }
    if (place_in_warp(lane) != 0) continue;
    const bool draws = drawn != nullptr && top.id >= 0;
    row.top_id[i] = top.id;
    row.top_confidence[i] = top.confidence;
    row.prediction[i] = draws ? drawn[cells + i].id : top.id;
    row.confidence[i] =
        round_to(draws ? drawn[cells + i].confidence : top.confidence, params.options.rounding);
  }
  lane.sync(lane.threads());
  const int threads = row_threads(length);
  if (lane.thread() >= threads) return;

  int32_t remaining = 0;  // of thread 0
  RowContext<Lane> context(lane, threads, row.scratch);
  const StepRow step{.length = length,
                     .top_id = row.top_id,
                     .top_confidence = row.top_confidence,
                     .prediction = row.prediction,
                     .confidence = row.confidence,
                     .rule = row.rule,
                     .remaining = &remaining,
                     .tokens = params.written_tokens
                                   ? params.written_tokens + b * params.tokens_batch_stride
                                   : nullptr,
                     .tokens_stride = params.tokens_length_stride,
                     .streaks = row.streaks,
                     .counters = row.counters,
                     .masked = row.masked,
                     .keys = row.keys,
                     .selected = row.selected,
                     .order = row.order};
  RowStep<RowContext<Lane>>(context, step, params.options).run();
  context.for_each(length, [&](int64_t i) {
    params.prediction[cells + i] = row.prediction[i];
    params.confidence[cells + i] = row.confidence[i];
    params.rule[cells + i] = row.rule[i];
    params.streaks.store(cells + i, row.streaks.load(i));
  });
  if (lane.thread() < kCounters) counters[lane.thread()] = row.counters[lane.thread()];
  if (lane.thread() == 0) params.remaining[b] = remaining;
}

}  // namespace r2dllm::cuda

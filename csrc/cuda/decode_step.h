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
  TokensView tokens;
  int64_t length, mask_id;

  R2D_HOST_DEVICE explicit Candidates(const DecodeStepParams& params)
      : flags(params.candidates),
        tokens(params.tokens),
        length(params.logits.length),
        mask_id(params.options.mask_id) {}

  R2D_DEVICE bool operator()(int64_t cell) const {
    if (flags != nullptr) return flags[cell];
    const auto c = static_cast<uint32_t>(cell), n = static_cast<uint32_t>(length);
    return tokens.get(c / n, c % n) == mask_id;
  }
};

// The cells whose logits are read.
struct ReadCells {
  Candidates is_candidate;
  const bool* editable;  // [B, L]; null: none

  R2D_HOST_DEVICE explicit ReadCells(const DecodeStepParams& params)
      : is_candidate(params), editable(params.editable) {}

  R2D_DEVICE bool operator()(int64_t cell) const {
    return (editable != nullptr && editable[cell]) || is_candidate(cell);
  }
};

// A warp per cell merges the slices; of these, row_threads(L) go on with the rules.
R2D_HOST_DEVICE int row_block_threads(int64_t length) {
  return static_cast<int>(length < 1 ? 1 : length > kMaxWarps ? kMaxWarps : length) * kWarp;
}

// Shared memory: one array per field, L cells each, and scratch.
struct RowShared {
  StepOptions* options;  // of this row
  bool* is_valid;
  uint64_t *scratch, *keys;
  int64_t *counters, *top_id, *prediction;
  float *top_confidence, *confidence, *entropy;
  Streaks streaks;
  int32_t* order;
  uint8_t *selected, *rule;
  bool *masked, *editable;
  int64_t bytes;

  R2D_HOST_DEVICE RowShared(unsigned char* memory, int64_t length) {
    Carve carve{memory};
    options = carve.take<StepOptions>(1);
    scratch = carve.take<uint64_t>(kMaxWarps);
    counters = carve.take<int64_t>(kCounters);
    keys = carve.take<uint64_t>(length);
    top_id = carve.take<int64_t>(length);
    prediction = carve.take<int64_t>(length);
    streaks.id = carve.take<int64_t>(length);
    top_confidence = carve.take<float>(length);
    confidence = carve.take<float>(length);
    entropy = carve.take<float>(length);
    streaks.sum = carve.take<float>(length);
    streaks.max = carve.take<float>(length);
    streaks.count = carve.take<int32_t>(length);
    order = carve.take<int32_t>(length);
    selected = carve.take<uint8_t>(length);
    rule = carve.take<uint8_t>(length);
    masked = carve.take<bool>(length);
    editable = carve.take<bool>(length);
    is_valid = carve.take<bool>(1);
    bytes = carve.bytes;
  }
};

R2D_DEVICE float logit_at(const LogitsView& logits, int64_t cell, int64_t column) {
  if (column == logits.excluded) return -INFINITY;
  switch (logits.type) {
    case LogitType::kFloat:
      return Float32::value(row_of<Float32>(logits, cell).data[column]);
    case LogitType::kBFloat16:
      return BFloat16::value(row_of<BFloat16>(logits, cell).data[column]);
    default:
      return Half::value(row_of<Half>(logits, cell).data[column]);
  }
}

// What the pass says of one cell. Every lane of a warp gets it.
struct CellTop {
  Top top;
  float max;      // of its logits, and
  double mass;    // the sum of exp(z - max)
  float entropy;  // 0: not asked for
};

template <class Lane>
R2D_DEVICE CellTop top_of_cell(Lane& lane, const DecodeStepParams& params,
                               const VocabWorkspace& workspace, int64_t cell) {
  if (params.statistics != nullptr) {
    const double* statistics = params.statistics + cell * kStatistics;
    const Top top = top_of(statistics);
    const double entropy = params.entropy == nullptr ? 0.0 : entropy_of(statistics);
    return {top, 0.0f, 0.0, static_cast<float>(entropy)};
  }
  const SlicePartial row =
      merge_slices(lane, workspace.partial + cell * workspace.slices, workspace.slices);
  double entropy = 0.0;
  if (params.entropy != nullptr) {
    entropy = entropy_of(row.mass, merge_moment(lane, workspace, cell, row));
  }
  return {top_of(row.mass, row.argmax), row.max, row.mass, static_cast<float>(entropy)};
}

// The token that confidence alone would commit at a candidate with a prediction, and its
// confidence.
R2D_DEVICE Top judge(const DecodeStepParams& params, const CellTop& found, int64_t cell,
                     const Drawn* drawn) {
  if (drawn != nullptr && drawn[cell].id >= 0) {
    const bool tempered = params.options.sampled_confidence == SampledConfidence::kTempered;
    return {drawn[cell].id, tempered ? drawn[cell].tempered : drawn[cell].confidence};
  }
  if (params.proposed == nullptr) return found.top;
  const int64_t id = params.proposed[cell];
  if (id < 0 || id >= params.logits.vocab) return {-1, NAN};
  const double term = weight(logit_at(params.logits, cell, id), found.max, kLog2eWide);
  return {id, static_cast<float>(term / found.mass)};
}

template <class Lane>
R2D_DEVICE void row_body(Lane& lane, unsigned char* memory, const DecodeStepParams& params,
                         const VocabWorkspace& workspace, const Drawn* drawn) {
  const int64_t length = params.logits.length, b = lane.block(), cells = b * length;
  const RowShared row(memory, length);
  const StateView& state = params.state;
  const int64_t slot = state.slot(b);
  const bool has_state = state.counters != nullptr && slot >= 0;
  int64_t* const counters = has_state ? state.counters + slot * kCounters : nullptr;
  const auto each_cell = [&](auto f) {
    for (int64_t i = lane.thread(); i < length; i += lane.threads()) f(i);
  };
  each_cell([&](int64_t i) {
    row.masked[i] = params.is_candidate(b, i);
    row.editable[i] = params.is_editable(b, i);
    if (has_state) row.streaks.store(i, state.streaks.load(slot * length + i));
  });
  if (has_state && lane.thread() < kCounters) row.counters[lane.thread()] = counters[lane.thread()];
  if (lane.thread() == 0) {
    *row.options = params.options;
    *row.is_valid = params.take_row(b, *row.options);
  }
  lane.sync(lane.threads());
  lane.await_previous();

  const bool valid = *row.is_valid;
  for (int64_t i = warp_of(lane); i < length; i += lane.threads() / kWarp) {
    CellTop found{{-1, 0.0f}, 0.0f, 0.0, 0.0f};
    if (row.masked[i] || row.editable[i]) found = top_of_cell(lane, params, workspace, cells + i);
    if (place_in_warp(lane) != 0) continue;
    Top judged = found.top;
    if (valid && row.masked[i] && found.top.id >= 0) {
      judged = judge(params, found, cells + i, drawn);
    }
    row.top_id[i] = found.top.id;
    row.top_confidence[i] = found.top.confidence;
    row.entropy[i] = found.entropy;
    row.prediction[i] = judged.id;
    row.confidence[i] = round_to(judged.confidence, params.options.rounding);
  }
  lane.sync(lane.threads());
  const int threads = row_threads(length);
  if (lane.thread() >= threads) return;

  int32_t remaining = 0;  // of thread 0
  RowContext<Lane> context(lane, threads, row.scratch);
  const StepRow step{
      .length = length,
      .number = b,
      .is_valid = valid,
      .top_id = row.top_id,
      .top_confidence = row.top_confidence,
      .entropy = row.entropy,
      .prediction = row.prediction,
      .confidence = row.confidence,
      .rule = row.rule,
      .remaining = &remaining,
      .tokens = params.tokens,
      .streaks = row.streaks,
      .counters = has_state ? row.counters : nullptr,
      .step_map = has_state && state.step_map != nullptr ? state.step_map + slot * length : nullptr,
      .editable = params.editable != nullptr ? row.editable : nullptr,
      .masked = row.masked,
      .keys = row.keys,
      .selected = row.selected,
      .order = row.order};
  RowStep<RowContext<Lane>>(context, step, *row.options).run();
  context.for_each(length, [&](int64_t i) {
    params.prediction[cells + i] = row.prediction[i];
    params.confidence[cells + i] = row.confidence[i];
    params.rule[cells + i] = row.rule[i];
    if (params.entropy != nullptr) params.entropy[cells + i] = row.entropy[i];
    if (has_state && valid) state.streaks.store(slot * length + i, row.streaks.load(i));
  });
  if (has_state && valid && lane.thread() < kCounters) {
    counters[lane.thread()] = row.counters[lane.thread()];
  }
  if (lane.thread() == 0) params.remaining[b] = remaining;
}

}  // namespace r2dllm::cuda

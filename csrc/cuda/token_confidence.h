// SPDX-License-Identifier: Apache-2.0
// token_confidence and vocab_statistics after the pass over V: a warp per cell.
#pragma once

#include "../ops/token_confidence.h"
#include "../ops/vocab_statistics.h"
#include "vocab_merge.h"

namespace r2dllm::cuda {

constexpr int kCellsPerBlock = 4, kCellThreads = kCellsPerBlock * kWarp;

struct Flagged {
  const bool* flags;  // null: every cell is a candidate
  R2D_DEVICE bool operator()(int64_t cell) const { return flags == nullptr || flags[cell]; }
};

// f(cell, is it a candidate, what the slices say about it) by a warp per cell.
template <class Lane, class F>
R2D_DEVICE void for_each_row(Lane& lane, const LogitsView& logits, const Flagged& is_candidate,
                             const VocabWorkspace& workspace, F f) {
  const int64_t cell = lane.block() * (lane.threads() / kWarp) + warp_of(lane);
  if (cell >= logits.batch * logits.length) return;
  const bool candidate = is_candidate(cell);
  lane.await_previous();
  SlicePartial row{0.0, -INFINITY, -1};
  if (candidate) {
    row = merge_slices(lane, workspace.partial + cell * workspace.slices, workspace.slices);
  }
  f(cell, candidate, row);
}

template <class Lane>
R2D_DEVICE void confidence_body(Lane& lane, const TokenConfidenceParams& params,
                                const Flagged& is_candidate, const VocabWorkspace& workspace) {
  for_each_row(lane, params.logits, is_candidate, workspace,
               [&](int64_t cell, bool candidate, const SlicePartial& row) {
                 if (place_in_warp(lane) != 0) return;
                 const Top top = candidate ? top_of(row.mass, row.argmax) : Top{-1, 0.0f};
                 params.prediction[cell] = top.id;
                 params.confidence[cell] = top.confidence;
               });
}

template <class Lane>
R2D_DEVICE void statistics_body(Lane& lane, const VocabStatisticsParams& params,
                                const Flagged& is_candidate, const VocabWorkspace& workspace) {
  for_each_row(lane, params.logits, is_candidate, workspace,
               [&](int64_t cell, bool candidate, const SlicePartial& row) {
                 double moment = params.with_entropy ? 0.0 : NAN;
                 if (params.with_entropy && candidate) {
                   moment = merge_moment(lane, workspace, cell, row);
                 }
                 if (place_in_warp(lane) != 0) return;
                 store_statistics(params.statistics + cell * kStatistics, row.max, row.mass,
                                  params.first_id + row.argmax, moment);
               });
}

// One thread per cell.
template <class Lane>
R2D_DEVICE void merge_statistics_body(const Lane& lane, const MergeStatisticsParams& params) {
  const int64_t cell = lane.block() * lane.threads() + lane.thread();
  if (cell >= params.cells) return;
  r2dllm::merge_statistics(
      params.parts,
      [&](int64_t part) { return params.statistics + (part * params.cells + cell) * kStatistics; },
      params.merged + cell * kStatistics);
}

}  // namespace r2dllm::cuda

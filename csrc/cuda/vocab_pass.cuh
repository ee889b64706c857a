// SPDX-License-Identifier: Apache-2.0
// Launches of the pass over V.
#pragma once

#include "cuda_lane.cuh"
#include "launch.cuh"
#include "token_confidence.h"
#include "vocab_slice.h"

namespace r2dllm::cuda {

// f(Format()) for the dtype of the logits.
template <class F>
void with_format(LogitType type, F f) {
  switch (type) {
    case LogitType::kFloat:
      return f(Float32());
    case LogitType::kBFloat16:
      return f(BFloat16());
    default:
      return f(Half());
  }
}

int64_t slices_of(const LogitsView& logits);

template <class Format, Tempered kTempered, class IsCandidate>
__global__ void __launch_bounds__(kSliceThreads, 8)
    slice_kernel(LogitsView logits, IsCandidate is_candidate, VocabWorkspace workspace,
                 float scale) {
  __shared__ SliceShared shared;
  CudaLane lane;
  slice_body<Format, kTempered>(lane, shared, logits, is_candidate, workspace, scale);
}

// `scale`: log2(e) / temperature, if anything is tempered.
template <Tempered kTempered = Tempered::kNone, class IsCandidate>
void launch_slices(const LogitsView& logits, const IsCandidate& is_candidate,
                   const VocabWorkspace& workspace, double scale = 0.0) {
  const Launch launch{logits.batch * logits.length * workspace.slices, kSliceThreads};
  with_format(logits.type, [&](auto format) {
    using Format = decltype(format);
    launch(slice_kernel<Format, kTempered, IsCandidate>, logits, is_candidate, workspace,
           static_cast<float>(scale));
  });
}

// The pass over V for an op that looks at nothing else, and `kernel`, which merges a cell's slices.
template <class Params>
void launch_pass(const Params& params, void (*kernel)(Params, Flagged, VocabWorkspace)) {
  const int64_t cells = params.logits.batch * params.logits.length;
  if (cells == 0) return;
  const Flagged is_candidate{params.candidates};
  const VocabWorkspace workspace{.slices = slices_of(params.logits),
                                 .partial = static_cast<SlicePartial*>(params.workspace)};
  launch_slices(params.logits, is_candidate, workspace);
  Launch{blocks_for(cells, kCellsPerBlock), kCellThreads, 0, true}(kernel, params, is_candidate,
                                                                   workspace);
}

}  // namespace r2dllm::cuda

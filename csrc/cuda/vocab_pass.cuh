// SPDX-License-Identifier: Apache-2.0
// Launches of the pass over V.
#pragma once

#include "carve.h"
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

// The parts of the workspace of launch_pass, and its size.
struct PassWorkspace {
  VocabWorkspace vocab;
  int64_t bytes;

  PassWorkspace(const LogitsView& logits, bool with_entropy, void* memory) {
    const int64_t slices = slices_of(logits), partials = logits.batch * logits.length * slices;
    Carve carve{static_cast<unsigned char*>(memory)};
    vocab = {.slices = slices, .partial = carve.take<SlicePartial>(partials)};
    vocab.moment = with_entropy ? carve.take<double>(partials) : nullptr;
    bytes = carve.bytes;
  }
};

template <class Format, Tempered kTempered, bool kEntropy, class IsCandidate, class ScaleOf>
__global__ void __launch_bounds__(kSliceThreads, 8)
    slice_kernel(LogitsView logits, IsCandidate is_candidate, VocabWorkspace workspace,
                 ScaleOf scale_of) {
  __shared__ SliceShared shared;
  CudaLane lane;
  slice_body<Format, kTempered, kEntropy>(lane, shared, logits, is_candidate, workspace, scale_of);
}

// `scale_of`: SameScale or RowScale, if anything is tempered. kEntropy fills workspace.moment.
template <Tempered kTempered = Tempered::kNone, bool kEntropy = false, class IsCandidate,
          class ScaleOf = SameScale>
void launch_slices(const LogitsView& logits, const IsCandidate& is_candidate,
                   const VocabWorkspace& workspace, const ScaleOf& scale_of = {}) {
  const Launch launch{logits.batch * logits.length * workspace.slices, kSliceThreads};
  with_format(logits.type, [&](auto format) {
    using Format = decltype(format);
    launch(slice_kernel<Format, kTempered, kEntropy, IsCandidate, ScaleOf>, logits, is_candidate,
           workspace, scale_of);
  });
}

// The pass over V for an op that looks at nothing else, and `kernel`, which merges a cell's slices.
// `with_entropy`: workspace.moment too.
template <class Params>
void launch_pass(const Params& params, bool with_entropy,
                 void (*kernel)(Params, Flagged, VocabWorkspace)) {
  const int64_t cells = params.logits.batch * params.logits.length;
  if (cells == 0) return;
  const Flagged is_candidate{params.candidates};
  const PassWorkspace workspace(params.logits, with_entropy, params.workspace);
  if (with_entropy) {
    launch_slices<Tempered::kNone, true>(params.logits, is_candidate, workspace.vocab);
  } else {
    launch_slices(params.logits, is_candidate, workspace.vocab);
  }
  Launch{blocks_for(cells, kCellsPerBlock), kCellThreads, 0, true}(kernel, params, is_candidate,
                                                                   workspace.vocab);
}

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
// Two launches a step: the pass over V, and one block a row for everything after it. Drawing tokens
// takes one more, top-k / top-p another.
#include "../ops/decode_step.h"
#include "decode_step.h"
#include "vocab_pass.cuh"

namespace r2dllm::cuda {
namespace {

__global__ void __launch_bounds__(1024) row_kernel(DecodeStepParams params, Candidates is_candidate,
                                                   VocabWorkspace workspace, const Drawn* drawn) {
  CudaLane lane;
  row_body(lane, lane.dynamic_shared(), params, is_candidate, workspace, drawn);
}

template <class Format>
__global__ void __launch_bounds__(kCutoffThreads)
    cutoff_kernel(LogitsView logits, Candidates is_candidate, VocabWorkspace workspace,
                  SameOptions options) {
  __shared__ CutoffShared shared;
  CudaLane lane;
  cutoff_body<Format>(lane, shared, logits, is_candidate, workspace, options);
}

template <class Format>
__global__ void __launch_bounds__(kSliceThreads)
    draw_kernel(LogitsView logits, Candidates is_candidate, VocabWorkspace workspace,
                SameOptions options, Drawn* drawn) {
  __shared__ DrawShared shared;
  CudaLane lane;
  draw_body<Format>(lane, shared, logits, is_candidate, workspace, options, drawn);
}

// The parts of the workspace, and its size.
struct StepWorkspace {
  VocabWorkspace vocab;
  Drawn* drawn;
  int64_t bytes;

  StepWorkspace(const LogitsView& logits, const SamplingOptions& sampling, void* memory) {
    const int64_t rows = logits.batch * logits.length, slices = slices_of(logits);
    const bool draws = sampling.temperature > 0.0;
    Carve carve{static_cast<unsigned char*>(memory)};
    vocab = {.slices = slices, .partial = carve.take<SlicePartial>(rows * slices)};
    vocab.tempered = draws ? carve.take<double>(rows * slices) : nullptr;
    drawn = draws ? carve.take<Drawn>(rows) : nullptr;
    vocab.cutoff = draws && restricts(sampling) ? carve.take<float>(rows) : nullptr;
    bytes = carve.bytes;
  }
};

void allow_shared(int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return;
  check(cudaFuncSetAttribute(row_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
}

}  // namespace

int64_t decode_step_bytes(const LogitsView& logits, const SamplingOptions& sampling) {
  return StepWorkspace(logits, sampling, nullptr).bytes;
}

void decode_step(const DecodeStepParams& params) {
  const LogitsView& logits = params.logits;
  if (logits.batch == 0) return;
  const int64_t cells = logits.batch * logits.length;
  const Candidates is_candidate{.flags = params.candidates,
                                .tokens = params.tokens,
                                .batch_stride = params.tokens_batch_stride,
                                .length_stride = params.tokens_length_stride,
                                .length = logits.length,
                                .mask_id = params.options.mask_id};
  const SamplingOptions& sampling = params.sampling;
  const StepWorkspace workspace(logits, sampling, params.workspace);
  const bool draws = sampling.temperature > 0.0;
  const bool judges_logits = params.statistics == nullptr && cells > 0;
  if (judges_logits) {
    const SameOptions options{sampling, params.options.seed, params.counters};
    if (draws && !restricts(sampling)) {
      launch_slices<Tempered::kMass>(logits, is_candidate, workspace.vocab,
                                     SameScale{narrow_scale(tempering(sampling))});
    } else {
      launch_slices(logits, is_candidate, workspace.vocab);
    }
    with_format(logits.type, [&](auto format) {
      using Format = decltype(format);
      if (draws && restricts(sampling)) {
        Launch{cells, kCutoffThreads}(cutoff_kernel<Format>, logits, is_candidate, workspace.vocab,
                                      options);
      }
      if (draws) {
        Launch{cells, kSliceThreads}(draw_kernel<Format>, logits, is_candidate, workspace.vocab,
                                     options, workspace.drawn);
      }
    });
  }
  const int64_t shared = RowShared(nullptr, logits.length).bytes;
  allow_shared(shared);
  // The prologue reads what earlier steps wrote. They are over: the pass did not overlap with them.
  const bool overlaps = judges_logits;
  Launch{logits.batch, row_block_threads(logits.length), shared, overlaps}(
      row_kernel, params, is_candidate, workspace.vocab, workspace.drawn);
}

}  // namespace r2dllm::cuda

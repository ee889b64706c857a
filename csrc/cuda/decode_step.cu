// SPDX-License-Identifier: Apache-2.0
// Two launches a step: the pass over V, and one block a row for everything after it. Drawing tokens
// takes one more, top-k / top-p / min-p another.
#include "../ops/decode_step.h"
#include "decode_step.h"
#include "vocab_pass.cuh"

namespace r2dllm::cuda {
namespace {

__global__ void __launch_bounds__(1024)
    row_kernel(DecodeStepParams params, VocabWorkspace workspace, const Drawn* drawn) {
  CudaLane lane;
  row_body(lane, lane.dynamic_shared(), params, workspace, drawn);
}

template <class Format>
__global__ void __launch_bounds__(kCutoffThreads)
    cutoff_kernel(LogitsView logits, Candidates is_candidate, VocabWorkspace workspace,
                  RowSampling sampling) {
  __shared__ CutoffShared shared;
  CudaLane lane;
  cutoff_body<Format>(lane, shared, logits, is_candidate, workspace, sampling);
}

template <class Format>
__global__ void __launch_bounds__(kSliceThreads)
    draw_kernel(LogitsView logits, Candidates is_candidate, VocabWorkspace workspace,
                RowSampling sampling, Drawn* drawn) {
  __shared__ DrawShared shared;
  CudaLane lane;
  draw_body<Format>(lane, shared, logits, is_candidate, workspace, sampling, drawn);
}

// The parts of the workspace, and its size.
struct StepWorkspace {
  VocabWorkspace vocab;
  Drawn* drawn;
  int64_t bytes;

  StepWorkspace(const DecodeStepParams& params, void* memory) {
    const int64_t cells = params.logits.batch * params.logits.length,
                  slices = slices_of(params.logits);
    const bool draws = params.may_draw();
    Carve carve{static_cast<unsigned char*>(memory)};
    vocab = {.slices = slices, .partial = carve.take<SlicePartial>(cells * slices)};
    vocab.tempered = draws ? carve.take<double>(cells * slices) : nullptr;
    vocab.moment = params.entropy != nullptr ? carve.take<double>(cells * slices) : nullptr;
    drawn = draws ? carve.take<Drawn>(cells) : nullptr;
    vocab.cutoff = params.may_restrict() ? carve.take<float>(cells) : nullptr;
    bytes = carve.bytes;
  }
};

void allow_shared(int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return;
  check(cudaFuncSetAttribute(row_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
}

// The pass over V of a step.
void launch_step_slices(const DecodeStepParams& params, const VocabWorkspace& workspace) {
  const ReadCells is_read(params);
  const RowScale<RowSampling> row_scale{params.row_sampling()};
  const bool with_entropy = params.entropy != nullptr;
  if (params.may_draw() && with_entropy) {
    launch_slices<Tempered::kMass, true>(params.logits, is_read, workspace, row_scale);
  } else if (params.may_draw()) {
    launch_slices<Tempered::kMass>(params.logits, is_read, workspace, row_scale);
  } else if (with_entropy) {
    launch_slices<Tempered::kNone, true>(params.logits, is_read, workspace);
  } else {
    launch_slices(params.logits, is_read, workspace);
  }
}

void launch_draw(const DecodeStepParams& params, const VocabWorkspace& workspace, Drawn* drawn) {
  const LogitsView& logits = params.logits;
  const int64_t cells = logits.batch * logits.length;
  const Candidates is_candidate(params);
  const RowSampling sampling = params.row_sampling();
  with_format(logits.type, [&](auto format) {
    using Format = decltype(format);
    if (params.may_restrict()) {
      Launch{cells, kCutoffThreads}(cutoff_kernel<Format>, logits, is_candidate, workspace,
                                    sampling);
    }
    Launch{cells, kSliceThreads}(draw_kernel<Format>, logits, is_candidate, workspace, sampling,
                                 drawn);
  });
}

}  // namespace

int64_t decode_step_bytes(const DecodeStepParams& params) {
  return params.statistics != nullptr ? 0 : StepWorkspace(params, nullptr).bytes;
}

void decode_step(const DecodeStepParams& params) {
  const LogitsView& logits = params.logits;
  if (logits.batch == 0) return;
  const int64_t cells = logits.batch * logits.length;
  const bool judges_logits = params.statistics == nullptr && cells > 0;
  VocabWorkspace workspace{};
  Drawn* drawn = nullptr;
  if (judges_logits) {
    const StepWorkspace parts(params, params.workspace);
    workspace = parts.vocab;
    drawn = parts.drawn;
    launch_step_slices(params, workspace);
    if (params.may_draw()) launch_draw(params, workspace, drawn);
  }
  const int64_t shared = RowShared(nullptr, logits.length).bytes;
  allow_shared(shared);
  // The prologue reads what earlier steps wrote. They are over: the pass did not overlap with them.
  const bool overlaps = judges_logits;
  Launch{logits.batch, row_block_threads(logits.length), shared, overlaps}(row_kernel, params,
                                                                           workspace, drawn);
}

}  // namespace r2dllm::cuda

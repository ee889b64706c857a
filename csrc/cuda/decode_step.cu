// SPDX-License-Identifier: Apache-2.0
// Two launches a step: the pass over V, and one block a row for everything after it.
#include "../ops/backend.h"
#include "../ops/decode_step.h"
#include "launch.cuh"
#include "row_context.cuh"
#include "vocab_pass.cuh"

namespace r2dllm::cuda {
namespace {

// Before the step writes them, both kernels may ask the tokens who is a candidate.
struct Candidate {
  const bool* candidates;
  const int64_t* tokens;
  int64_t batch_stride, length_stride, length, mask_id;

  __device__ bool operator()(int64_t cell) const {
    if (candidates != nullptr) return candidates[cell];
    return tokens[cell / length * batch_stride + cell % length * length_stride] == mask_id;
  }
};

__global__ void __launch_bounds__(1024)
    row_kernel(DecodeStepParams params, Candidate is_candidate, int64_t slices) {
  __shared__ unsigned long long word;
  __shared__ uint64_t keys[kCudaMaxLength];
  __shared__ int64_t top_id[kCudaMaxLength];
  __shared__ float top_confidence[kCudaMaxLength];
  __shared__ int32_t order[kCudaMaxLength];
  __shared__ uint8_t selected[kCudaMaxLength];
  __shared__ bool masked[kCudaMaxLength];

  const int64_t length = params.logits.length, b = blockIdx.x, cells = b * length;
  const auto* partials = static_cast<const SlicePartial*>(params.workspace);
  RowContext context{&word};
  context.for_each(length, [&](int64_t i) {
    masked[i] = is_candidate(cells + i);
    const Top top =
        masked[i] ? merge_slices(partials + (cells + i) * slices, slices) : Top{-1, 0.0f};
    top_id[i] = params.prediction[cells + i] = top.id;
    top_confidence[i] = top.confidence;
    params.confidence[cells + i] = round_to(top.confidence, params.options.rounding);
  });
  const StepRow row{
      length,
      top_id,
      top_confidence,
      params.prediction + cells,
      params.confidence + cells,
      params.rule + cells,
      params.remaining + b,
      params.written_tokens ? params.written_tokens + b * params.tokens_batch_stride : nullptr,
      params.tokens_length_stride,
      params.streak_count + cells,
      params.streak_id + cells,
      params.streak_sum + cells,
      params.streak_max + cells,
      params.counters + b * kCounters,
      masked,
      keys,
      selected,
      order};
  RowStep<RowContext>(context, row, params.options).run();
}

}  // namespace

void decode_step(const DecodeStepParams& params) {
  if (params.logits.batch == 0) return;
  const cudaStream_t stream = current_stream();
  const Candidate is_candidate{params.candidates,          params.tokens,
                               params.tokens_batch_stride, params.tokens_length_stride,
                               params.logits.length,       params.options.mask_id};
  if (params.logits.length > 0) {
    launch_slices(params.logits, is_candidate, static_cast<SlicePartial*>(params.workspace),
                  stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  row_kernel<<<static_cast<unsigned>(params.logits.batch), row_threads(params.logits.length), 0,
               stream>>>(params, is_candidate, slices_of(params.logits.vocab));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
#include "../ops/token_confidence.h"
#include "launch.cuh"
#include "vocab_pass.cuh"

namespace r2dllm::cuda {

int64_t vocab_pass_bytes(const LogitsView& logits) {
  return logits.batch * logits.length * slices_of(logits.vocab) *
         static_cast<int64_t>(sizeof(SlicePartial));
}

namespace {

struct Flagged {
  const bool* candidates;
  __device__ bool operator()(int64_t cell) const { return candidates[cell]; }
};

__global__ void merge_kernel(int64_t cells, int64_t slices, const bool* candidates,
                             const SlicePartial* partials, int64_t* prediction, float* confidence) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (cell >= cells) return;
  const Top top = candidates[cell] ? merge_slices(partials + cell * slices, slices) : Top{-1, 0.0f};
  prediction[cell] = top.id;
  confidence[cell] = top.confidence;
}

}  // namespace

void token_confidence(const TokenConfidenceParams& params) {
  const int64_t cells = params.logits.batch * params.logits.length;
  if (cells == 0) return;
  const cudaStream_t stream = current_stream();
  auto* partials = static_cast<SlicePartial*>(params.workspace);
  launch_slices(params.logits, Flagged{params.candidates}, partials, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  merge_kernel<<<static_cast<unsigned>((cells + 127) / 128), 128, 0, stream>>>(
      cells, slices_of(params.logits.vocab), params.candidates, partials, params.prediction,
      params.confidence);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace r2dllm::cuda

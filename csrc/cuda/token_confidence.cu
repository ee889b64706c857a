// SPDX-License-Identifier: Apache-2.0
#include "../ops/token_confidence.h"
#include "vocab_pass.cuh"

namespace r2dllm::cuda {
namespace {

__global__ void __launch_bounds__(kCellThreads)
    confidence_kernel(TokenConfidenceParams params, Flagged is_candidate,
                      VocabWorkspace workspace) {
  CudaLane lane;
  confidence_body(lane, params, is_candidate, workspace);
}

}  // namespace

void token_confidence(const TokenConfidenceParams& params) {
  launch_pass(params, false, confidence_kernel);
}

}  // namespace r2dllm::cuda

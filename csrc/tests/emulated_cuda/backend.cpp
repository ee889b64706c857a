// SPDX-License-Identifier: Apache-2.0
// The CUDA back end compiled for the CPU: every launch and kernel as it is, a fibre per thread.
#ifdef R2DLLM_EMULATED_CUDA
#include <c10/util/Exception.h>

#include "../../cuda/decode_step.cu"
#include "../../cuda/row_stats.cu"
#include "../../cuda/rules.cu"
#include "../../cuda/sft_loss.cu"
#include "../../cuda/token_confidence.cu"
#include "../../cuda/vocab_pass.cu"
#include "../../cuda/vocab_statistics.cu"

namespace r2dllm::cuda {

cudaStream_t current_stream() { return nullptr; }
void check(cudaError_t error) { TORCH_CHECK(error == 0, "CUDA error ", error); }

}  // namespace r2dllm::cuda
#endif

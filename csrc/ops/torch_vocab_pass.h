// SPDX-License-Identifier: Apache-2.0
// What every op with a pass over V needs of its tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "vocab_pass.h"

namespace r2dllm {

LogitsView view_logits(const at::Tensor& logits, int64_t excluded, int64_t shift);

// Device memory for the partial results of the pass; nothing on the CPU.
at::Tensor vocab_pass_workspace(const at::Tensor& logits, const LogitsView& view,
                                bool with_entropy = false);

// The flags that a back end reads; on CUDA, nothing if all rows are candidates.
at::Tensor candidate_flags(const std::optional<at::Tensor>& candidates, const at::Tensor& logits);

}  // namespace r2dllm

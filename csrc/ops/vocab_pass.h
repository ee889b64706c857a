// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../rules/logits_view.h"

namespace r2dllm::cuda {

// Device memory for the partial results of the pass over V.
int64_t vocab_pass_bytes(const LogitsView& logits, bool with_entropy);

}  // namespace r2dllm::cuda

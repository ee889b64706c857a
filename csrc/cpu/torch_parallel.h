// SPDX-License-Identifier: Apache-2.0
// torch's threads: all that csrc/cpu needs of torch.
#pragma once

#include <ATen/Parallel.h>

namespace r2dllm::cpu {

using at::parallel_for;

}  // namespace r2dllm::cpu

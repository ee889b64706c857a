// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace r2dllm {

// A thread block works on one row; its shared memory holds this many cells.
constexpr int64_t kCudaMaxLength = 1024;

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// Calls the back end of a tensor's device: every op is checked once, in csrc/ops, and only then
// handed on as pointers.
#pragma once

#include "checks.h"
#include "limits.h"

#ifdef R2DLLM_WITH_CUDA
#include <c10/core/DeviceGuard.h>

#define R2D_CALL_BACKEND(tensor, function, ...)      \
  do {                                               \
    const c10::DeviceGuard guard((tensor).device()); \
    if (on_cuda(tensor)) {                           \
      cuda::function(__VA_ARGS__);                   \
    } else {                                         \
      cpu::function(__VA_ARGS__);                    \
    }                                                \
  } while (false)
#define R2D_REGISTER(op, function)                             \
  TORCH_LIBRARY_IMPL(r2dllm, CPU, m) { m.impl(op, function); } \
  TORCH_LIBRARY_IMPL(r2dllm, CUDA, m) { m.impl(op, function); }
#else
#define R2D_CALL_BACKEND(tensor, function, ...) cpu::function(__VA_ARGS__)
#define R2D_REGISTER(op, function) \
  TORCH_LIBRARY_IMPL(r2dllm, CPU, m) { m.impl(op, function); }
#endif

namespace r2dllm {

inline void check_length(const char* op, const Tensor& cells) {
  TORCH_CHECK_VALUE(!on_cuda(cells) || cells.size(1) <= kCudaMaxLength, op,
                    ": takes L <= ", kCudaMaxLength, " on CUDA, got L = ", cells.size(1));
}

}  // namespace r2dllm

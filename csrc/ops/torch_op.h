// SPDX-License-Identifier: Apache-2.0
// What an op is made of: torch, the checks, and the way to a back end. Every op is checked once, in
// csrc/ops, and only then handed on as pointers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "limits.h"
#include "torch_checks.h"

// The op runs on these devices: R2D_REGISTER("name", &function). A build that has no CUDA back end
// for CUDA tensors says so, and how to get it, where it meets one.
#define R2D_REGISTER(op, function)                             \
  TORCH_LIBRARY_IMPL(r2dllm, CPU, m) { m.impl(op, function); } \
  TORCH_LIBRARY_IMPL(r2dllm, CUDA, m) { m.impl(op, R2D_ON_CUDA(function)); }

// Nothing that the op returns has a gradient, and it refuses logits that want one: autograd's box
// round the call, which costs as much as the checks, is left out.
#define R2D_NOT_DIFFERENTIABLE(op) \
  TORCH_LIBRARY_IMPL(r2dllm, Autograd, m) { m.impl(op, torch::CppFunction::makeFallthrough()); }

#if defined(R2DLLM_WITH_CUDA) && !defined(R2DLLM_EMULATED_CUDA)
#define R2D_ON_CUDA(function) function
#else
#define R2D_ON_CUDA(function) torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>()
#endif

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
#else
#define R2D_CALL_BACKEND(tensor, function, ...) cpu::function(__VA_ARGS__)
#endif

namespace r2dllm {

[[maybe_unused]] inline void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_VALUE(false, op.operator_name().name,
                    ": got CUDA tensors, but this build of r2dllm_ext runs on the CPU only (see "
                    "r2dllm_ext.build_info()); pass CPU tensors");
}

inline void check_length(const char* op, const Tensor& cells) {
  TORCH_CHECK_VALUE(!on_cuda(cells) || cells.size(1) <= kCudaMaxLength, op,
                    ": takes L <= ", kCudaMaxLength, " on CUDA, got L = ", cells.size(1));
}

inline Tensor new_bytes(const Tensor& beside, int64_t bytes) {
  return at::empty({bytes}, beside.options().dtype(at::kByte));
}

// Null for no tensor.
inline void* bytes_of(const Tensor& workspace) {
  return workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
}

// The op has written `t`: each argument that the schema marks with "!" comes by here. torch counts
// the writes of its own in-place ops; views and their base have one count, so that a backward that
// saved any of them notices. Inference tensors have none.
inline void bump(const std::optional<Tensor>& t) {
  if (t && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
}

template <class T>
const T* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

}  // namespace r2dllm

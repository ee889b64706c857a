// SPDX-License-Identifier: Apache-2.0
// A build without the CUDA back end says so, and how to get it, when it meets a CUDA tensor.
#ifndef R2DLLM_WITH_CUDA
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace r2dllm {
namespace {

void no_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_VALUE(false, op.operator_name().name,
                    ": got CUDA tensors, but this build of r2dllm_ext runs on the CPU only (see "
                    "r2dllm_ext.build_info()); pass CPU tensors");
}

TORCH_LIBRARY_IMPL(r2dllm, CUDA, m) {
  for (const char* op : {"token_confidence", "window_pool", "positional_ambiguity",
                         "update_stability_", "decode_step", "select", "decode_step.statistics",
                         "select.statistics", "vocab_statistics", "merge_statistics", "row_stats",
                         "row_stats_backward", "row_stats_backward_", "sft_loss", "sft_reduce"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&no_cuda>());
  }
}

}  // namespace
}  // namespace r2dllm

#endif

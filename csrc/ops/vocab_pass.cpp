// SPDX-License-Identifier: Apache-2.0
#include "torch_op.h"
#include "torch_vocab_pass.h"

namespace r2dllm {
namespace {

LogitType logit_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return LogitType::kFloat;
    case at::kBFloat16:
      return LogitType::kBFloat16;
    case at::kHalf:
      return LogitType::kHalf;
    default:
      return LogitType::kDouble;
  }
}

}  // namespace

LogitsView view_logits(const Tensor& logits, int64_t excluded, int64_t shift) {
  return {.data = logits.const_data_ptr(),
          .type = logit_type(logits.scalar_type()),
          .batch = logits.size(0),
          .length = logits.size(1),
          .vocab = logits.size(2),
          .batch_stride = logits.stride(0),
          .length_stride = logits.stride(1),
          .excluded = excluded,
          .shift = shift};
}

Tensor vocab_pass_workspace(const Tensor& logits, const LogitsView& view, bool with_entropy) {
#ifdef R2DLLM_WITH_CUDA
  if (on_cuda(logits)) return new_bytes(logits, cuda::vocab_pass_bytes(view, with_entropy));
#endif
  (void)logits, (void)view, (void)with_entropy;
  return {};
}

Tensor candidate_flags(const std::optional<Tensor>& candidates, const Tensor& logits) {
  if (candidates) return candidates->contiguous();
  if (on_cuda(logits)) return {};
  return at::ones(logits.sizes().slice(0, 2), logits.options().dtype(at::kBool));
}

}  // namespace r2dllm

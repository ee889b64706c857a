// SPDX-License-Identifier: Apache-2.0
#include "token_confidence.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "vocab_pass.h"

namespace r2dllm {

LogitsView view_logits(const Tensor& logits, int64_t excluded, int64_t shift) {
  const LogitType type = logits.scalar_type() == at::kFloat      ? LogitType::kFloat
                         : logits.scalar_type() == at::kBFloat16 ? LogitType::kBFloat16
                         : logits.scalar_type() == at::kHalf     ? LogitType::kHalf
                                                                 : LogitType::kDouble;
  return {logits.const_data_ptr(), type,           logits.size(0),
          logits.size(1),          logits.size(2), logits.stride(0),
          logits.stride(1),        excluded,       shift};
}

Tensor vocab_pass_workspace(const Tensor& logits, [[maybe_unused]] const LogitsView& view) {
#ifdef R2DLLM_WITH_CUDA
  if (on_cuda(logits)) {
    return at::empty({cuda::vocab_pass_bytes(view)}, logits.options().dtype(at::kByte));
  }
#endif
  return {};
}

Tensor candidate_flags(const std::optional<Tensor>& candidates, const Tensor& logits) {
  if (candidates) return candidates->contiguous();
  if (on_cuda(logits)) return {};
  return at::ones(logits.sizes().slice(0, 2), logits.options().dtype(at::kBool));
}

namespace {

std::tuple<Tensor, Tensor> token_confidence(const Tensor& logits,
                                            const std::optional<Tensor>& candidates,
                                            std::optional<int64_t> exclude_id) {
  constexpr auto op = "token_confidence";
  check_logits(op, logits);
  const auto shape = logits.sizes().slice(0, 2);
  check_candidates(op, candidates, logits);
  TORCH_CHECK_VALUE(!exclude_id || (*exclude_id >= 0 && *exclude_id < logits.size(2)), op,
                    ": exclude_id takes a token id in [0, V = ", logits.size(2), ") or None, got ",
                    *exclude_id);
  const Tensor rows = candidate_flags(candidates, logits);
  Tensor prediction = at::empty(shape, logits.options().dtype(at::kLong));
  Tensor confidence = at::empty(shape, logits.options().dtype(at::kFloat));
  const LogitsView view = view_logits(logits, exclude_id.value_or(-1), 0);
  const Tensor workspace = vocab_pass_workspace(logits, view);
  const TokenConfidenceParams params{view, rows.defined() ? rows.const_data_ptr<bool>() : nullptr,
                                     prediction.mutable_data_ptr<int64_t>(),
                                     confidence.mutable_data_ptr<float>(),
                                     workspace.defined() ? workspace.mutable_data_ptr() : nullptr};
  R2D_CALL_BACKEND(logits, token_confidence, params);
  return {prediction, confidence};
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  m.def(
      "token_confidence(Tensor logits, Tensor? candidates=None, int? exclude_id=None) -> (Tensor "
      "prediction, Tensor confidence)",
      {at::Tag::pt2_compliant_tag});
}

R2D_REGISTER("token_confidence", &token_confidence)

}  // namespace
}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
#include "token_confidence.h"

#include "torch_op.h"
#include "torch_vocab_pass.h"

namespace r2dllm {
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
  const TokenConfidenceParams params{.logits = view,
                                     .candidates = data_or_null<bool>(rows),
                                     .prediction = prediction.mutable_data_ptr<int64_t>(),
                                     .confidence = confidence.mutable_data_ptr<float>(),
                                     .workspace = bytes_of(workspace)};
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

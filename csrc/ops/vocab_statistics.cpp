// SPDX-License-Identifier: Apache-2.0
#include "vocab_statistics.h"

#include "torch_op.h"
#include "torch_vocab_pass.h"

namespace r2dllm {
namespace {

Tensor vocab_statistics(const Tensor& logits, const std::optional<Tensor>& candidates,
                        int64_t first_id, std::optional<int64_t> exclude_id, bool with_entropy) {
  constexpr auto op = "vocab_statistics";
  check_logits(op, logits);
  check_candidates(op, candidates, logits);
  check_at_least(op, "first_id", first_id, 0);
  if (exclude_id) check_at_least(op, "exclude_id", *exclude_id, 0);
  const int64_t column = exclude_id ? *exclude_id - first_id : -1;
  const bool here = column >= 0 && column < logits.size(2);
  const Tensor rows = candidate_flags(candidates, logits);
  Tensor statistics =
      at::empty({logits.size(0), logits.size(1), kStatistics}, logits.options().dtype(at::kDouble));
  const LogitsView view = view_logits(logits, here ? column : -1, 0);
  const Tensor workspace = vocab_pass_workspace(logits, view, with_entropy);
  const VocabStatisticsParams params{.logits = view,
                                     .candidates = data_or_null<bool>(rows),
                                     .first_id = first_id,
                                     .with_entropy = with_entropy,
                                     .statistics = statistics.mutable_data_ptr<double>(),
                                     .workspace = bytes_of(workspace)};
  R2D_CALL_BACKEND(logits, vocab_statistics, params);
  return statistics;
}

Tensor merge_statistics(const Tensor& statistics) {
  constexpr auto op = "merge_statistics";
  check_dim(op, "statistics", statistics, 4, "[parts, B, L, 4]");
  check_dtype(op, "statistics", statistics, at::kDouble);
  TORCH_CHECK_VALUE(statistics.size(0) >= 1 && statistics.size(3) == kStatistics, op,
                    ": statistics takes shape [parts >= 1, B, L, 4], got ", statistics.sizes());
  const Tensor parts = statistics.contiguous();
  Tensor merged = at::empty(statistics.sizes().slice(1), statistics.options());
  const MergeStatisticsParams params{.parts = parts.size(0),
                                     .cells = parts.size(1) * parts.size(2),
                                     .statistics = parts.const_data_ptr<double>(),
                                     .merged = merged.mutable_data_ptr<double>()};
  R2D_CALL_BACKEND(statistics, merge_statistics, params);
  return merged;
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  m.def(
      "vocab_statistics(Tensor logits, Tensor? candidates=None, int first_id=0, "
      "int? exclude_id=None, bool with_entropy=False) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("merge_statistics(Tensor statistics) -> Tensor", {at::Tag::pt2_compliant_tag});
}

R2D_REGISTER("vocab_statistics", &vocab_statistics)
R2D_REGISTER("merge_statistics", &merge_statistics)

}  // namespace
}  // namespace r2dllm

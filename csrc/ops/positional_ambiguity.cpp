// SPDX-License-Identifier: Apache-2.0
#include "positional_ambiguity.h"

#include "torch_op.h"

namespace r2dllm {
namespace {

Tensor positional_ambiguity(const Tensor& prediction, const Tensor& confidence,
                            const Tensor& is_masked, double min_confidence, int64_t min_run,
                            int64_t mode, int64_t seed, const std::optional<Tensor>& row,
                            int64_t step) {
  constexpr auto op = "positional_ambiguity";
  check_confidence(op, confidence);
  check_like(op, "prediction", prediction, confidence, "confidence", at::kLong);
  check_like(op, "is_masked", is_masked, confidence, "confidence", at::kBool);
  check_length(op, confidence);
  check_probability(op, "min_confidence", min_confidence);
  check_at_least(op, "min_run", min_run, 1);
  TORCH_CHECK_VALUE(mode >= 1 && mode <= 3, op,
                    ": mode takes 1 (confidence), 2 (mid) or 3 (random), got ", mode);
  if (row) {
    check_device(op, "row", *row, confidence, "confidence");
    check_dtype(op, "row", *row, at::kLong);
    check_shape(op, "row", *row, {confidence.size(0)}, "[B]");
  }
  const Tensor ids = prediction.contiguous(), values = confidence.to(at::kFloat).contiguous(),
               masked = is_masked.contiguous(),
               rows =
                   row ? row->contiguous() : at::arange(confidence.size(0), prediction.options());
  Tensor chosen = at::empty(confidence.sizes(), is_masked.options());
  const PositionalAmbiguityParams params{
      .batch = confidence.size(0),
      .length = confidence.size(1),
      .prediction = ids.const_data_ptr<int64_t>(),
      .confidence = values.const_data_ptr<float>(),
      .is_masked = masked.const_data_ptr<bool>(),
      .options = {.mode = static_cast<TokenCluster>(mode),
                  .min_run = min_run,
                  .min_confidence = static_cast<float>(min_confidence)},
      .seed = static_cast<uint64_t>(seed),
      .row = rows.const_data_ptr<int64_t>(),
      .step = step,
      .chosen = chosen.mutable_data_ptr<bool>()};
  R2D_CALL_BACKEND(confidence, positional_ambiguity, params);
  return chosen;
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  m.def(
      "positional_ambiguity(Tensor prediction, Tensor confidence, Tensor is_masked, "
      "float min_confidence, int min_run=2, int mode=1, int seed=0, Tensor? row=None, "
      "int step=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

R2D_REGISTER("positional_ambiguity", &positional_ambiguity)

}  // namespace
}  // namespace r2dllm

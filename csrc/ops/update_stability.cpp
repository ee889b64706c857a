// SPDX-License-Identifier: Apache-2.0
#include "update_stability.h"

#include "torch_op.h"

namespace r2dllm {
namespace {

Tensor update_stability_(const Tensor& streak_count, const Tensor& streak_id,
                         const Tensor& streak_sum, const Tensor& streak_max,
                         const Tensor& prediction, const Tensor& confidence,
                         const Tensor& was_masked, const Tensor& is_masked, int64_t steps,
                         double min_confidence, int64_t mode) {
  constexpr auto op = "update_stability_";
  check_confidence(op, confidence);
  const auto check_streak = [&](const char* name, const Tensor& t, at::ScalarType dtype) {
    check_like(op, name, t, confidence, "confidence", dtype);
    check_contiguous(op, name, t);
  };
  check_streak("state.streak_count", streak_count, at::kInt);
  check_streak("state.streak_id", streak_id, at::kLong);
  check_streak("state.streak_sum", streak_sum, at::kFloat);
  check_streak("state.streak_max", streak_max, at::kFloat);
  check_like(op, "prediction", prediction, confidence, "confidence", at::kLong);
  check_like(op, "was_masked", was_masked, confidence, "confidence", at::kBool);
  check_like(op, "is_masked", is_masked, confidence, "confidence", at::kBool);
  check_at_least(op, "steps", steps, 1);
  check_probability(op, "min_confidence", min_confidence);
  check_choice(op, "mode", mode, TemporalEval::kCount);

  const Tensor ids = prediction.contiguous(), values = confidence.to(at::kFloat).contiguous(),
               before = was_masked.contiguous(), after = is_masked.contiguous();
  Tensor stable = at::empty(confidence.sizes(), is_masked.options());
  const UpdateStabilityParams params{
      .cells = confidence.numel(),
      .streaks = {.count = streak_count.mutable_data_ptr<int32_t>(),
                  .id = streak_id.mutable_data_ptr<int64_t>(),
                  .sum = streak_sum.mutable_data_ptr<float>(),
                  .max = streak_max.mutable_data_ptr<float>()},
      .prediction = ids.const_data_ptr<int64_t>(),
      .confidence = values.const_data_ptr<float>(),
      .was_masked = before.const_data_ptr<bool>(),
      .is_masked = after.const_data_ptr<bool>(),
      .options = {.steps = steps,
                  .min_confidence = static_cast<float>(min_confidence),
                  .mode = static_cast<TemporalEval>(mode)},
      .stable = stable.mutable_data_ptr<bool>()};
  R2D_CALL_BACKEND(confidence, update_stability, params);
  for (const Tensor& written : {streak_count, streak_id, streak_sum, streak_max}) bump(written);
  return stable;
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  // Not "mode": torch's own tracing calls ops that write with keywords, and has one of that name.
  m.def(
      "update_stability_(Tensor(a!) streak_count, Tensor(b!) streak_id, Tensor(c!) streak_sum, "
      "Tensor(d!) streak_max, Tensor prediction, Tensor confidence, Tensor was_masked, "
      "Tensor is_masked, int steps, float min_confidence, int temporal_eval=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

R2D_REGISTER("update_stability_", &update_stability_)

}  // namespace
}  // namespace r2dllm

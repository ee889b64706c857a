// SPDX-License-Identifier: Apache-2.0
#include "window_pool.h"

#include "torch_op.h"

namespace r2dllm {
namespace {

Tensor window_pool(const Tensor& confidence, const Tensor& is_masked, int64_t window,
                   double min_confidence, std::optional<int64_t> max_unmasked) {
  constexpr auto op = "window_pool";
  check_confidence(op, confidence);
  check_like(op, "is_masked", is_masked, confidence, "confidence", at::kBool);
  check_length(op, confidence);
  check_at_least(op, "window", window, 1);
  check_probability(op, "min_confidence", min_confidence);
  if (max_unmasked) check_at_least(op, "max_unmasked", *max_unmasked, 0);

  const Tensor values = confidence.to(at::kFloat).contiguous(), masked = is_masked.contiguous();
  Tensor marked = at::empty(confidence.sizes(), is_masked.options());
  const WindowPoolParams params{.batch = confidence.size(0),
                                .length = confidence.size(1),
                                .confidence = values.const_data_ptr<float>(),
                                .is_masked = masked.const_data_ptr<bool>(),
                                .options = {.window = window,
                                            .max_unmasked = max_unmasked.value_or(-1),
                                            .min_confidence = static_cast<float>(min_confidence),
                                            .rounding = Rounding::kNone},
                                .marked = marked.mutable_data_ptr<bool>()};
  R2D_CALL_BACKEND(confidence, window_pool, params);
  return marked;
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  m.def(
      "window_pool(Tensor confidence, Tensor is_masked, int window, float min_confidence, "
      "int? max_unmasked=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

R2D_REGISTER("window_pool", &window_pool)

}  // namespace
}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
#include "sft_loss.h"

#include <cmath>
#include <string>

#include "torch_op.h"
#include "torch_row_stats.h"

namespace r2dllm {
namespace {

void check_options(const char* op, const Tensor& targets, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& normalizer, double entropy_weight,
                   int64_t entropy_gate) {
  if (weight) {
    check_device(op, "weight", *weight, targets, "targets");
    check_dtype(op, "weight", *weight, at::kFloat);
    check_shape(op, "weight", *weight, targets.sizes(), "of targets");
    TORCH_CHECK_VALUE(!weight->requires_grad(), op,
                      ": weight is a constant and gets no gradient, got requires_grad=True; pass "
                      "weight.detach()");
  }
  if (normalizer) {
    check_device(op, "normalizer", *normalizer, targets, "targets");
    TORCH_CHECK_VALUE(normalizer->dim() == 0, op, ": normalizer takes a tensor of shape [], got ",
                      normalizer->sizes());
    TORCH_CHECK_TYPE(!normalizer->is_complex() && normalizer->scalar_type() != at::kBool, op,
                     ": normalizer takes a number, got dtype ", normalizer->scalar_type());
    TORCH_CHECK_VALUE(!normalizer->requires_grad(), op,
                      ": normalizer is a constant and gets no gradient, got requires_grad=True; "
                      "pass normalizer.detach()");
  }
  TORCH_CHECK_VALUE(std::isfinite(entropy_weight), op,
                    ": entropy_weight takes a finite number, got ", entropy_weight);
  check_choice(op, "entropy_gate", entropy_gate, EntropyGate::kCount);
}

using Reduced = std::tuple<Tensor, Tensor, Tensor>;

Reduced reduce(const Tensor& nll, const Tensor& entropy, const Tensor& prediction,
               const Tensor& targets, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& normalizer, double entropy_weight, int64_t entropy_gate,
               int64_t ignore_index) {
  Tensor loss = at::empty({}, nll.options()), d_nll = at::empty(targets.sizes(), nll.options()),
         d_entropy = at::empty(targets.sizes(), nll.options());
  const Tensor values = nll.contiguous(), entropies = entropy.contiguous(),
               ids = prediction.contiguous(), flat = targets.contiguous(),
               weights = weight ? weight->contiguous() : Tensor(),
               divisor = normalizer ? normalizer->to(at::kDouble) : Tensor();
  const SftReduceParams params{.rows = targets.numel(),
                               .nll = row_values(values),
                               .entropy = row_values(entropies),
                               .prediction = ids.const_data_ptr<int64_t>(),
                               .targets = flat.const_data_ptr<int64_t>(),
                               .ignore_index = ignore_index,
                               .weight = data_or_null<float>(weights),
                               .normalizer = data_or_null<double>(divisor),
                               .entropy_weight = entropy_weight,
                               .gate = static_cast<EntropyGate>(entropy_gate),
                               .loss = writable_row_values(loss),
                               .d_nll = writable_row_values(d_nll),
                               .d_entropy = writable_row_values(d_entropy)};
  R2D_CALL_BACKEND(nll, sft_reduce, params);
  return {loss, d_nll, d_entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sft_loss(
    const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& normalizer, double entropy_weight, double entropy_temperature,
    int64_t entropy_gate, int64_t ignore_index, bool inplace_backward) {
  constexpr auto op = "sft_loss";
  check_rows(op, logits, targets, ignore_index);
  check_options(op, targets, weight, normalizer, entropy_weight, entropy_gate);
  check_temperature(op, "entropy_temperature", entropy_temperature);
  if (inplace_backward) {
    check_writable(op, "logits", logits);
    const at::TensorBase& base = logits.is_view() ? logits._base() : logits;
    TORCH_CHECK_VALUE(!(base.requires_grad() && base.is_leaf()), op,
                      ": inplace_backward overwrites the logits and takes the output of a model, "
                      "got a leaf that requires grad; pass inplace_backward=False");
  }
  const RowStats rows =
      row_stats(logits, targets, entropy_weight != 0.0 ? entropy_temperature : 0.0, ignore_index);
  auto [loss, d_nll, d_entropy] = reduce(rows.nll, rows.entropy, rows.prediction, targets, weight,
                                         normalizer, entropy_weight, entropy_gate, ignore_index);
  return {loss, d_nll, d_entropy, rows.state};
}

Reduced sft_reduce(const Tensor& nll, const Tensor& entropy, const Tensor& prediction,
                   const Tensor& targets, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& normalizer, double entropy_weight,
                   int64_t entropy_gate, int64_t ignore_index, c10::string_view caller) {
  const std::string name(caller);
  const char* op = name.c_str();
  TORCH_CHECK_TYPE(nll.scalar_type() == at::kFloat || nll.scalar_type() == at::kDouble, op,
                   ": nll takes dtype float32 or float64, got ", nll.scalar_type());
  const auto check_row_tensor = [&](const char* name, const Tensor& t, at::ScalarType dtype) {
    check_device(op, name, t, nll, "nll");
    check_dtype(op, name, t, dtype);
    check_shape(op, name, t, nll.sizes(), "of nll");
  };
  check_row_tensor("entropy", entropy, nll.scalar_type());
  check_row_tensor("prediction", prediction, at::kLong);
  check_row_tensor("targets", targets, at::kLong);
  check_options(op, targets, weight, normalizer, entropy_weight, entropy_gate);
  return reduce(nll, entropy, prediction, targets, weight, normalizer, entropy_weight, entropy_gate,
                ignore_index);
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  m.def(
      "sft_loss(Tensor logits, Tensor targets, Tensor? weight=None, Tensor? normalizer=None, "
      "float entropy_weight=0.0, float entropy_temperature=1.0, int entropy_gate=0, "
      "int ignore_index=-100, bool inplace_backward=False) -> "
      "(Tensor loss, Tensor d_nll, Tensor d_entropy, Tensor state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "sft_reduce(Tensor nll, Tensor entropy, Tensor prediction, Tensor targets, "
      "Tensor? weight=None, Tensor? normalizer=None, float entropy_weight=0.0, "
      "int entropy_gate=0, int ignore_index=-100, str op=\"sft_reduce\") -> "
      "(Tensor loss, Tensor d_nll, Tensor d_entropy)",
      {at::Tag::pt2_compliant_tag});
}

R2D_REGISTER("sft_loss", &sft_loss)
R2D_REGISTER("sft_reduce", &sft_reduce)

}  // namespace
}  // namespace r2dllm

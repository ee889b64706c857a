// SPDX-License-Identifier: Apache-2.0
#include "row_stats.h"

#include "torch_op.h"
#include "torch_row_stats.h"
#include "torch_vocab_pass.h"

namespace r2dllm {

RowValues row_values(const Tensor& values) {
  return {.data = values.const_data_ptr(), .is_double = values.scalar_type() == at::kDouble};
}

WritableRowValues writable_row_values(const Tensor& values) {
  return {.data = values.mutable_data_ptr(), .is_double = values.scalar_type() == at::kDouble};
}

namespace {

// [N, V] or [B, L, V] as the latter.
Tensor as_block(const Tensor& logits) { return logits.dim() == 2 ? logits.unsqueeze(0) : logits; }

at::ScalarType stats_dtype(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor new_state(const Tensor& logits) {
  auto shape = logits.sizes().vec();
  shape.back() = kRowStateSize;
  return at::empty(shape, logits.options().dtype(at::kDouble));
}

}  // namespace

void check_rows(const char* op, const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                bool is_whole) {
  TORCH_CHECK_VALUE(logits.dim() == 2 || logits.dim() == 3, op,
                    ": logits takes shape [N, V] or [B, L, V], got ", logits.sizes());
  check_logit_layout(op, logits);
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  check_device(op, "targets", targets, logits, "logits");
  check_dtype(op, "targets", targets, at::kLong);
  check_shape(op, "targets", targets, shape, "of the rows of logits");
  if (on_cuda(targets) || !is_whole) return;
  const Tensor flat = targets.contiguous();
  const int64_t* target = flat.const_data_ptr<int64_t>();
  const int64_t vocab = logits.size(-1);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    TORCH_CHECK_VALUE((target[i] >= 0 && target[i] < vocab) || target[i] == ignore_index, op,
                      ": targets takes ids in [0, V = ", vocab,
                      ") or ignore_index = ", ignore_index, ", got ", target[i], " at row ", i);
  }
}

void check_temperature(const char* op, const char* name, double temperature) {
  // Far enough from the ends of float32 for every product with a temperature.
  TORCH_CHECK_VALUE(temperature >= 1e-6 && temperature <= 1e6, op, ": ", name,
                    " takes a number in [1e-6, 1e6], got ", temperature);
}

RowStats row_stats(const Tensor& logits, const Tensor& targets, double temperature,
                   int64_t ignore_index) {
  const auto shape = targets.sizes();
  const auto options = logits.options();
  RowStats made{at::empty(shape, options.dtype(stats_dtype(logits))),
                at::empty(shape, options.dtype(stats_dtype(logits))),
                at::empty(shape, options.dtype(at::kFloat)),
                at::empty(shape, options.dtype(at::kLong)), new_state(logits)};
  if (targets.numel() == 0) return made;
  const LogitsView view = view_logits(as_block(logits), -1, 0);
  const Tensor flat = targets.contiguous();
  Tensor workspace;
#ifdef R2DLLM_WITH_CUDA
  if (on_cuda(logits)) {
    workspace = new_bytes(logits, cuda::row_stats_bytes(view));
  }
#endif
  const RowStatsParams params{.logits = view,
                              .targets = flat.const_data_ptr<int64_t>(),
                              .ignore_index = ignore_index,
                              .temperature = temperature,
                              .nll = writable_row_values(made.nll),
                              .entropy = writable_row_values(made.entropy),
                              .confidence = made.confidence.mutable_data_ptr<float>(),
                              .prediction = made.prediction.mutable_data_ptr<int64_t>(),
                              .state = static_cast<RowState*>(made.state.mutable_data_ptr()),
                              .workspace = bytes_of(workspace)};
  R2D_CALL_BACKEND(logits, row_stats, params);
  return made;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_stats_op(const Tensor& logits,
                                                                const Tensor& targets,
                                                                double temperature,
                                                                int64_t ignore_index,
                                                                bool with_entropy) {
  constexpr auto op = "row_stats";
  check_rows(op, logits, targets, ignore_index);
  check_temperature(op, "temperature", temperature);
  RowStats made = row_stats(logits, targets, with_entropy ? temperature : 0.0, ignore_index);
  return {made.nll, made.entropy, made.confidence, made.prediction, made.state};
}

void backward(const char* op, const Tensor& logits, const Tensor& targets, const Tensor& state,
              const Tensor& d_nll, const std::optional<Tensor>& d_entropy, double temperature,
              int64_t ignore_index, std::optional<int64_t> first_id, const Tensor& gradient) {
  check_rows(op, logits, targets, ignore_index, !first_id);
  check_temperature(op, "temperature", temperature);
  const Tensor wanted_state = new_state(logits.slice(-1, 0, 0));
  check_device(op, "state", state, logits, "logits");
  check_dtype(op, "state", state, at::kDouble);
  check_shape(op, "state", state, wanted_state.sizes(), "of the forward");
  const auto check_derivative = [&](const char* name, const Tensor& t) {
    check_device(op, name, t, logits, "logits");
    check_dtype(op, name, t, stats_dtype(logits));
    check_shape(op, name, t, targets.sizes(), "of targets");
  };
  check_derivative("d_nll", d_nll);
  if (d_entropy) check_derivative("d_entropy", *d_entropy);
  if (targets.numel() == 0) return;

  const Tensor flat = targets.contiguous(), rows = state.contiguous(), nll = d_nll.contiguous(),
               entropy = d_entropy ? d_entropy->contiguous() : Tensor(), out = as_block(gradient);
  const RowStatsBackwardParams params{
      .logits = view_logits(as_block(logits), -1, 0),
      .first_id = first_id.value_or(0),
      .targets = flat.const_data_ptr<int64_t>(),
      .ignore_index = ignore_index,
      .temperature = temperature,
      .state = static_cast<const RowState*>(rows.const_data_ptr()),
      .d_nll = row_values(nll),
      .d_entropy = d_entropy ? row_values(entropy) : RowValues{.data = nullptr, .is_double = false},
      .gradient = gradient.mutable_data_ptr(),
      .gradient_batch_stride = out.stride(0),
      .gradient_length_stride = out.stride(1)};
  R2D_CALL_BACKEND(logits, row_stats_backward, params);
}

Tensor row_stats_backward(const Tensor& logits, const Tensor& targets, const Tensor& state,
                          const Tensor& d_nll, const std::optional<Tensor>& d_entropy,
                          double temperature, int64_t ignore_index,
                          std::optional<int64_t> first_id) {
  Tensor gradient = at::empty(logits.sizes(), logits.options());
  backward("row_stats_backward", logits, targets, state, d_nll, d_entropy, temperature,
           ignore_index, first_id, gradient);
  return gradient;
}

void row_stats_backward_(const Tensor& logits, const Tensor& targets, const Tensor& state,
                         const Tensor& d_nll, const std::optional<Tensor>& d_entropy,
                         double temperature, int64_t ignore_index,
                         std::optional<int64_t> first_id) {
  check_writable("row_stats_backward_", "logits", logits);
  backward("row_stats_backward_", logits, targets, state, d_nll, d_entropy, temperature,
           ignore_index, first_id, logits);
  // What else was saved for a backward and shares this memory is stale: autograd then says so.
  bump(logits);
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  m.def(
      "row_stats(Tensor logits, Tensor targets, float temperature=1.0, int ignore_index=-100, "
      "bool with_entropy=True) -> (Tensor nll, Tensor entropy, Tensor confidence, "
      "Tensor prediction, Tensor state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "row_stats_backward(Tensor logits, Tensor targets, Tensor state, Tensor d_nll, "
      "Tensor? d_entropy=None, float temperature=1.0, int ignore_index=-100, int? first_id=None) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "row_stats_backward_(Tensor(a!) logits, Tensor targets, Tensor state, Tensor d_nll, "
      "Tensor? d_entropy=None, float temperature=1.0, int ignore_index=-100, int? first_id=None) "
      "-> ()",
      {at::Tag::pt2_compliant_tag});
}

R2D_REGISTER("row_stats", &row_stats_op)
R2D_REGISTER("row_stats_backward", &row_stats_backward)
R2D_REGISTER("row_stats_backward_", &row_stats_backward_)

}  // namespace
}  // namespace r2dllm

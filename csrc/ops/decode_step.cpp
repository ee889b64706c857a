// SPDX-License-Identifier: Apache-2.0
#include "decode_step.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "token_confidence.h"

namespace r2dllm {
namespace {

struct State {
  const Tensor &streak_count, &streak_id, &streak_sum, &streak_max, &counters;
};

// The options as the schema lists them; DecodeConfig.op_args() has the same order.
#define R2D_STEP_OPTIONS                                                                      \
  int64_t mask_id, int64_t base, double threshold, double factor, double error_budget,        \
      int64_t steps_per_block, int64_t confidence_cluster_size, double spatial_threshold,     \
      int64_t confidence_cluster_unmasked, int64_t token_cluster, int64_t token_cluster_size, \
      int64_t temporal_steps, double temporal_threshold, int64_t temporal_eval,               \
      double temperature, int64_t top_k, double top_p, int64_t seed, bool allow_mask_id,      \
      bool confidence_in_logits_dtype
#define R2D_STEP_OPTION_NAMES                                                               \
  mask_id, base, threshold, factor, error_budget, steps_per_block, confidence_cluster_size, \
      spatial_threshold, confidence_cluster_unmasked, token_cluster, token_cluster_size,    \
      temporal_steps, temporal_threshold, temporal_eval, temperature, top_k, top_p, seed,   \
      allow_mask_id, confidence_in_logits_dtype
constexpr auto kStepOptionsSchema =
    "int mask_id, int base, float threshold, float factor, float error_budget, "
    "int steps_per_block, int confidence_cluster_size, float spatial_threshold, "
    "int confidence_cluster_unmasked, int token_cluster, int token_cluster_size, "
    "int temporal_steps, float temporal_threshold, int temporal_eval, float temperature, "
    "int top_k, float top_p, int seed, bool allow_mask_id, bool confidence_in_logits_dtype";

std::pair<StepOptions, SamplingOptions> check_options(const char* op, const Tensor& logits,
                                                      R2D_STEP_OPTIONS) {
  TORCH_CHECK_VALUE(mask_id >= 0 && mask_id < logits.size(2), op,
                    ": config.mask_id takes a token id in [0, V = ", logits.size(2), "), got ",
                    mask_id);
  check_choice(op, "base", base, 5);
  check_probability(op, "threshold", threshold);
  TORCH_CHECK_VALUE(factor > 0.0, op, ": factor takes a number > 0, got ", factor);
  TORCH_CHECK_VALUE(error_budget >= 0.0, op, ": error_budget takes a number >= 0, got ",
                    error_budget);
  check_at_least(op, "steps_per_block", steps_per_block, 0);
  check_at_least(op, "confidence_cluster_size", confidence_cluster_size, 0);
  check_probability(op, "spatial_threshold", spatial_threshold);
  check_at_least(op, "confidence_cluster_unmasked", confidence_cluster_unmasked, -1);
  check_choice(op, "token_cluster", token_cluster, 4);
  check_at_least(op, "token_cluster_size", token_cluster_size, 1);
  check_at_least(op, "temporal_steps", temporal_steps, 0);
  check_probability(op, "temporal_threshold", temporal_threshold);
  check_choice(op, "temporal_eval", temporal_eval, 3);
  TORCH_CHECK_VALUE(temperature >= 0.0 && std::isfinite(temperature), op,
                    ": temperature takes a finite number >= 0, got ", temperature);
  check_at_least(op, "top_k", top_k, 0);
  check_probability(op, "top_p", top_p);
  const Rounding rounding = !confidence_in_logits_dtype             ? Rounding::kNone
                            : logits.scalar_type() == at::kBFloat16 ? Rounding::kBFloat16
                            : logits.scalar_type() == at::kHalf     ? Rounding::kHalf
                                                                    : Rounding::kNone;
  return {
      {mask_id, static_cast<BaseRule>(base), static_cast<float>(threshold), factor, error_budget,
       steps_per_block, confidence_cluster_size, static_cast<float>(spatial_threshold),
       confidence_cluster_unmasked, static_cast<TokenCluster>(token_cluster), token_cluster_size,
       temporal_steps, static_cast<float>(temporal_threshold),
       static_cast<TemporalEval>(temporal_eval), static_cast<uint64_t>(seed), rounding},
      {temperature, top_k, top_p}};
}

void check_state(const char* op, const Tensor& logits, const State& state) {
  const auto cells = logits.sizes().slice(0, 2);
  const auto check = [&](const char* name, const Tensor& t, at::ScalarType dtype,
                         at::IntArrayRef sizes, const char* shape) {
    check_device(op, name, t, logits, "logits");
    check_dtype(op, name, t, dtype);
    check_shape(op, name, t, sizes, shape);
    check_contiguous(op, name, t);
  };
  check("state.streak_count", state.streak_count, at::kInt, cells, "[B, L]");
  check("state.streak_id", state.streak_id, at::kLong, cells, "[B, L]");
  check("state.streak_sum", state.streak_sum, at::kFloat, cells, "[B, L]");
  check("state.streak_max", state.streak_max, at::kFloat, cells, "[B, L]");
  check("state.counters", state.counters, at::kLong, {logits.size(0), kCounters}, "[B, 4]");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step(const char* op, const Tensor& logits,
                                                const Tensor& tokens, const State& state,
                                                const std::optional<Tensor>& candidates,
                                                int64_t logits_shift, bool write,
                                                R2D_STEP_OPTIONS) {
  check_logits(op, logits);
  const auto cells = logits.sizes().slice(0, 2);
  check_device(op, "tokens", tokens, logits, "logits");
  check_dtype(op, "tokens", tokens, at::kLong);
  check_shape(op, "tokens", tokens, cells, "[B, L]");
  if (write) check_writable(op, "tokens", tokens);
  check_state(op, logits, state);
  if (candidates) {
    check_device(op, "candidates", *candidates, logits, "logits");
    check_dtype(op, "candidates", *candidates, at::kBool);
    check_shape(op, "candidates", *candidates, cells, "[B, L]");
  }
  check_choice(op, "logits_shift", logits_shift, 2);
  check_length(op, tokens);
  TORCH_CHECK_VALUE(temperature == 0.0 || logits.is_cpu(), op,
                    ": config.temperature takes 0 on CUDA (drawing tokens runs on the CPU only), "
                    "got ",
                    temperature);
  const auto [options, sampling] = check_options(op, logits, R2D_STEP_OPTION_NAMES);

  Tensor prediction = at::empty(cells, logits.options().dtype(at::kLong));
  Tensor confidence = at::empty(cells, logits.options().dtype(at::kFloat));
  Tensor rule = at::empty(cells, logits.options().dtype(at::kByte));
  Tensor remaining = at::empty({logits.size(0)}, logits.options().dtype(at::kInt));
  Tensor candidate_cells;
  if (candidates) candidate_cells = candidates->contiguous();

  const LogitsView view = view_logits(logits, allow_mask_id ? -1 : mask_id, logits_shift);
  const Tensor workspace = vocab_pass_workspace(logits, view);
  const DecodeStepParams params{view,
                                options,
                                sampling,
                                candidates ? candidate_cells.const_data_ptr<bool>() : nullptr,
                                tokens.const_data_ptr<int64_t>(),
                                tokens.stride(0),
                                tokens.stride(1),
                                write ? tokens.mutable_data_ptr<int64_t>() : nullptr,
                                state.streak_count.mutable_data_ptr<int32_t>(),
                                state.streak_id.mutable_data_ptr<int64_t>(),
                                state.streak_sum.mutable_data_ptr<float>(),
                                state.streak_max.mutable_data_ptr<float>(),
                                state.counters.mutable_data_ptr<int64_t>(),
                                prediction.mutable_data_ptr<int64_t>(),
                                confidence.mutable_data_ptr<float>(),
                                rule.mutable_data_ptr<uint8_t>(),
                                remaining.mutable_data_ptr<int32_t>(),
                                workspace.defined() ? workspace.mutable_data_ptr() : nullptr};
  R2D_CALL_BACKEND(logits, decode_step, params);
  return {prediction, confidence, rule, remaining};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_step(
    const Tensor& logits, const Tensor& tokens, const Tensor& streak_count, const Tensor& streak_id,
    const Tensor& streak_sum, const Tensor& streak_max, const Tensor& counters,
    const std::optional<Tensor>& candidates, int64_t logits_shift, R2D_STEP_OPTIONS) {
  return step("decode_step", logits, tokens,
              {streak_count, streak_id, streak_sum, streak_max, counters}, candidates, logits_shift,
              true, R2D_STEP_OPTION_NAMES);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select(const Tensor& logits, const Tensor& tokens,
                                                  const Tensor& streak_count,
                                                  const Tensor& streak_id, const Tensor& streak_sum,
                                                  const Tensor& streak_max, const Tensor& counters,
                                                  const std::optional<Tensor>& candidates,
                                                  int64_t logits_shift, R2D_STEP_OPTIONS) {
  return step("select", logits, tokens, {streak_count, streak_id, streak_sum, streak_max, counters},
              candidates, logits_shift, false, R2D_STEP_OPTION_NAMES);
}

std::string schema(const char* op, const char* tokens) {
  return std::string(op) + "(Tensor logits, " + tokens +
         " tokens, Tensor(b!) streak_count, Tensor(c!) streak_id, Tensor(d!) streak_sum, "
         "Tensor(e!) streak_max, Tensor(f!) counters, Tensor? candidates, int logits_shift, " +
         kStepOptionsSchema +
         ") -> (Tensor prediction, Tensor confidence, Tensor rule, Tensor remaining)";
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  m.def(schema("decode_step", "Tensor(a!)").c_str(), {at::Tag::pt2_compliant_tag});
  m.def(schema("select", "Tensor").c_str(), {at::Tag::pt2_compliant_tag});
}

R2D_REGISTER("decode_step", &decode_step)
R2D_REGISTER("select", &select)

}  // namespace
}  // namespace r2dllm

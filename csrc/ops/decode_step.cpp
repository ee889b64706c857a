// SPDX-License-Identifier: Apache-2.0
#include "decode_step.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "backend.h"
#include "checks.h"
#include "vocab_pass.h"

namespace r2dllm {
namespace {

struct State {
  const Tensor &streak_count, &streak_id, &streak_sum, &streak_max, &counters;
};

// The options as the schema lists them, in the order of DecodeConfig._all_op_args and with its
// defaults: parsing an argument costs a call half a microsecond, leaving it out next to nothing.
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
    "int mask_id, int base=0, float threshold=0.9, float factor=1.0, float error_budget=0.1, "
    "int steps_per_block=0, int confidence_cluster_size=3, float spatial_threshold=0.8, "
    "int confidence_cluster_unmasked=1, int token_cluster=1, int token_cluster_size=2, "
    "int temporal_steps=3, float temporal_threshold=0.8, int temporal_eval=0, "
    "float temperature=0.0, int top_k=0, float top_p=1.0, int seed=0, bool allow_mask_id=False, "
    "bool confidence_in_logits_dtype=False";

// What the step looks at: logits [B, L, V], or the statistics [B, L, 3] of logits of `dtype`.
struct Evidence {
  const char* name;
  const Tensor& values;
  bool is_logits;
  at::ScalarType dtype;

  at::IntArrayRef cells() const { return values.sizes().slice(0, 2); }
};

std::pair<StepOptions, SamplingOptions> check_options(const char* op, const Evidence& evidence,
                                                      R2D_STEP_OPTIONS) {
  if (evidence.is_logits) {
    const int64_t vocab = evidence.values.size(2);
    TORCH_CHECK_VALUE(mask_id >= 0 && mask_id < vocab, op,
                      ": config.mask_id takes a token id in [0, V = ", vocab, "), got ", mask_id);
  } else {
    check_at_least(op, "config.mask_id", mask_id, 0);
    TORCH_CHECK_VALUE(
        temperature == 0.0, op,
        ": config.temperature takes 0 with statistics (a token is drawn from logits), "
        "got ",
        temperature);
  }
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
  const Rounding rounding = !confidence_in_logits_dtype       ? Rounding::kNone
                            : evidence.dtype == at::kBFloat16 ? Rounding::kBFloat16
                            : evidence.dtype == at::kHalf     ? Rounding::kHalf
                                                              : Rounding::kNone;
  return {
      {mask_id, static_cast<BaseRule>(base), static_cast<float>(threshold), factor, error_budget,
       steps_per_block, confidence_cluster_size, static_cast<float>(spatial_threshold),
       confidence_cluster_unmasked, static_cast<TokenCluster>(token_cluster), token_cluster_size,
       temporal_steps, static_cast<float>(temporal_threshold),
       static_cast<TemporalEval>(temporal_eval), static_cast<uint64_t>(seed), rounding},
      {temperature, top_k, top_p}};
}

void check_state(const char* op, const Evidence& evidence, const State& state) {
  const auto cells = evidence.cells();
  const auto check = [&](const char* name, const Tensor& t, at::ScalarType dtype,
                         at::IntArrayRef sizes, const char* shape) {
    check_device(op, name, t, evidence.values, evidence.name);
    check_dtype(op, name, t, dtype);
    check_shape(op, name, t, sizes, shape);
    check_contiguous(op, name, t);
  };
  check("state.streak_count", state.streak_count, at::kInt, cells, "[B, L]");
  check("state.streak_id", state.streak_id, at::kLong, cells, "[B, L]");
  check("state.streak_sum", state.streak_sum, at::kFloat, cells, "[B, L]");
  check("state.streak_max", state.streak_max, at::kFloat, cells, "[B, L]");
  check("state.counters", state.counters, at::kLong, {cells[0], kCounters}, "[B, 5]");
}

// Only the shape, for evidence that is no logits.
LogitsView view_cells(const Tensor& values) {
  return {nullptr, LogitType::kFloat, values.size(0), values.size(1), 0, 0, 0, -1, 0};
}

Tensor step_workspace(const Tensor& values, [[maybe_unused]] const LogitsView& logits,
                      [[maybe_unused]] const SamplingOptions& sampling) {
#ifdef R2DLLM_WITH_CUDA
  if (on_cuda(values)) {
    return at::empty({cuda::decode_step_bytes(logits, sampling)},
                     values.options().dtype(at::kByte));
  }
#endif
  return {};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step(const char* op, const Evidence& evidence,
                                                const Tensor& tokens, const State& state,
                                                const std::optional<Tensor>& candidates,
                                                int64_t logits_shift, bool write,
                                                R2D_STEP_OPTIONS) {
  const Tensor& values = evidence.values;
  const auto cells = evidence.cells();
  check_device(op, "tokens", tokens, values, evidence.name);
  check_dtype(op, "tokens", tokens, at::kLong);
  check_shape(op, "tokens", tokens, cells, "[B, L]");
  if (write) check_writable(op, "tokens", tokens);
  check_state(op, evidence, state);
  check_candidates(op, candidates, values, evidence.name);
  check_choice(op, "logits_shift", logits_shift, 2);
  check_length(op, tokens);
  const auto [options, sampling] = check_options(op, evidence, R2D_STEP_OPTION_NAMES);

  Tensor prediction = at::empty(cells, values.options().dtype(at::kLong));
  Tensor confidence = at::empty(cells, values.options().dtype(at::kFloat));
  Tensor rule = at::empty(cells, values.options().dtype(at::kByte));
  Tensor remaining = at::empty({cells[0]}, values.options().dtype(at::kInt));
  Tensor candidate_cells;
  if (candidates) candidate_cells = candidates->contiguous();

  const LogitsView view = evidence.is_logits
                              ? view_logits(values, allow_mask_id ? -1 : mask_id, logits_shift)
                              : view_cells(values);
  const Tensor workspace = step_workspace(values, view, sampling);
  const DecodeStepParams params{view,
                                evidence.is_logits ? nullptr : values.const_data_ptr<double>(),
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
  R2D_CALL_BACKEND(values, decode_step, params);
  return {prediction, confidence, rule, remaining};
}

Evidence check_evidence(const char* op, const Tensor& logits) {
  check_logits(op, logits);
  return {"logits", logits, true, logits.scalar_type()};
}

Evidence check_evidence(const char* op, const Tensor& statistics, at::ScalarType dtype) {
  check_dim(op, "statistics", statistics, 3, "[B, L, 3]");
  check_dtype(op, "statistics", statistics, at::kDouble);
  TORCH_CHECK_VALUE(statistics.size(2) == kStatistics, op,
                    ": statistics takes shape [B, L, 3], got ", statistics.sizes());
  check_contiguous(op, "statistics", statistics);
  return {"statistics", statistics, false, dtype};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The tensors as the schemas list them.
#define R2D_STEP_TENSORS                                                          \
  const Tensor &tokens, const Tensor &streak_count, const Tensor &streak_id,      \
      const Tensor &streak_sum, const Tensor &streak_max, const Tensor &counters, \
      const std::optional<Tensor>&candidates
#define R2D_STEP_TENSOR_NAMES \
  tokens, {streak_count, streak_id, streak_sum, streak_max, counters}, candidates

Results decode_step(const Tensor& logits, R2D_STEP_TENSORS, int64_t logits_shift,
                    R2D_STEP_OPTIONS) {
  constexpr auto op = "decode_step";
  return step(op, check_evidence(op, logits), R2D_STEP_TENSOR_NAMES, logits_shift, true,
              R2D_STEP_OPTION_NAMES);
}

Results select(const Tensor& logits, R2D_STEP_TENSORS, int64_t logits_shift, R2D_STEP_OPTIONS) {
  constexpr auto op = "select";
  return step(op, check_evidence(op, logits), R2D_STEP_TENSOR_NAMES, logits_shift, false,
              R2D_STEP_OPTION_NAMES);
}

Results decode_step_statistics(const Tensor& statistics, R2D_STEP_TENSORS, at::ScalarType dtype,
                               R2D_STEP_OPTIONS) {
  constexpr auto op = "decode_step";
  return step(op, check_evidence(op, statistics, dtype), R2D_STEP_TENSOR_NAMES, 0, true,
              R2D_STEP_OPTION_NAMES);
}

Results select_statistics(const Tensor& statistics, R2D_STEP_TENSORS, at::ScalarType dtype,
                          R2D_STEP_OPTIONS) {
  constexpr auto op = "select";
  return step(op, check_evidence(op, statistics, dtype), R2D_STEP_TENSOR_NAMES, 0, false,
              R2D_STEP_OPTION_NAMES);
}

std::string schema(const std::string& op, const std::string& tokens, bool of_logits) {
  return op + (of_logits ? "(Tensor logits, " : ".statistics(Tensor statistics, ") + tokens +
         " tokens, Tensor(b!) streak_count, Tensor(c!) streak_id, Tensor(d!) streak_sum, "
         "Tensor(e!) streak_max, Tensor(f!) counters, Tensor? candidates, " +
         (of_logits ? "int logits_shift, " : "ScalarType dtype, ") + kStepOptionsSchema +
         ") -> (Tensor prediction, Tensor confidence, Tensor rule, Tensor remaining)";
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  for (const bool of_logits : {true, false}) {
    m.def(schema("decode_step", "Tensor(a!)", of_logits).c_str(), {at::Tag::pt2_compliant_tag});
    m.def(schema("select", "Tensor", of_logits).c_str(), {at::Tag::pt2_compliant_tag});
  }
}

R2D_REGISTER("decode_step", &decode_step)
R2D_REGISTER("select", &select)
R2D_REGISTER("decode_step.statistics", &decode_step_statistics)
R2D_REGISTER("select.statistics", &select_statistics)

}  // namespace
}  // namespace r2dllm

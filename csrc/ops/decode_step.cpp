// SPDX-License-Identifier: Apache-2.0
#include "decode_step.h"

#include <cmath>
#include <string>
#include <vector>

#include "torch_op.h"
#include "torch_vocab_pass.h"

namespace r2dllm {
namespace {

struct State {
  const Tensor &streak_count, &streak_id, &streak_sum, &streak_max, &counters;
};

// What the step looks at: logits [B, L, V], or the statistics [B, L, 3] of logits of `dtype`.
struct Evidence {
  const char* name;
  const Tensor& values;
  bool is_logits;
  at::ScalarType dtype;

  at::IntArrayRef cells() const { return values.sizes().slice(0, 2); }
};

// ---- options ---------------------------------------------------------------------------------

// What an option takes: f(op, name, value) raises.
const auto anything = [](auto&&...) {};
const auto probability = [](auto... args) { check_probability(args...); };
const auto positive = [](const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(value > 0.0, op, ": ", name, " takes a number > 0, got ", value);
};
const auto not_negative = [](const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && std::isfinite(value), op, ": ", name,
                    " takes a finite number >= 0, got ", value);
};
template <int64_t kLeast>
const auto at_least = [](auto... args) { check_at_least(args..., kLeast); };
template <auto kCount>
const auto choice = [](auto... args) { check_choice(args..., kCount); };

// X(type, type in the schema, name, default, what it takes): one row per option, in the order of
// the schema and of DecodeConfig. Those that published presets set come first: parsing an argument
// costs a call half a microsecond, leaving out the ones at the end next to nothing.
#define R2D_STEP_OPTIONS(X)                                            \
  X(int64_t, "int", mask_id, "", at_least<0>)                          \
  X(bool, "bool", allow_mask_id, "=False", anything)                   \
  X(bool, "bool", confidence_in_logits_dtype, "=False", anything)      \
  X(double, "float", temperature, "=0.0", not_negative)                \
  X(int64_t, "int", base, "=0", choice<BaseRule::kCount>)              \
  X(double, "float", threshold, "=0.9", probability)                   \
  X(double, "float", factor, "=1.0", positive)                         \
  X(double, "float", error_budget, "=0.1", not_negative)               \
  X(int64_t, "int", steps_per_block, "=0", at_least<0>)                \
  X(int64_t, "int", confidence_cluster_size, "=3", at_least<0>)        \
  X(double, "float", spatial_threshold, "=0.8", probability)           \
  X(int64_t, "int", confidence_cluster_unmasked, "=1", at_least<-1>)   \
  X(int64_t, "int", token_cluster, "=1", choice<TokenCluster::kCount>) \
  X(int64_t, "int", token_cluster_size, "=2", at_least<1>)             \
  X(int64_t, "int", temporal_steps, "=3", at_least<0>)                 \
  X(double, "float", temporal_threshold, "=0.8", probability)          \
  X(int64_t, "int", temporal_eval, "=0", choice<TemporalEval::kCount>) \
  X(int64_t, "int", top_k, "=0", at_least<0>)                          \
  X(double, "float", top_p, "=1.0", probability)                       \
  X(int64_t, "int", seed, "=0", anything)

#define R2D_FIELD(type, schema, name, value, takes) type name;
#define R2D_PARAMETER(type, schema, name, value, takes) , type name
#define R2D_ARGUMENT(type, schema, name, value, takes) .name = name,
#define R2D_SCHEMA(type, schema, name, value, takes) ", " schema " " #name value
#define R2D_CHECK(type, schema, name, value, takes) takes(op, "config." #name, options.name);

struct StepArguments {
  R2D_STEP_OPTIONS(R2D_FIELD)
};

void check_options(const char* op, const Evidence& evidence, const StepArguments& options) {
  R2D_STEP_OPTIONS(R2D_CHECK)
  if (evidence.is_logits) {
    const int64_t vocab = evidence.values.size(2);
    TORCH_CHECK_VALUE(options.mask_id < vocab, op,
                      ": config.mask_id takes a token id in [0, V = ", vocab, "), got ",
                      options.mask_id);
  } else {
    TORCH_CHECK_VALUE(options.temperature == 0.0, op,
                      ": config.temperature takes 0 with statistics (a token is drawn from "
                      "logits), got ",
                      options.temperature);
  }
}

Rounding rounding_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? Rounding::kBFloat16
         : dtype == at::kHalf   ? Rounding::kHalf
                                : Rounding::kNone;
}

StepOptions step_options(const StepArguments& options, at::ScalarType dtype) {
  const Rounding rounding =
      options.confidence_in_logits_dtype ? rounding_of(dtype) : Rounding::kNone;
  const auto spatial_threshold = static_cast<float>(options.spatial_threshold);
  return {.mask_id = options.mask_id,
          .base = static_cast<BaseRule>(options.base),
          .threshold = static_cast<float>(options.threshold),
          .factor = options.factor,
          .error_budget = options.error_budget,
          .steps_per_block = options.steps_per_block,
          .window = {.window = options.confidence_cluster_size,
                     .max_unmasked = options.confidence_cluster_unmasked,
                     .min_confidence = spatial_threshold,
                     .rounding = rounding},
          .run = {.mode = static_cast<TokenCluster>(options.token_cluster),
                  .min_run = options.token_cluster_size,
                  .min_confidence = spatial_threshold},
          .stability = {.steps = options.temporal_steps,
                        .min_confidence = static_cast<float>(options.temporal_threshold),
                        .mode = static_cast<TemporalEval>(options.temporal_eval)},
          .seed = static_cast<uint64_t>(options.seed),
          .rounding = rounding};
}

// ---- the step --------------------------------------------------------------------------------

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
  return {.data = nullptr,
          .type = LogitType::kFloat,
          .batch = values.size(0),
          .length = values.size(1),
          .vocab = 0,
          .batch_stride = 0,
          .length_stride = 0,
          .excluded = -1,
          .shift = 0};
}

Tensor step_workspace(const Tensor& values, const LogitsView& logits,
                      const SamplingOptions& sampling) {
#ifdef R2DLLM_WITH_CUDA
  if (on_cuda(values)) return new_bytes(values, cuda::decode_step_bytes(logits, sampling));
#endif
  (void)values, (void)logits, (void)sampling;
  return {};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results step(const char* op, const Evidence& evidence, const Tensor& tokens, bool writes,
             const State& state, const std::optional<Tensor>& candidates, int64_t logits_shift,
             const StepArguments& arguments) {
  const Tensor& values = evidence.values;
  const auto cells = evidence.cells();
  check_device(op, "tokens", tokens, values, evidence.name);
  check_dtype(op, "tokens", tokens, at::kLong);
  check_shape(op, "tokens", tokens, cells, "[B, L]");
  if (writes) check_writable(op, "tokens", tokens);
  check_state(op, evidence, state);
  check_candidates(op, candidates, values, evidence.name);
  TORCH_CHECK_VALUE(logits_shift == 0 || logits_shift == 1, op, ": logits_shift takes 0 or 1, got ",
                    logits_shift);
  check_length(op, tokens);
  check_options(op, evidence, arguments);

  const SamplingOptions sampling{
      .temperature = arguments.temperature, .top_k = arguments.top_k, .top_p = arguments.top_p};
  Tensor prediction = at::empty(cells, values.options().dtype(at::kLong));
  Tensor confidence = at::empty(cells, values.options().dtype(at::kFloat));
  Tensor rule = at::empty(cells, values.options().dtype(at::kByte));
  Tensor remaining = at::empty({cells[0]}, values.options().dtype(at::kInt));
  const Tensor candidate_cells = candidates ? candidates->contiguous() : Tensor();
  const int64_t excluded = arguments.allow_mask_id ? -1 : arguments.mask_id;
  const LogitsView view =
      evidence.is_logits ? view_logits(values, excluded, logits_shift) : view_cells(values);
  const Tensor workspace = step_workspace(values, view, sampling);
  const DecodeStepParams params{
      .logits = view,
      .statistics = evidence.is_logits ? nullptr : values.const_data_ptr<double>(),
      .options = step_options(arguments, evidence.dtype),
      .sampling = sampling,
      .candidates = data_or_null<bool>(candidate_cells),
      .tokens = tokens.const_data_ptr<int64_t>(),
      .tokens_batch_stride = tokens.stride(0),
      .tokens_length_stride = tokens.stride(1),
      .written_tokens = writes ? tokens.mutable_data_ptr<int64_t>() : nullptr,
      .streaks = {.count = state.streak_count.mutable_data_ptr<int32_t>(),
                  .id = state.streak_id.mutable_data_ptr<int64_t>(),
                  .sum = state.streak_sum.mutable_data_ptr<float>(),
                  .max = state.streak_max.mutable_data_ptr<float>()},
      .counters = state.counters.mutable_data_ptr<int64_t>(),
      .prediction = prediction.mutable_data_ptr<int64_t>(),
      .confidence = confidence.mutable_data_ptr<float>(),
      .rule = rule.mutable_data_ptr<uint8_t>(),
      .remaining = remaining.mutable_data_ptr<int32_t>(),
      .workspace = bytes_of(workspace)};
  R2D_CALL_BACKEND(values, decode_step, params);
  if (writes) bump(tokens);
  for (const Tensor* written : {&state.streak_count, &state.streak_id, &state.streak_sum,
                                &state.streak_max, &state.counters}) {
    bump(*written);
  }
  return {prediction, confidence, rule, remaining};
}

// ---- registration ----------------------------------------------------------------------------

template <bool kWrites>
constexpr const char* kOp = kWrites ? "decode_step" : "select";

template <bool kWrites>
Results of_logits(const Tensor& logits, const Tensor& tokens, const Tensor& streak_count,
                  const Tensor& streak_id, const Tensor& streak_sum, const Tensor& streak_max,
                  const Tensor& counters, const std::optional<Tensor>& candidates,
                  int64_t logits_shift R2D_STEP_OPTIONS(R2D_PARAMETER)) {
  constexpr auto op = kOp<kWrites>;
  check_logits(op, logits);
  return step(op, {"logits", logits, true, logits.scalar_type()}, tokens, kWrites,
              {streak_count, streak_id, streak_sum, streak_max, counters}, candidates, logits_shift,
              {R2D_STEP_OPTIONS(R2D_ARGUMENT)});
}

template <bool kWrites>
Results of_statistics(const Tensor& statistics, const Tensor& tokens, const Tensor& streak_count,
                      const Tensor& streak_id, const Tensor& streak_sum, const Tensor& streak_max,
                      const Tensor& counters, const std::optional<Tensor>& candidates,
                      at::ScalarType dtype R2D_STEP_OPTIONS(R2D_PARAMETER)) {
  constexpr auto op = kOp<kWrites>;
  check_dim(op, "statistics", statistics, 3, "[B, L, 3]");
  check_dtype(op, "statistics", statistics, at::kDouble);
  TORCH_CHECK_VALUE(statistics.size(2) == kStatistics, op,
                    ": statistics takes shape [B, L, 3], got ", statistics.sizes());
  check_contiguous(op, "statistics", statistics);
  return step(op, {"statistics", statistics, false, dtype}, tokens, kWrites,
              {streak_count, streak_id, streak_sum, streak_max, counters}, candidates, 0,
              {R2D_STEP_OPTIONS(R2D_ARGUMENT)});
}

std::string schema(const std::string& name, const std::string& evidence, const std::string& tokens,
                   const std::string& last) {
  return name + "(Tensor " + evidence + ", " + tokens +
         " tokens, Tensor(b!) streak_count, Tensor(c!) streak_id, Tensor(d!) streak_sum, "
         "Tensor(e!) streak_max, Tensor(f!) counters, Tensor? candidates, " +
         last + R2D_STEP_OPTIONS(R2D_SCHEMA) +
         ") -> (Tensor prediction, Tensor confidence, Tensor rule, Tensor remaining)";
}

template <bool kWrites>
void define(torch::Library& m) {
  const std::string op = kOp<kWrites>, tokens = kWrites ? "Tensor(a!)" : "Tensor";
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(schema(op, "logits", tokens, "int logits_shift").c_str(), tags);
  m.def(schema(op + ".statistics", "statistics", tokens, "ScalarType dtype").c_str(), tags);
}

TORCH_LIBRARY_FRAGMENT(r2dllm, m) {
  define<true>(m);
  define<false>(m);
}

R2D_REGISTER("decode_step", &of_logits<true>)
R2D_REGISTER("select", &of_logits<false>)
R2D_REGISTER("decode_step.statistics", &of_statistics<true>)
R2D_REGISTER("select.statistics", &of_statistics<false>)

}  // namespace
}  // namespace r2dllm

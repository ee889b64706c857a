// SPDX-License-Identifier: Apache-2.0
#include "decode_step.h"

#include <cmath>
#include <string>
#include <vector>

#include "step_arguments.h"
#include "torch_op.h"
#include "torch_vocab_pass.h"

namespace r2dllm {
namespace {

// What the step looks at: logits [B, L, V], or the statistics [B, L, 4] of logits of `dtype`.
struct Evidence {
  const char* name;
  const Tensor& values;
  bool is_logits;
  at::ScalarType dtype;

  at::IntArrayRef cells() const { return values.sizes().slice(0, 2); }
};

using MaybeTensor = std::optional<Tensor>;

struct StateTensors {
  const MaybeTensor &streak_count, &streak_id, &streak_sum, &streak_max, &counters, &step_map;
};

// The tensors that not every call has.
struct StepInputs {
  const MaybeTensor &candidates, &editable, &proposed, &slots;
  const c10::List<MaybeTensor>& rows;  // empty, or one for each of RowParams
};

// ---- options ---------------------------------------------------------------------------------

// What an option of the table takes: f(op, name, value) raises.
const auto anything = [](auto&&...) {};
const auto probability = [](auto... args) { check_probability(args...); };
const auto maybe_probability = [](const char* op, const char* name, double value) {
  if (value != kNone) check_probability(op, name, value);
};
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

#define R2D_PARAMETER(type, schema, name, value, takes) , type name
#define R2D_ARGUMENT(type, schema, name, value, takes) .name = name,
#define R2D_SCHEMA(type, schema, name, value, takes) ", " schema " " #name value
#define R2D_CHECK(type, schema, name, value, takes) takes(op, "config." #name, options.name);

Rounding rounding_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? Rounding::kBFloat16
         : dtype == at::kHalf   ? Rounding::kHalf
                                : Rounding::kNone;
}

bool wants_entropy(const StepArguments& options) {
  return options.report_entropy || static_cast<BaseRule>(options.base) == BaseRule::kEntropy;
}

// The option that needs a state, or null.
const char* needs_state(const StepArguments& options, const StepInputs& inputs,
                        const RowParams& rows) {
  if (static_cast<BaseRule>(options.base) == BaseRule::kSchedule) return "config.base=\"schedule\"";
  if (options.temporal_steps > 0) return "config.temporal_steps";
  if (static_cast<TokenCluster>(options.token_cluster) == TokenCluster::kRandom) {
    return "config.token_cluster=\"random\"";
  }
  if (options.temperature > 0.0) return "config.temperature";
  if (rows.temperature) return "rows.temperature";
  return inputs.slots ? "slots" : nullptr;
}

void check_options(const char* op, const Evidence& evidence, const StepArguments& options,
                   const StepInputs& inputs, const RowParams& rows) {
  R2D_STEP_OPTIONS(R2D_CHECK)
  TORCH_CHECK_VALUE(options.mask_id >= 0 || inputs.candidates, op,
                    ": candidates takes a tensor where config.mask_id is None, got None");
  TORCH_CHECK_VALUE(!inputs.editable || options.edit_threshold != kNone, op,
                    ": editable takes None where config.edit_threshold is None, got a tensor");
  TORCH_CHECK_VALUE(!rows.edit_threshold || options.edit_threshold != kNone, op,
                    ": rows.edit_threshold takes None where config.edit_threshold is None, got a "
                    "tensor");
  if (evidence.is_logits) {
    const int64_t vocab = evidence.values.size(2);
    TORCH_CHECK_VALUE(options.mask_id < vocab, op,
                      ": config.mask_id takes a token id in [0, V = ", vocab, "), got ",
                      options.mask_id);
    return;
  }
  TORCH_CHECK_VALUE(options.temperature == 0.0 && !rows.temperature, op,
                    ": config.temperature takes 0, and rows.temperature None, with statistics (a "
                    "token is drawn from logits), got ",
                    rows.temperature ? "a tensor" : "a temperature");
  TORCH_CHECK_VALUE(!inputs.proposed, op,
                    ": proposed takes None with statistics (a token is judged by its logit), got "
                    "a tensor");
}

// ---- the step --------------------------------------------------------------------------------

int64_t check_state(const char* op, const Evidence& evidence, const StateTensors& state,
                    const StepInputs& inputs) {
  const int64_t batch = evidence.cells()[0], length = evidence.cells()[1];
  const int64_t rows = state.counters->dim() > 0 ? state.counters->size(0) : 0;
  TORCH_CHECK_VALUE(inputs.slots || rows == batch, op, ": state takes B = ", batch,
                    " rows where slots is None, got ", rows);
  const auto check = [&](const char* name, const MaybeTensor& t, at::ScalarType dtype,
                         at::IntArrayRef sizes, const char* shape) {
    TORCH_CHECK_VALUE(t.has_value(), op, ": ", name, " takes a tensor, got None");
    check_device(op, name, *t, evidence.values, evidence.name);
    check_dtype(op, name, *t, dtype);
    check_shape(op, name, *t, sizes, shape);
    check_contiguous(op, name, *t);
  };
  check("state.streak_count", state.streak_count, at::kInt, {rows, length}, "[rows, L]");
  check("state.streak_id", state.streak_id, at::kLong, {rows, length}, "[rows, L]");
  check("state.streak_sum", state.streak_sum, at::kFloat, {rows, length}, "[rows, L]");
  check("state.streak_max", state.streak_max, at::kFloat, {rows, length}, "[rows, L]");
  check("state.counters", state.counters, at::kLong, {rows, kCounters}, "[rows, 5]");
  if (state.step_map) {
    check("state.step_map", state.step_map, at::kShort, {rows, length}, "[rows, L]");
  }
  return rows;
}

StateView view_state(int64_t rows, const StateTensors& state, const Tensor& slots) {
  if (!state.counters) return {};
  return {.rows = rows,
          .slots = data_or_null<int64_t>(slots),
          .streaks = {.count = state.streak_count->mutable_data_ptr<int32_t>(),
                      .id = state.streak_id->mutable_data_ptr<int64_t>(),
                      .sum = state.streak_sum->mutable_data_ptr<float>(),
                      .max = state.streak_max->mutable_data_ptr<float>()},
          .counters = state.counters->mutable_data_ptr<int64_t>(),
          .step_map = state.step_map ? state.step_map->mutable_data_ptr<int16_t>() : nullptr};
}

// The parameters of the rows in the order of the Python class. They are read in place, so that a
// captured graph sees what lies there when it is replayed.
RowParams view_rows(const char* op, const Evidence& evidence,
                    const c10::List<MaybeTensor>& tensors) {
  RowParams rows;
  if (tensors.empty()) return rows;
  constexpr int64_t kFields = 12;
  TORCH_CHECK_VALUE(tensors.size() == kFields, op, ": rows takes none or ", kFields,
                    " tensors, got ", tensors.size());
  size_t next = 0;
  // The tensor of a parameter, which is of one of two dtypes, or null.
  const auto take = [&](const char* name, at::ScalarType wide, at::ScalarType narrow) {
    const MaybeTensor tensor = tensors.get(next++);
    std::pair<const void*, bool> found{nullptr, false};
    if (!tensor) return found;
    check_device(op, name, *tensor, evidence.values, evidence.name);
    TORCH_CHECK_TYPE(tensor->scalar_type() == wide || tensor->scalar_type() == narrow, op, ": ",
                     name, " takes dtype ", narrow, " or ", wide, ", got ", tensor->scalar_type());
    check_shape(op, name, *tensor, evidence.cells().slice(0, 1), "[B]");
    check_contiguous(op, name, *tensor);
    found = {tensor->const_data_ptr(), tensor->scalar_type() == wide};
    return found;
  };
  const auto values = [&](const char* name) {
    const auto [data, is_wide] = take(name, at::kDouble, at::kFloat);
    return RowValues{.data = data, .is_double = is_wide};
  };
  const auto integers = [&](const char* name, at::ScalarType narrow = at::kInt) {
    const auto [data, is_wide] = take(name, at::kLong, narrow);
    return RowIntegers{.data = data, .is_wide = is_wide};
  };
  // Braces are evaluated in order.
  return {.threshold = values("rows.threshold"),
          .quota = integers("rows.quota"),
          .error_budget = values("rows.error_budget"),
          .entropy_budget = values("rows.entropy_budget"),
          .spatial_threshold = values("rows.spatial_threshold"),
          .temporal_threshold = values("rows.temporal_threshold"),
          .edit_threshold = values("rows.edit_threshold"),
          .temperature = values("rows.temperature"),
          .top_k = integers("rows.top_k"),
          .top_p = values("rows.top_p"),
          .min_p = values("rows.min_p"),
          .seed = integers("rows.seed", at::kLong)};
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

Tensor step_workspace(const Tensor& values, const DecodeStepParams& params) {
#ifdef R2DLLM_WITH_CUDA
  if (on_cuda(values)) return new_bytes(values, cuda::decode_step_bytes(params));
#endif
  (void)values, (void)params;
  return {};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results step(const char* op, const Evidence& evidence, const Tensor& tokens, bool writes,
             const StateTensors& state, const StepInputs& inputs, int64_t logits_shift,
             const StepArguments& arguments) {
  const Tensor& values = evidence.values;
  const auto cells = evidence.cells();
  check_device(op, "tokens", tokens, values, evidence.name);
  TORCH_CHECK_TYPE(tokens.scalar_type() == at::kLong || tokens.scalar_type() == at::kInt, op,
                   ": tokens takes dtype int64 or int32, got ", tokens.scalar_type());
  check_shape(op, "tokens", tokens, cells, "[B, L]");
  if (writes) check_writable(op, "tokens", tokens);
  check_cells(op, "candidates", inputs.candidates, at::kBool, values, evidence.name);
  check_cells(op, "editable", inputs.editable, at::kBool, values, evidence.name);
  check_cells(op, "proposed", inputs.proposed, at::kLong, values, evidence.name);
  if (inputs.slots) {
    check_device(op, "slots", *inputs.slots, values, evidence.name);
    check_dtype(op, "slots", *inputs.slots, at::kLong);
    check_shape(op, "slots", *inputs.slots, cells.slice(0, 1), "[B]");
  }
  TORCH_CHECK_VALUE(logits_shift == 0 || logits_shift == 1, op, ": logits_shift takes 0 or 1, got ",
                    logits_shift);
  check_length(op, tokens);
  const RowParams rows = view_rows(op, evidence, inputs.rows);
  check_options(op, evidence, arguments, inputs, rows);
  const char* const needing = needs_state(arguments, inputs, rows);
  TORCH_CHECK_VALUE(state.counters || needing == nullptr, op, ": state takes a DecodeState with ",
                    needing, ", got None");
  const int64_t state_rows = state.counters ? check_state(op, evidence, state, inputs) : 0;

  const auto contiguous = [](const MaybeTensor& t) { return t ? t->contiguous() : Tensor(); };
  const Tensor candidates = contiguous(inputs.candidates), editable = contiguous(inputs.editable),
               proposed = contiguous(inputs.proposed), slots = contiguous(inputs.slots);
  const auto made = [&](at::IntArrayRef shape, at::ScalarType dtype) {
    return at::empty(shape, values.options().dtype(dtype));
  };
  const bool with_entropy = wants_entropy(arguments);
  const Tensor prediction = made(cells, at::kLong), confidence = made(cells, at::kFloat),
               rule = made(cells, at::kByte), remaining = made({cells[0]}, at::kInt),
               entropy = with_entropy ? made(cells, at::kFloat) : made({0}, at::kFloat);
  const Rounding rounding =
      arguments.confidence_in_logits_dtype ? rounding_of(evidence.dtype) : Rounding::kNone;
  const bool bans = static_cast<MaskPrediction>(arguments.mask_prediction) == MaskPrediction::kBan;
  DecodeStepParams params{
      .logits = evidence.is_logits
                    ? view_logits(values, bans ? arguments.mask_id : -1, logits_shift)
                    : view_cells(values),
      .statistics = evidence.is_logits ? nullptr : values.const_data_ptr<double>(),
      .options = step_options(arguments, rounding),
      .sampling = {.temperature = arguments.temperature,
                   .top_k = arguments.top_k,
                   .top_p = arguments.top_p,
                   .min_p = arguments.min_p},
      .rows = rows,
      .candidates = data_or_null<bool>(candidates),
      .editable = data_or_null<bool>(editable),
      .proposed = data_or_null<int64_t>(proposed),
      .tokens = {.data = tokens.const_data_ptr(),
                 .written = writes ? tokens.mutable_data_ptr() : nullptr,
                 .is_wide = tokens.scalar_type() == at::kLong,
                 .batch_stride = tokens.stride(0),
                 .length_stride = tokens.stride(1)},
      .state = view_state(state_rows, state, slots),
      .prediction = prediction.mutable_data_ptr<int64_t>(),
      .confidence = confidence.mutable_data_ptr<float>(),
      .rule = rule.mutable_data_ptr<uint8_t>(),
      .remaining = remaining.mutable_data_ptr<int32_t>(),
      .entropy = with_entropy ? entropy.mutable_data_ptr<float>() : nullptr,
      .workspace = nullptr};
  const Tensor workspace = step_workspace(values, params);
  params.workspace = bytes_of(workspace);
  R2D_CALL_BACKEND(values, decode_step, params);
  if (writes) bump(tokens);
  for (const MaybeTensor* written : {&state.streak_count, &state.streak_id, &state.streak_sum,
                                     &state.streak_max, &state.counters, &state.step_map}) {
    bump(*written);
  }
  return {prediction, confidence, rule, remaining, entropy};
}

// ---- registration ----------------------------------------------------------------------------

template <bool kWrites>
constexpr const char* kOp = kWrites ? "decode_step" : "select";

// The tensors between `tokens` and the options, as the schema lists them.
#define R2D_STEP_TENSORS                                                                        \
  const MaybeTensor &streak_count, const MaybeTensor &streak_id, const MaybeTensor &streak_sum, \
      const MaybeTensor &streak_max, const MaybeTensor &counters, const MaybeTensor &step_map,  \
      const MaybeTensor &candidates, const MaybeTensor &editable, const MaybeTensor &proposed,  \
      const MaybeTensor &slots, const c10::List<MaybeTensor>&rows
constexpr auto kTensorsSchema =
    "Tensor(b!)? streak_count, Tensor(c!)? streak_id, Tensor(d!)? streak_sum, "
    "Tensor(e!)? streak_max, Tensor(f!)? counters, Tensor(g!)? step_map, Tensor? candidates, "
    "Tensor? editable, Tensor? proposed, Tensor? slots, Tensor?[] rows, ";

template <bool kWrites>
Results of_logits(const Tensor& logits, const Tensor& tokens, R2D_STEP_TENSORS,
                  int64_t logits_shift R2D_STEP_OPTIONS(R2D_PARAMETER)) {
  constexpr auto op = kOp<kWrites>;
  check_logits(op, logits);
  return step(op, {"logits", logits, true, logits.scalar_type()}, tokens, kWrites,
              {streak_count, streak_id, streak_sum, streak_max, counters, step_map},
              {candidates, editable, proposed, slots, rows}, logits_shift,
              {R2D_STEP_OPTIONS(R2D_ARGUMENT)});
}

template <bool kWrites>
Results of_statistics(const Tensor& statistics, const Tensor& tokens, R2D_STEP_TENSORS,
                      at::ScalarType dtype R2D_STEP_OPTIONS(R2D_PARAMETER)) {
  constexpr auto op = kOp<kWrites>;
  check_dim(op, "statistics", statistics, 3, "[B, L, 4]");
  check_dtype(op, "statistics", statistics, at::kDouble);
  TORCH_CHECK_VALUE(statistics.size(2) == kStatistics, op,
                    ": statistics takes shape [B, L, 4], got ", statistics.sizes());
  check_contiguous(op, "statistics", statistics);
  return step(op, {"statistics", statistics, false, dtype}, tokens, kWrites,
              {streak_count, streak_id, streak_sum, streak_max, counters, step_map},
              {candidates, editable, proposed, slots, rows}, 0, {R2D_STEP_OPTIONS(R2D_ARGUMENT)});
}

std::string schema(const std::string& name, const std::string& evidence, const std::string& tokens,
                   const std::string& last) {
  return name + "(Tensor " + evidence + ", " + tokens + " tokens, " + kTensorsSchema + last +
         R2D_STEP_OPTIONS(R2D_SCHEMA) +
         ") -> (Tensor prediction, Tensor confidence, Tensor rule, Tensor remaining, "
         "Tensor entropy)";
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
R2D_NOT_DIFFERENTIABLE("decode_step")
R2D_NOT_DIFFERENTIABLE("select")
R2D_NOT_DIFFERENTIABLE("decode_step.statistics")
R2D_NOT_DIFFERENTIABLE("select.statistics")

}  // namespace
}  // namespace r2dllm

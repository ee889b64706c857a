// SPDX-License-Identifier: Apache-2.0
// The options of a step: as the op takes them, and as the rules do.
#pragma once

#include "../rules/decode_step.h"

namespace r2dllm {

// X(type, type in the schema, name, default, what it takes): one row per option, in the order of
// the schema. Those that published settings change come first: in a call through torch's argument
// parser, each costs half a microsecond, and leaving out the ones at the end next to nothing.
#define R2D_STEP_OPTIONS(X)                                                      \
  X(int64_t, "int", mask_id, "", at_least<-1>)                                   \
  X(int64_t, "int", mask_prediction, "=0", choice<MaskPrediction::kCount>)       \
  X(bool, "bool", confidence_in_logits_dtype, "=False", anything)                \
  X(double, "float", temperature, "=0.0", not_negative)                          \
  X(int64_t, "int", base, "=0", choice<BaseRule::kCount>)                        \
  X(double, "float", threshold, "=0.9", maybe_probability)                       \
  X(int64_t, "int", quota, "=1", at_least<0>)                                    \
  X(int64_t, "int", compare, "=0", choice<Compare::kCount>)                      \
  X(double, "float", error_budget, "=0.005", not_negative)                       \
  X(bool, "bool", last_free, "=True", anything)                                  \
  X(int64_t, "int", steps_per_block, "=0", at_least<0>)                          \
  X(double, "float", entropy_budget, "=0.05", not_negative)                      \
  X(double, "float", factor, "=1.0", positive)                                   \
  X(bool, "bool", report_entropy, "=False", anything)                            \
  X(double, "float", edit_threshold, "=-1.0", maybe_probability)                 \
  X(int64_t, "int", confidence_cluster_size, "=3", at_least<0>)                  \
  X(double, "float", spatial_threshold, "=0.8", probability)                     \
  X(int64_t, "int", confidence_cluster_unmasked, "=1", at_least<-1>)             \
  X(int64_t, "int", neighbour_radius, "=0", at_least<0>)                         \
  X(double, "float", neighbour_threshold, "=0.75", probability)                  \
  X(int64_t, "int", token_cluster, "=1", choice<TokenCluster::kCount>)           \
  X(int64_t, "int", token_cluster_size, "=2", at_least<1>)                       \
  X(int64_t, "int", temporal_steps, "=3", at_least<0>)                           \
  X(double, "float", temporal_threshold, "=0.8", probability)                    \
  X(int64_t, "int", temporal_eval, "=0", choice<TemporalEval::kCount>)           \
  X(int64_t, "int", sampled_confidence, "=0", choice<SampledConfidence::kCount>) \
  X(int64_t, "int", top_k, "=0", at_least<0>)                                    \
  X(double, "float", top_p, "=1.0", probability)                                 \
  X(double, "float", min_p, "=0.0", probability)                                 \
  X(int64_t, "int", seed, "=0", anything)

#define R2D_FIELD(type, schema, name, value, takes) type name;

struct StepArguments {
  R2D_STEP_OPTIONS(R2D_FIELD)
};

#undef R2D_FIELD

constexpr double kNone = -1.0;  // in place of a probability

inline float maybe_threshold(double value) {
  return value == kNone ? kNoThreshold : static_cast<float>(value);
}

inline StepOptions step_options(const StepArguments& given, Rounding rounding) {
  const auto spatial_threshold = static_cast<float>(given.spatial_threshold);
  return {.mask_id = given.mask_id,
          .mask_prediction = static_cast<MaskPrediction>(given.mask_prediction),
          .compare = static_cast<Compare>(given.compare),
          .base = {.rule = static_cast<BaseRule>(given.base),
                   .threshold = maybe_threshold(given.threshold),
                   .quota = given.quota,
                   .factor = given.factor,
                   .error_budget = given.error_budget,
                   .entropy_budget = given.entropy_budget,
                   .last_free = given.last_free,
                   .steps_per_block = given.steps_per_block},
          .window = {.window = given.confidence_cluster_size,
                     .max_unmasked = given.confidence_cluster_unmasked,
                     .min_confidence = spatial_threshold,
                     .rounding = rounding},
          .neighbour = {.radius = given.neighbour_radius,
                        .threshold = static_cast<float>(given.neighbour_threshold)},
          .run = {.mode = static_cast<TokenCluster>(given.token_cluster),
                  .min_run = given.token_cluster_size,
                  .min_confidence = spatial_threshold},
          .stability = {.steps = given.temporal_steps,
                        .min_confidence = static_cast<float>(given.temporal_threshold),
                        .mode = static_cast<TemporalEval>(given.temporal_eval)},
          .edit_threshold = maybe_threshold(given.edit_threshold),
          .sampled_confidence = static_cast<SampledConfidence>(given.sampled_confidence),
          .seed = static_cast<uint64_t>(given.seed),
          .rounding = rounding};
}

}  // namespace r2dllm

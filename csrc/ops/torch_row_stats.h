// SPDX-License-Identifier: Apache-2.0
// What ops on rows with targets share: checks of the arguments, and the pass itself.
#pragma once

#include <ATen/core/Tensor.h>

#include "../rules/row_stats.h"
#include "../rules/row_values.h"

namespace r2dllm {

struct RowStats {
  at::Tensor nll, entropy, confidence, prediction, state;
};
// `is_whole`: the logits are those of all ids; else a target may lie beyond them.
void check_rows(const char* op, const at::Tensor& logits, const at::Tensor& targets,
                int64_t ignore_index, bool is_whole = true);
void check_temperature(const char* op, const char* name, double temperature);
RowStats row_stats(const at::Tensor& logits, const at::Tensor& targets, double temperature,
                   int64_t ignore_index);

RowValues row_values(const at::Tensor& values);
WritableRowValues writable_row_values(const at::Tensor& values);

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// The pass over V on one slice of a row, per instruction set. No torch: raw pointers only.
#pragma once

#include <vector>

#include "../rules/confidence.h"
#include "../rules/logits_view.h"
#include "../rules/row_loss.h"

namespace r2dllm::cpu {

struct VocabKernels {
  const char* instruction_set;

  // Statistics of `n` logits, read once from memory and once from the L1 cache.
  VocabStats (*stats)(const void* logits, int64_t n);

  // What the sum of these `stats` lacks because the terms near `column` were added up in float32.
  // That matters near a term which is most of the row: there a rounding of the sum is one of the
  // confidence.
  double (*correction)(const void* logits, int64_t n, int64_t column, const VocabStats& stats);

  // Lowest index of a logit equal to `value`, which must be present.
  int64_t (*find)(const void* logits, int64_t n, double value);

  // Sum over logits >= cutoff of 2^((logit - max) * scale).
  double (*tempered_mass)(const void* logits, int64_t n, double max, double scale, double cutoff);

  // `max` is the greatest of these logits, finite.
  TemperedSums (*tempered_sums)(const void* logits, int64_t n, double max, double scale);

  // Writes the gradient of `n` logits, none of them the target's; `out` may be `logits`.
  void (*gradient)(const void* logits, void* out, int64_t n, const RowGradient& row);

  double (*load)(const void* logits, int64_t i);
  void (*store)(void* logits, int64_t i, double value);  // rounded to nearest
};

// Best first. Only "portable" has kernels for float64, which all others share.
struct InstructionSet {
  const char* name;
  const VocabKernels* kernels;  // by LogitType; null: not compiled
  bool processor_runs_it;

  bool is_supported() const { return kernels != nullptr && processor_runs_it; }
};
std::vector<InstructionSet> instruction_sets();

// The kernels called `wanted`; null or empty: the best that are supported. Throws
// std::invalid_argument, which names R2DLLM_CPU and what is supported, if these are not.
const VocabKernels* choose_kernels(const char* wanted);

// What the environment variable R2DLLM_CPU asks for; it is read once.
const VocabKernels& vocab_kernels(LogitType type);
const char* instruction_set();

// Each defined in its own translation unit, compiled for its instruction set.
const VocabKernels* avx512_kernels();  // [LogitType::kDouble)
const VocabKernels* avx2_kernels();
const VocabKernels* portable_kernels();  // [LogitType::kCount)

}  // namespace r2dllm::cpu

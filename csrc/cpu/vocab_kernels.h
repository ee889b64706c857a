// SPDX-License-Identifier: Apache-2.0
// The pass over V on one slice of a row, per instruction set. No torch: raw pointers only.
#pragma once

#include <vector>

#include "../rules/confidence.h"
#include "../rules/logits_view.h"
#include "../rules/row_stats.h"
#include "../rules/sampling.h"

namespace r2dllm::cpu {

// How exact the float32 kernels are, in units u = 2^-24 (half a place of a float32 just above 1).
//
//                                                        portable   avx2   avx512
//   a term 2^(z * log2(e) - exponent), relative:
//     polynomial and the roundings in it, every 7th float f tried     2.83     2.83     1.88
//     f rounded once, ln 2 * its greatest value             0.35     0.35     0.01
//     entry of the table                                       0        0     0.94
//     fraction * power rounded, where it is no power of 2      0        0     1
//   a term                                                  3.18     3.18     3.83
//   a sum, relative: every rounding that a term meets on
//   its way to double, 8 groups in one lane and the tree     7+4      7+3      7+2
//
// So a term is within kTermError and a sum of exact terms within kSumError. kLog2e for log2(e), as
// far as `log2e_factor` does not mend it, moves a term that is d nats below its slice's maximum by
// 0.224 d: at most kLog2eError d. From double onwards nothing shows (1e-13).
//
// `probability` of an argmax with `correction`: the term itself is in its sum, and its neighbours
// are added up in double, so that only the rest 1 - p of the mass counts. The mean of d over the
// rest is greatest where all of it is alike: log(p * V / (1 - p)). Relative, and one rounding to
// float32:
//   (1 - p) * (2 * kTermError + kSumError + kLog2eError * log(1 + p * V / (1 - p))) + 1
// Without the correction, and for any other token, the first factor is 1. -log p has the same
// error, absolute; a gradient p * d has it times p.
//
// An entropy is -log p + the mean of d, and an error of the first, (1 - p) times the above, is one
// of at most as much relative to -log p. A product term * d has two roundings more than its term;
// where the mean of d is taken over the products themselves, call it D, the entropy is within,
// relative (and, absolute, V roundings of a double at 1 and kLeastEntropy):
//   2 * kTermError + 2 * kSumError + 3 + kLog2eError * max(D, log(1 + p * V / (1 - p)))
constexpr double kTermError = 4, kSumError = 11, kLog2eError = 0.25;

struct VocabKernels {
  const char* instruction_set;

  // Statistics of `n` logits, read once from memory and once from the L1 cache.
  OnlineSoftmax (*stats)(const void* logits, int64_t n);

  // The same statistics to the bit, and from the same read the sum of term * (logit - max), in
  // nats.
  OnlineSoftmax (*stats_and_moment)(const void* logits, int64_t n, double* moment);

  // What the sum of these `stats` lacks because the terms near `column` were added up in float32.
  // That matters near a term which is most of the row: there a rounding of the sum is one of the
  // confidence.
  double (*correction)(const void* logits, int64_t n, int64_t column, const OnlineSoftmax& stats);

  // Lowest index of a logit equal to `value`, which must be present.
  int64_t (*find)(const void* logits, int64_t n, double value);

  // Sum over logits >= cutoff of 2^((logit - max) * scale); the cutoff is finite.
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

// SPDX-License-Identifier: Apache-2.0
// positional_ambiguity: the chosen cell of each run of equal predictions.
#pragma once

#include "../rules/positional_ambiguity.h"

namespace r2dllm {

struct PositionalAmbiguityParams {
  int64_t batch, length;
  const int64_t* prediction;  // [B, L]
  const float* confidence;    // [B, L]
  const bool* is_masked;      // [B, L]
  float min_confidence;
  int64_t min_run;
  TokenCluster mode;
  uint64_t seed;
  const int64_t* row;  // [B], identities in the random numbers
  int64_t step;
  bool* chosen;  // [B, L], out
};

namespace cpu {
void positional_ambiguity(const PositionalAmbiguityParams& params);
}
namespace cuda {
void positional_ambiguity(const PositionalAmbiguityParams& params);
}

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace r2dllm {

enum class LogitType : int { kFloat, kBFloat16, kHalf, kDouble, kCount };

inline constexpr int64_t kLogitBytes[] = {4, 2, 2, 8};

struct LogitsView {
  const void* data;
  LogitType type;
  int64_t batch, length, vocab;         // [B, L, V]
  int64_t batch_stride, length_stride;  // in elements; that of V is 1
  int64_t excluded;                     // this column counts as -inf; -1: none
  int64_t shift;                        // cell l is judged by row max(l - shift, 0)
};

}  // namespace r2dllm

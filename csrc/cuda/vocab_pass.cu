// SPDX-License-Identifier: Apache-2.0
#include "../ops/vocab_pass.h"
#include "vocab_pass.cuh"

namespace r2dllm::cuda {

int64_t slices_of(const LogitsView& logits) {
  int64_t slices = 0;
  with_format(logits.type, [&](auto format) {
    constexpr int64_t columns = kSliceColumns<decltype(format)>;
    slices = (logits.vocab + columns - 1) / columns;
  });
  return slices;
}

int64_t vocab_pass_bytes(const LogitsView& logits, bool with_entropy) {
  return PassWorkspace(logits, with_entropy, nullptr).bytes;
}

}  // namespace r2dllm::cuda

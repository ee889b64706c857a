// SPDX-License-Identifier: Apache-2.0
// The pass over V of the candidate rows, on all threads, and what can be asked of a row afterwards.
#pragma once

#include <cstring>
#include <vector>

#include "../rules/vocab_statistics.h"
#include "vocab_kernels.h"

namespace r2dllm::cpu {

class VocabPass {
 public:
  // Reads the V logits of each cell whose `candidates` [B, L] is true once; nothing of size V is
  // written. With a scale (see tempered_scale) the same read also yields `tempered`.
  VocabPass(const LogitsView& logits, const bool* candidates, double scale = 0.0,
            bool with_entropy = false);

  // What was read, in the order of the block; i in [0, cells()) below.
  int64_t cells() const { return static_cast<int64_t>(cells_.size()); }
  int64_t cell(int64_t i) const { return cells_[i]; }  // b * L + l
  const OnlineSoftmax& stats(int64_t i) const { return stats_[i]; }
  TemperedSums tempered(int64_t i) const;
  const VocabKernels& kernels() const { return kernels_; }

  int64_t argmax(int64_t i) const { return argmax_[i]; }  // lowest on ties; -1 if not valid
  float probability(int64_t i, int64_t column) const;
  OnlineSoftmax token_stats(int64_t i, int64_t column) const;  // of that logit alone
  double mass(int64_t i, int64_t column) const;                // 1 / probability, not rounded

  // Of softmax(logits), with_entropy. `moment` is a Statistic: to a mass relative to the argmax.
  double moment(int64_t i) const;
  double entropy(int64_t i) const;  // nats, >= 0; NaN if not valid

  int64_t logit_bytes() const { return bytes_; }
  int64_t slices() const { return slices_; }
  int64_t slice_size(int64_t slice) const {
    const int64_t left = logits_.vocab - slice * kSliceWidth;
    return left < kSliceWidth ? left : kSliceWidth;
  }

  // f(pointer to the logits of a slice). The excluded column reads as -inf.
  template <class F>
  auto with_slice(int64_t i, int64_t slice, F f) const {
    const int64_t begin = slice * kSliceWidth, size = slice_size(slice);
    const char* data = logit(i, begin);
    if (logits_.excluded < begin || logits_.excluded >= begin + size) return f(data);
    alignas(64) char copy[kSliceWidth * sizeof(double)];
    memcpy(copy, data, size * bytes_);
    exclude(copy + (logits_.excluded - begin) * bytes_);
    return f(static_cast<const char*>(copy));
  }

 private:
  const char* logit(int64_t i, int64_t column) const {
    const int64_t b = cells_[i] / logits_.length, cell = cells_[i] % logits_.length;
    const int64_t l = cell > logits_.shift ? cell - logits_.shift : 0;
    return static_cast<const char*>(logits_.data) +
           (b * logits_.batch_stride + l * logits_.length_stride + column) * bytes_;
  }
  double term(int64_t i, int64_t column) const;
  void exclude(char* logit) const;
  void merge_slices(int64_t i);

  LogitsView logits_;
  const VocabKernels& kernels_;
  int64_t bytes_;
  int64_t slices_;
  double scale_;
  std::vector<int64_t> cells_;
  std::vector<OnlineSoftmax> partial_;  // [cells, slices]
  std::vector<OnlineSoftmax> stats_;    // [cells]
  std::vector<int64_t> argmax_;         // [cells]
  std::vector<TemperedSums> tempered_;  // [cells, slices] if asked for
  std::vector<double> moment_;          // [cells, slices] if asked for
};

}  // namespace r2dllm::cpu

// SPDX-License-Identifier: Apache-2.0
// The pass over V of the candidate rows, on all threads, and what can be asked of a row afterwards.
#pragma once

#include <cstring>
#include <vector>

#include "vocab_kernels.h"

namespace r2dllm::cpu {

class VocabPass {
 public:
  // Reads each row whose `candidates` [B, L] is true once; nothing of size V is written. With a
  // scale (see tempered_scale) the same read also yields `tempered`; on request, `entropy`.
  VocabPass(const LogitsView& logits, const bool* candidates, double scale = 0.0,
            bool with_entropy = false);

  int64_t rows() const { return static_cast<int64_t>(cells_.size()); }
  int64_t cell(int64_t row) const { return cells_[row]; }  // b * L + l
  const VocabStats& stats(int64_t row) const { return stats_[row]; }
  TemperedSums tempered(int64_t row) const;
  double entropy(int64_t row) const { return entropy_[row]; }  // in nats, of a valid row
  const VocabKernels& kernels() const { return kernels_; }

  int64_t argmax(int64_t row) const { return argmax_[row]; }  // lowest on ties; -1 if not valid
  float probability(int64_t row, int64_t column) const;
  VocabStats token_stats(int64_t row, int64_t column) const;  // of that logit alone
  double mass(int64_t row, int64_t column) const;             // 1 / probability, not rounded
  double load(int64_t row, int64_t column) const { return kernels_.load(logit(row, column), 0); }

  int64_t logit_bytes() const { return bytes_; }
  int64_t slices() const { return slices_; }
  int64_t slice_size(int64_t slice) const {
    const int64_t left = logits_.vocab - slice * kSliceWidth;
    return left < kSliceWidth ? left : kSliceWidth;
  }

  // f(pointer to the logits of a slice). The excluded column reads as -inf.
  template <class F>
  auto with_slice(int64_t row, int64_t slice, F f) const {
    const int64_t begin = slice * kSliceWidth, size = slice_size(slice);
    const char* data = logit(row, begin);
    if (logits_.excluded < begin || logits_.excluded >= begin + size) return f(data);
    alignas(64) char copy[kSliceWidth * sizeof(double)];
    memcpy(copy, data, size * bytes_);
    exclude(copy + (logits_.excluded - begin) * bytes_);
    return f(static_cast<const char*>(copy));
  }

 private:
  const char* logit(int64_t row, int64_t column) const {
    const int64_t b = cells_[row] / logits_.length, cell = cells_[row] % logits_.length;
    const int64_t l = cell > logits_.shift ? cell - logits_.shift : 0;
    return static_cast<const char*>(logits_.data) +
           (b * logits_.batch_stride + l * logits_.length_stride + column) * bytes_;
  }
  void exclude(char* logit) const;
  void merge_slices(int64_t row);
  double merged_moment(int64_t row, const VocabStats& merged) const;

  LogitsView logits_;
  const VocabKernels& kernels_;
  int64_t bytes_;
  int64_t slices_;
  double scale_;
  std::vector<int64_t> cells_;
  std::vector<VocabStats> partial_;     // [rows, slices]
  std::vector<VocabStats> stats_;       // [rows]
  std::vector<int64_t> argmax_;         // [rows]
  std::vector<TemperedSums> tempered_;  // [rows, slices] if asked for
  std::vector<double> moment_;          // [rows, slices] if asked for
  std::vector<double> entropy_;         // [rows] if asked for
};

}  // namespace r2dllm::cpu

// SPDX-License-Identifier: Apache-2.0
#include "vocab_pass.h"

#include "torch_parallel.h"

namespace r2dllm::cpu {

VocabPass::VocabPass(const LogitsView& logits, const bool* candidates, double scale,
                     bool with_entropy)
    : logits_(logits),
      kernels_(vocab_kernels(logits.type)),
      bytes_(kLogitBytes[static_cast<int>(logits.type)]),
      slices_((logits.vocab + kSliceWidth - 1) / kSliceWidth),
      scale_(scale) {
  const int64_t cells = logits.batch * logits.length;
  for (int64_t cell = 0; cell < cells; ++cell) {
    if (candidates[cell]) cells_.push_back(cell);
  }
  partial_.resize(rows() * slices_);
  stats_.resize(rows());
  argmax_.resize(rows(), -1);
  if (scale != 0.0) tempered_.resize(rows() * slices_);
  if (with_entropy) {
    moment_.resize(rows() * slices_);
    entropy_.resize(rows(), NAN);
  }
  // A task is a slice of a row: a single row uses all threads too.
  constexpr int64_t kTasksWorthAThread = 4;
  parallel_for(0, rows() * slices_, kTasksWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task % slices_;
      with_slice(task / slices_, slice, [&](const char* data) {
        const int64_t size = slice_size(slice);
        partial_[task] = with_entropy ? kernels_.stats_and_moment(data, size, &moment_[task])
                                      : kernels_.stats(data, size);
        if (scale != 0.0 && is_valid(partial_[task])) {
          tempered_[task] =
              kernels_.tempered_sums(data, slice_size(slice), partial_[task].max, scale);
        }
      });
    }
  });
  constexpr int64_t kRowsWorthAThread = 16;
  parallel_for(0, rows(), kRowsWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) merge_slices(row);
  });
}

void VocabPass::merge_slices(int64_t row) {
  const VocabStats* partial = &partial_[row * slices_];
  VocabStats merged = VocabStats::empty();
  for (int64_t i = 0; i < slices_; ++i) merged = merge(merged, partial[i]);
  if (is_valid(merged)) {
    if (!entropy_.empty()) entropy_[row] = entropy_of(merged.sum, merged_moment(row, merged));
    int64_t slice = 0;
    while (partial[slice].max != merged.max) ++slice;
    with_slice(row, slice, [&](const char* data) {
      const int64_t size = slice_size(slice), column = kernels_.find(data, size, merged.max);
      argmax_[row] = slice * kSliceWidth + column;
      merged.sum += scale_by_exponent(kernels_.correction(data, size, column, partial[slice]),
                                      partial[slice].exponent - merged.exponent);
    });
  }
  stats_[row] = merged;
}

// The weights of a slice are 2^d times as large beside the row's exponent, their logarithms d more.
double VocabPass::merged_moment(int64_t row, const VocabStats& merged) const {
  double moment = 0.0;
  for (int64_t i = row * slices_; i < (row + 1) * slices_; ++i) {
    const double d = partial_[i].exponent - merged.exponent;
    if (partial_[i].max > -INFINITY) {
      moment += scale_by_exponent(moment_[i] + d * partial_[i].sum, d);
    }
  }
  return moment;
}

TemperedSums VocabPass::tempered(int64_t row) const {
  TemperedSums sums{0.0, 0.0};
  for (int64_t i = row * slices_; i < (row + 1) * slices_; ++i) {
    const TemperedSums slice = rebased(tempered_[i], (partial_[i].max - stats_[row].max) * scale_);
    sums.mass += slice.mass;
    sums.moment += slice.moment;
  }
  return sums;
}

VocabStats VocabPass::token_stats(int64_t row, int64_t column) const {
  return kernels_.stats(logit(row, column), 1);
}

float VocabPass::probability(int64_t row, int64_t column) const {
  return r2dllm::probability(token_stats(row, column), stats_[row]);
}

double VocabPass::mass(int64_t row, int64_t column) const {
  const VocabStats token = kernels_.stats(logit(row, column), 1);
  return stats_[row].sum / scale_by_exponent(token.sum, token.exponent - stats_[row].exponent);
}

void VocabPass::exclude(char* logit) const {
  constexpr float kFloat = -INFINITY;
  constexpr uint16_t kBFloat16 = 0xFF80, kHalf = 0xFC00;
  constexpr double kDouble = -INFINITY;
  const void* const negative_infinity[] = {&kFloat, &kBFloat16, &kHalf, &kDouble};
  memcpy(logit, negative_infinity[static_cast<int>(logits_.type)], bytes_);
}

}  // namespace r2dllm::cpu

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
  for (int64_t cell = 0; cell < logits.batch * logits.length; ++cell) {
    if (candidates[cell]) cells_.push_back(cell);
  }
  partial_.resize(cells() * slices_);
  stats_.resize(cells());
  argmax_.resize(cells(), -1);
  if (scale != 0.0) tempered_.resize(cells() * slices_);
  if (with_entropy) moment_.resize(cells() * slices_);
  // A task is a slice of a cell's logits: a single cell uses all threads too.
  constexpr int64_t kTasksWorthAThread = 4;
  parallel_for(0, cells() * slices_, kTasksWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task % slices_;
      with_slice(task / slices_, slice, [&](const char* data) {
        const int64_t size = slice_size(slice);
        partial_[task] = with_entropy ? kernels_.stats_and_moment(data, size, &moment_[task])
                                      : kernels_.stats(data, size);
        if (scale != 0.0 && is_valid(partial_[task])) {
          tempered_[task] = kernels_.tempered_sums(data, size, partial_[task].max, scale);
        }
      });
    }
  });
  constexpr int64_t kCellsWorthAThread = 16;
  parallel_for(0, cells(), kCellsWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) merge_slices(i);
  });
}

void VocabPass::merge_slices(int64_t i) {
  const OnlineSoftmax* partial = &partial_[i * slices_];
  OnlineSoftmax merged = OnlineSoftmax::empty();
  for (int64_t s = 0; s < slices_; ++s) merged = merge(merged, partial[s]);
  if (is_valid(merged)) {
    int64_t slice = 0;
    while (partial[slice].max != merged.max) ++slice;
    with_slice(i, slice, [&](const char* data) {
      const int64_t size = slice_size(slice), column = kernels_.find(data, size, merged.max);
      argmax_[i] = slice * kSliceWidth + column;
      merged.sum += scale_by_exponent(kernels_.correction(data, size, column, partial[slice]),
                                      partial[slice].exponent - merged.exponent);
    });
  }
  stats_[i] = merged;
}

TemperedSums VocabPass::tempered(int64_t i) const {
  TemperedSums sums{0.0, 0.0};
  for (int64_t s = i * slices_; s < (i + 1) * slices_; ++s) {
    const TemperedSums slice = rebased(tempered_[s], (partial_[s].max - stats_[i].max) * scale_);
    sums.mass += slice.mass;
    sums.moment += slice.moment;
  }
  return sums;
}

OnlineSoftmax VocabPass::token_stats(int64_t i, int64_t column) const {
  return column == logits_.excluded ? OnlineSoftmax::empty() : kernels_.stats(logit(i, column), 1);
}

float VocabPass::probability(int64_t i, int64_t column) const {
  return r2dllm::probability(token_stats(i, column), stats_[i]);
}

double VocabPass::mass(int64_t i, int64_t column) const { return stats_[i].sum / term(i, column); }

// Of that logit, as it stands in the sum of stats(i).
double VocabPass::term(int64_t i, int64_t column) const {
  const OnlineSoftmax token = token_stats(i, column);
  return scale_by_exponent(token.sum, token.exponent - stats_[i].exponent);
}

double VocabPass::moment(int64_t i) const {
  const OnlineSoftmax& whole = stats_[i];
  if (!is_valid(whole)) return whole.sum;  // 0 or NaN
  double sum = 0.0;
  for (int64_t s = i * slices_; s < (i + 1) * slices_; ++s) {
    const OnlineSoftmax& part = partial_[s];
    if (!(part.max > -INFINITY)) continue;
    sum += scale_by_exponent(moment_[s] + (part.max - whole.max) * part.sum,
                             part.exponent - whole.exponent);
  }
  return sum / term(i, argmax_[i]);
}

double VocabPass::entropy(int64_t i) const {
  return is_valid(stats_[i]) ? entropy_of(mass(i, argmax_[i]), moment(i)) : NAN;
}

void VocabPass::exclude(char* logit) const {
  constexpr float kFloat = -INFINITY;
  constexpr uint16_t kBFloat16 = 0xFF80, kHalf = 0xFC00;
  constexpr double kDouble = -INFINITY;
  const void* const negative_infinity[] = {&kFloat, &kBFloat16, &kHalf, &kDouble};
  memcpy(logit, negative_infinity[static_cast<int>(logits_.type)], bytes_);
}

}  // namespace r2dllm::cpu

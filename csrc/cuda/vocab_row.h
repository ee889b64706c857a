// SPDX-License-Identifier: Apache-2.0
// How a row of V logits is cut up. A slice is what one thread block reads at once; which logits
// form one depends on V and the dtype alone, so a row has the same bits in any batch.
#pragma once

#include "../rules/logits_view.h"
#include "logit_format.h"

namespace r2dllm::cuda {

constexpr int kSliceThreads = 128;
constexpr int kLoads = 8;  // of 16 bytes, by every thread of a slice

template <class Format>
constexpr int64_t kSliceColumns = int64_t{kSliceThreads} * kLoads * kVector<Format>;

// What a slice says about its row.
struct alignas(16) SlicePartial {
  double mass;     // sum of exp(z - max); NaN if any logit is NaN or +inf
  float max;       // -inf: nothing there
  int32_t argmax;  // lowest column of the maximum
};

// Memory of one step between its launches; cell by cell, slice by slice.
struct VocabWorkspace {
  int64_t slices;         // of a cell
  SlicePartial* partial;  // [cells, slices]
  // At temperature > 0:
  double* tempered = nullptr;  // [cells, slices], sum of exp((z - slice's max) / temperature)
  float* cutoff = nullptr;     // [cells], least logit that is kept; null: all are
  // For an entropy: sum of u * 2^u, u = (z - slice's max) * log2(e), of the loss u / temperature.
  double* moment = nullptr;  // [cells, slices]
};

template <class Format>
struct VocabRow {
  const typename Format::Bits* data;
  int64_t vocab;
  int64_t excluded;  // this column counts as -inf; -1: none
};

// The sequence of the batch that a cell belongs to.
R2D_DEVICE int64_t row_number(const LogitsView& logits, int64_t cell) {
  return static_cast<uint32_t>(cell) / static_cast<uint32_t>(logits.length);
}

template <class Format>
R2D_DEVICE VocabRow<Format> row_of(const LogitsView& logits, int64_t cell) {
  // Cells and blocks are fewer than 2^31 (checked with the logits); 64-bit division is slow.
  const auto length = static_cast<uint32_t>(logits.length);
  const int64_t b = static_cast<uint32_t>(cell) / length, l = static_cast<uint32_t>(cell) % length;
  const int64_t source = l > logits.shift ? l - logits.shift : 0;
  return {static_cast<const typename Format::Bits*>(logits.data) + b * logits.batch_stride +
              source * logits.length_stride,
          logits.vocab, logits.excluded};
}

R2D_DEVICE bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class Format>
R2D_DEVICE void hide(const VocabRow<Format>& row, int64_t column, Words& vector) {
  R2D_UNROLL
  for (int i = 0; i < kVector<Format>; ++i) {
    if (column + i == row.excluded) {
      put<Format>(vector, i, static_cast<typename Format::Bits>(Format::kNegativeInfinity));
    }
  }
}

// 16 bytes from `column` on, the excluded column not yet hidden. Beyond the row: -inf.
template <class Format, class Lane>
R2D_DEVICE Words load_columns(Lane& lane, const VocabRow<Format>& row, int64_t column) {
  if (column + kVector<Format> <= row.vocab && is_aligned(row.data + column)) {
    return lane.load(row.data + column);
  }
  Words vector = nothing<Format>();
  R2D_UNROLL
  for (int i = 0; i < kVector<Format>; ++i) {
    if (column + i < row.vocab) put<Format>(vector, i, row.data[column + i]);
  }
  return vector;
}

template <class Format, class Lane>
R2D_DEVICE Words load_vector(Lane& lane, const VocabRow<Format>& row, int64_t column) {
  Words vector = load_columns(lane, row, column);
  if (row.excluded >= column && row.excluded < column + kVector<Format>) hide(row, column, vector);
  return vector;
}

}  // namespace r2dllm::cuda

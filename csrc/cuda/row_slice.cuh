// SPDX-License-Identifier: Apache-2.0
// The pass over V: one thread block per slice of a row. All loads of a thread are issued before the
// first reduction; nothing is reduced across the block inside a loop.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../rules/exp2_term.h"
#include "../rules/logits_view.h"

namespace r2dllm::cuda {

constexpr int kThreads = 256;
constexpr int64_t kSlice = 16384;  // columns; a row's slices depend on V alone
constexpr int kPerThread = static_cast<int>(kSlice / kThreads);

struct SlicePartial {
  VocabStats stats;
  int64_t argmax;  // column; lowest of the slice's maximum
};

inline int64_t slices_of(int64_t vocab) { return (vocab + kSlice - 1) / kSlice; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T reduce_block(T mine, T* shared, T (*combine)(T, T)) {
  for (int offset = 16; offset > 0; offset /= 2) {
    mine = combine(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, offset));
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  T all = shared[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) all = combine(all, shared[warp]);
  __syncthreads();
  return all;
}

// This thread's logits of the slice: groups of 16 bytes, kThreads groups apart. Columns outside the
// row and the excluded one read as -inf.
template <class Element>
__device__ void load_slice(const Element* row, int64_t begin, int64_t vocab, int64_t excluded,
                           float (&z)[kPerThread]) {
  constexpr int kVector = 16 / sizeof(Element);
  constexpr int kGroups = kPerThread / kVector;
  const bool aligned = (reinterpret_cast<uintptr_t>(row + begin) % 16) == 0;
  uint4 raw[kGroups];
  if (aligned && begin + kSlice <= vocab) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      raw[g] = __ldg(reinterpret_cast<const uint4*>(row + begin) + g * kThreads + threadIdx.x);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      Element values[kVector];
      memcpy(values, &raw[g], sizeof values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[g * kVector + i] = to_float(values[i]);
    }
  } else {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int64_t column =
            begin + (static_cast<int64_t>(g) * kThreads + threadIdx.x) * kVector + i;
        z[g * kVector + i] = column < vocab ? to_float(row[column]) : -INFINITY;
      }
    }
  }
  // The excluded column belongs to one thread of one slice.
  const int64_t offset = excluded - begin;
  if (excluded >= 0 && offset >= 0 && offset < kSlice) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if ((static_cast<int64_t>(g) * kThreads + threadIdx.x) * kVector + i == offset) {
          z[g * kVector + i] = -INFINITY;
        }
      }
    }
  }
}

template <class Element>
__device__ __forceinline__ const Element* row_of(const LogitsView& logits, int64_t row) {
  const int64_t b = row / logits.length, l = row % logits.length;
  const int64_t source = l > logits.shift ? l - logits.shift : 0;
  return static_cast<const Element*>(logits.data) + b * logits.batch_stride +
         source * logits.length_stride;
}

// Of what load_slice has loaded.
template <class Element>
__device__ __forceinline__ SlicePartial slice_stats(const float (&z)[kPerThread], int64_t begin) {
  constexpr int kVector = 16 / sizeof(Element);
  __shared__ float shared_float[kThreads / 32];
  __shared__ double shared_double[kThreads / 32];
  __shared__ int shared_int[kThreads / 32];
  float max = -INFINITY;
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    nan |= z[i] != z[i];
    max = fmaxf(max, z[i]);
  }
  max = reduce_block<float>(max, shared_float, [](float a, float b) { return fmaxf(a, b); });
  if (__syncthreads_or(nan) || max == INFINITY) return {{max, 0.0, NAN}, -1};
  if (max == -INFINITY) return {VocabStats::empty(), -1};

  int first = static_cast<int>(kSlice);
  double sum = 0.0, exponent;
  if (is_narrow(max)) {
    const float narrow = rintf(max * kLog2e), floor = max - kTermFloor;
    exponent = narrow;
    // Four chains of 16 terms: short enough for float32, see the CPU's kGroupsPerFlush.
#pragma unroll
    for (int chain = 0; chain < 4; ++chain) {
      float part = 0.0f;
#pragma unroll
      for (int i = chain * kPerThread / 4; i < (chain + 1) * kPerThread / 4; ++i) {
        part += narrow_term(fmaxf(z[i], floor), narrow);
      }
      sum += static_cast<double>(part);
    }
  } else {
    exponent = rint(max * kLog2eWide);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += wide_term(z[i], exponent);
  }
#pragma unroll
  for (int i = kPerThread - 1; i >= 0; --i) {
    if (z[i] == max) {
      first = (i / kVector * kThreads + static_cast<int>(threadIdx.x)) * kVector + i % kVector;
    }
  }
  sum = reduce_block<double>(sum, shared_double, [](double a, double b) { return a + b; });
  first = reduce_block<int>(first, shared_int, [](int a, int b) { return a < b ? a : b; });
  return {{max, exponent, sum}, begin + first};
}

// `is_candidate(cell)`; rows that are none are not read and leave their partials as they are.
template <class Element, class IsCandidate>
__global__ void __launch_bounds__(kThreads)
    slice_kernel(LogitsView logits, IsCandidate is_candidate, SlicePartial* partials) {
  const int64_t row = blockIdx.x, slice = blockIdx.y;
  if (!is_candidate(row)) return;
  float z[kPerThread];
  load_slice(row_of<Element>(logits, row), slice * kSlice, logits.vocab, logits.excluded, z);
  const SlicePartial partial = slice_stats<Element>(z, slice * kSlice);
  if (threadIdx.x == 0) partials[row * gridDim.y + slice] = partial;
}

template <class IsCandidate>
void launch_slices(const LogitsView& logits, IsCandidate is_candidate, SlicePartial* partials,
                   cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(logits.batch * logits.length),
                  static_cast<unsigned>(slices_of(logits.vocab)));
  switch (logits.type) {
    case LogitType::kFloat:
      slice_kernel<float><<<grid, kThreads, 0, stream>>>(logits, is_candidate, partials);
      break;
    case LogitType::kBFloat16:
      slice_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(logits, is_candidate, partials);
      break;
    default:
      slice_kernel<__half><<<grid, kThreads, 0, stream>>>(logits, is_candidate, partials);
  }
}

struct Top {
  int64_t id;        // -1: no prediction
  float confidence;  // NaN: no prediction
};

__device__ inline Top merge_slices(const SlicePartial* partials, int64_t slices) {
  VocabStats row = VocabStats::empty();
  for (int64_t i = 0; i < slices; ++i) row = merge(row, partials[i].stats);
  if (!is_valid(row)) return {-1, NAN};
  int64_t first = 0;
  while (partials[first].stats.max != row.max) ++first;
  return {partials[first].argmax, probability(single(static_cast<float>(row.max)), row)};
}

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
#include "../ops/row_stats.h"
#include "launch.cuh"
#include "row_slice.cuh"

namespace r2dllm::cuda {
namespace {

struct RowPartial {
  SlicePartial slice;
  TemperedSums tempered;
};

// Calls launch(Element{}) for the type of the logits.
template <class Launch>
void with_element(LogitType type, Launch launch) {
  switch (type) {
    case LogitType::kFloat:
      launch(float{});
      break;
    case LogitType::kBFloat16:
      launch(__nv_bfloat16{});
      break;
    default:
      launch(__half{});
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

dim3 row_slices(const LogitsView& logits) {
  return dim3(static_cast<unsigned>(logits.batch * logits.length),
              static_cast<unsigned>(slices_of(logits.vocab)));
}

// ---- forward ---------------------------------------------------------------------------------

__device__ __forceinline__ TemperedSums tempered_sums(const float (&z)[kPerThread], float max,
                                                      double scale) {
  __shared__ double shared[kThreads / 32];
  const float factor = static_cast<float>(scale), floor = -115.0f / factor;
  double mass = 0.0, moment = 0.0;
  // Chains as short as those of slice_stats.
#pragma unroll
  for (int chain = 0; chain < 4; ++chain) {
    float masses = 0.0f, moments = 0.0f;
#pragma unroll
    for (int i = chain * kPerThread / 4; i < (chain + 1) * kPerThread / 4; ++i) {
      const float below = fmaxf(z[i] - max, floor);
      const float term = exp2_of_product(below, factor);
      masses += term;
      moments = fmaf(term, below * factor, moments);
    }
    mass += static_cast<double>(masses);
    moment += static_cast<double>(moments);
  }
  const auto add = [](double a, double b) { return a + b; };
  mass = reduce_block<double>(mass, shared, add);
  return {mass, reduce_block<double>(moment, shared, add)};
}

template <class Element, bool kEntropy>
__global__ void __launch_bounds__(kThreads)
    slice_kernel(RowStatsParams params, double scale, RowPartial* partials) {
  const int64_t row = blockIdx.x, slice = blockIdx.y;
  if (params.targets[row] == params.ignore_index) return;
  float z[kPerThread];
  load_slice(row_of<Element>(params.logits, row), slice * kSlice, params.logits.vocab, -1, z);
  RowPartial partial{slice_stats<Element>(z, slice * kSlice), {0.0, 0.0}};
  if (kEntropy && is_valid(partial.slice.stats)) {
    partial.tempered = tempered_sums(z, static_cast<float>(partial.slice.stats.max), scale);
  }
  if (threadIdx.x == 0) partials[row * gridDim.y + slice] = partial;
}

// A target that is no id makes the row NaN: to raise would take a synchronisation.
template <class Element>
__global__ void merge_kernel(RowStatsParams params, double scale, int64_t rows, int64_t slices,
                             const RowPartial* partials) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const int64_t target = params.targets[row];
  if (target == params.ignore_index) {
    params.nll.set(row, 0.0);
    params.entropy.set(row, 0.0);
    params.confidence[row] = 0.0f;
    params.prediction[row] = -1;
    params.state[row] = RowState{};
    return;
  }
  const RowPartial* of_row = partials + row * slices;
  VocabStats stats = VocabStats::empty();
  for (int64_t i = 0; i < slices; ++i) stats = merge(stats, of_row[i].slice.stats);
  const bool valid = is_valid(stats), is_id = target >= 0 && target < params.logits.vocab;

  RowState state{stats.max, stats.exponent, valid && is_id ? stats.sum : NAN, NAN, 0.0, 0.0};
  if (is_id) {
    const float logit = to_float(row_of<Element>(params.logits, row)[target]);
    state.nll = negative_log_likelihood(
        logit > -INFINITY && valid ? single(logit) : VocabStats::empty(), stats);
  }
  for (int64_t i = 0; i < slices; ++i) {
    const double shift = (of_row[i].slice.stats.max - stats.max) * scale;
    const TemperedSums part = rebased(of_row[i].tempered, shift);
    state.mass += part.mass;
    state.moment += part.moment;
  }
  int64_t first = 0;
  while (valid && of_row[first].slice.stats.max != stats.max) ++first;
  params.nll.set(row, state.nll);
  params.entropy.set(row, scale == 0.0 ? 0.0 : valid ? entropy({state.mass, state.moment}) : NAN);
  params.prediction[row] = valid ? of_row[first].slice.argmax : -1;
  params.confidence[row] = valid ? probability(single(static_cast<float>(stats.max)), stats) : NAN;
  params.state[row] = state;
}

// ---- backward --------------------------------------------------------------------------------

__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half_rn(x); }

// What load_slice loads, the other way; columns outside the row are not written.
template <class Element>
__device__ __forceinline__ void store_slice(Element* row, int64_t begin, int64_t vocab,
                                            const float (&z)[kPerThread]) {
  constexpr int kVector = 16 / sizeof(Element);
  constexpr int kGroups = kPerThread / kVector;
  const bool aligned = (reinterpret_cast<uintptr_t>(row + begin) % 16) == 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int64_t group = static_cast<int64_t>(g) * kThreads + threadIdx.x;
    Element values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) from_float(z[g * kVector + i], values[i]);
    if (aligned && begin + kSlice <= vocab) {
      uint4 raw;
      memcpy(&raw, values, sizeof raw);
      reinterpret_cast<uint4*>(row + begin)[group] = raw;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int64_t column = begin + group * kVector + i;
        if (column < vocab) row[column] = values[i];
      }
    }
  }
}

// `params.gradient` may be the logits: a thread writes the columns that it has read, and no others.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(RowStatsBackwardParams params, double scale) {
  constexpr int kVector = 16 / sizeof(Element);
  __shared__ RowGradient shared;
  const int64_t cell = blockIdx.x, begin = blockIdx.y * kSlice, vocab = params.logits.vocab;
  const int64_t b = cell / params.logits.length, l = cell % params.logits.length;
  Element* out = static_cast<Element*>(params.gradient) + b * params.gradient_batch_stride +
                 l * params.gradient_length_stride;
  const int64_t target = params.targets[cell];
  float z[kPerThread];
  if (target == params.ignore_index) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) z[i] = 0.0f;
    store_slice(out, begin, vocab, z);
    return;
  }
  const Element* in = row_of<Element>(params.logits, cell);
  load_slice(in, begin, vocab, -1, z);
  const double d_nll = params.d_nll.get(cell);
  if (threadIdx.x == 0) {
    const double d_entropy = params.d_entropy.data ? params.d_entropy.get(cell) : 0.0;
    shared = row_gradient(params.state[cell], d_nll, d_entropy, scale);
  }
  __syncthreads();
  const RowGradient row = shared;
  // The owner of the target's column writes it last, from a logit that it reads first.
  const int64_t offset = target - begin;
  const bool mine = offset >= 0 && offset < kSlice && target < vocab && !is_nan(row) &&
                    offset / kVector % kThreads == threadIdx.x;
  const double at_target =
      mine ? target_gradient(row, to_float(in[target]), d_nll, params.state[cell].nll) : 0.0;

  const float max = static_cast<float>(row.max);
  if (!is_nan(row) && !is_narrow(max)) {
    // Rare, and in double: one column after the other, out of the registers' way.
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t group = static_cast<int64_t>(i / kVector) * kThreads + threadIdx.x;
      const int64_t column = begin + group * kVector + i % kVector;
      if (column >= vocab) break;
      const float gradient = static_cast<float>(logit_gradient(row, to_float(in[column])));
      from_float(gradient, out[column]);
    }
    if (mine) from_float(static_cast<float>(at_target), out[target]);
    return;
  }
  if (is_nan(row)) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) z[i] = NAN;
  } else {
    const float floor = max - kTermFloor, exponent = static_cast<float>(row.exponent),
                softmax = static_cast<float>(row.softmax), factor = static_cast<float>(row.scale),
                slope = static_cast<float>(row.entropy), mean = static_cast<float>(row.mean),
                least = -115.0f / factor;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float logit = z[i], below = logit - max;
      float gradient = logit >= floor ? softmax * narrow_term(logit, exponent) : 0.0f;
      if (slope != 0.0f && below >= least) {
        gradient = fmaf(slope * exp2_of_product(below, factor), below * factor - mean, gradient);
      }
      z[i] = gradient;
    }
  }
  store_slice(out, begin, vocab, z);
  if (mine) from_float(static_cast<float>(at_target), out[target]);
}

}  // namespace

int64_t row_stats_bytes(const LogitsView& logits) {
  return logits.batch * logits.length * slices_of(logits.vocab) *
         static_cast<int64_t>(sizeof(RowPartial));
}

void row_stats(const RowStatsParams& params) {
  const int64_t rows = params.logits.batch * params.logits.length;
  const double scale = params.temperature != 0.0 ? tempered_scale(params.temperature) : 0.0;
  const cudaStream_t stream = current_stream();
  auto* partials = static_cast<RowPartial*>(params.workspace);
  with_element(params.logits.type, [&](auto element) {
    using Element = decltype(element);
    const dim3 grid = row_slices(params.logits);
    if (scale != 0.0) {
      slice_kernel<Element, true><<<grid, kThreads, 0, stream>>>(params, scale, partials);
    } else {
      slice_kernel<Element, false><<<grid, kThreads, 0, stream>>>(params, scale, partials);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    merge_kernel<Element><<<static_cast<unsigned>((rows + 127) / 128), 128, 0, stream>>>(
        params, scale, rows, slices_of(params.logits.vocab), partials);
  });
}

void row_stats_backward(const RowStatsBackwardParams& params) {
  const cudaStream_t stream = current_stream();
  with_element(params.logits.type, [&](auto element) {
    backward_kernel<decltype(element)><<<row_slices(params.logits), kThreads, 0, stream>>>(
        params, tempered_scale(params.temperature));
  });
}

}  // namespace r2dllm::cuda

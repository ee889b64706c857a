// SPDX-License-Identifier: Apache-2.0
// The execution context of rules/decode_step.h on one thread block.
#pragma once

#include <cstdint>

namespace r2dllm::cuda {

struct RowContext {
  unsigned long long* scratch;  // one word of shared memory

  template <class F>
  __device__ void for_each(int64_t n, F f) {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }

  template <class F>
  __device__ int64_t count(int64_t n, F f) {
    int mine = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) mine += f(i) ? 1 : 0;
    return static_cast<int64_t>(
        combine(mine, [](unsigned long long* to, unsigned long long x) { atomicAdd(to, x); }));
  }

  template <class F>
  __device__ uint64_t max(int64_t n, F f) {
    unsigned long long mine = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const unsigned long long x = f(i);
      mine = x > mine ? x : mine;
    }
    return combine(mine, [](unsigned long long* to, unsigned long long x) { atomicMax(to, x); });
  }

  template <class F>
  __device__ void once(F f) {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }

 private:
  // Integers: the order of the atomics does not show.
  template <class Atomic>
  __device__ unsigned long long combine(unsigned long long mine, Atomic atomic) {
    if (threadIdx.x == 0) *scratch = 0;
    __syncthreads();
    if (mine != 0) atomic(scratch, mine);
    __syncthreads();
    const unsigned long long result = *scratch;
    __syncthreads();
    return result;
  }
};

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lane.h"

#ifdef __CUDACC__  // else tests/emulated_cuda has its own
namespace r2dllm::cuda {

struct CudaLane {
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ int64_t block() const { return blockIdx.x; }

  __device__ unsigned char* dynamic_shared() const {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
  }

  __device__ void sync(int n) const {
    if (n == kWarp) {
      __syncwarp();
    } else {
      asm volatile("bar.sync 1, %0;" ::"r"(n) : "memory");  // others may have left the block
    }
  }
  template <class T>
  __device__ T shuffle_xor(T x, int mask) const {
    return __shfl_xor_sync(kAll, x, mask);
  }
  template <class T>
  __device__ T shuffle(T x, int from) const {
    return __shfl_sync(kAll, x, from);
  }
  __device__ uint32_t ballot(bool b) const { return __ballot_sync(kAll, b); }
  __device__ int32_t max(int32_t x) const { return __reduce_max_sync(kAll, x); }

  __device__ float exp2(float x) const {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
  }
  __device__ Words load(const void* p) const {
    Words words;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
        : "l"(p));
    return words;
  }
  __device__ Words load_own(const void* p) const {
    Words words;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]),
                   "=r"(words.word[3])
                 : "l"(p)
                 : "memory");
    return words;
  }
  __device__ void store(void* p, const Words& words) const {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words.word[0]),
                 "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
                 : "memory");
  }

  // Programmatic dependent launch; both do nothing in a launch without it.
  __device__ void release_next() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
  }
  __device__ void await_previous() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  }

 private:
  static constexpr uint32_t kAll = 0xFFFFFFFFu;
};

}  // namespace r2dllm::cuda
#endif

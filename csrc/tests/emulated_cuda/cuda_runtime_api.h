// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda uses of the CUDA runtime, for a build without it (R2DLLM_CUDA=emulate): a launch
// runs its thread blocks here and now, on fibres, in random order.
#pragma once

#include <cstddef>
#include <mutex>

#include "../fibre_lane.h"

#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

using cudaStream_t = void*;
using cudaError_t = int;

struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};

enum { cudaLaunchAttributeProgrammaticStreamSerialization };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaFuncAttributes {
  int ptxVersion;
};

struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim{1}, blockDim{1};
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

namespace r2dllm::test {

struct Running {
  const FibreLane* lane;
  unsigned char* shared;
};

inline Running& running() {
  static Running running;
  return running;
}

}  // namespace r2dllm::test

namespace r2dllm::cuda {

// Made at the beginning of a kernel, before another lane runs.
struct CudaLane : test::FibreLane {
  CudaLane() : FibreLane(*test::running().lane) {}
  unsigned char* dynamic_shared() const { return test::running().shared; }
};

}  // namespace r2dllm::cuda

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace r2dllm::test;
  static std::mutex one_at_a_time;
  static unsigned seed = 0;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  constexpr cudaError_t kInvalidConfiguration = 9;
  if (blocks == 0 || threads == 0 || threads > 1024) return kInvalidConfiguration;
  launch<unsigned char>(blocks, static_cast<int>(threads), ++seed, config->dynamicSmemBytes,
                        [&](FibreLane& lane, unsigned char* shared) {
                          running() = {&lane, shared};
                          kernel(arguments...);
                        });
  return 0;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return 0;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return 0;
}

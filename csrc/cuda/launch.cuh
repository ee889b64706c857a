// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "runtime.h"

namespace r2dllm::cuda {

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  // May begin while the launch before it still runs: the kernel has to await_previous(), and does
  // so only in code for compute capability 9.0 and later.
  bool overlaps = false;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), const Arguments&... arguments) const {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = current_stream();
    config.attrs = &overlap;
    config.numAttrs = overlaps && awaits(kernel) ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

 private:
  // Of the code that runs, which on a newer card may be that of an older one's PTX.
  template <class Kernel>
  static bool awaits(Kernel kernel) {
    cudaFuncAttributes code;
    check(cudaFuncGetAttributes(&code, kernel));
    return code.ptxVersion >= 90;
  }
};

}  // namespace r2dllm::cuda

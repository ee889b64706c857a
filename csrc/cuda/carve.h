// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../rules/host_device.h"

namespace r2dllm::cuda {

// Cuts memory into arrays, one after the other. Without memory it counts bytes alone. Take the
// arrays of the strictest alignment first: nothing is padded.
struct Carve {
  unsigned char* memory;
  int64_t bytes = 0;

  template <class T>
  R2D_HOST_DEVICE T* take(int64_t n) {
    T* const array = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + bytes);
    bytes += n * static_cast<int64_t>(sizeof(T));
    return array;
  }
};

}  // namespace r2dllm::cuda

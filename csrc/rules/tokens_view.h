// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "host_device.h"

namespace r2dllm {

// Tokens [B, L] of any strides, int64 or int32.
struct TokensView {
  const void* data;
  void* written;  // the same, or null: nothing is written
  bool is_wide;   // int64
  int64_t batch_stride, length_stride;

  R2D_HOST_DEVICE int64_t get(int64_t b, int64_t l) const {
    const int64_t i = b * batch_stride + l * length_stride;
    return is_wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  R2D_HOST_DEVICE void set(int64_t b, int64_t l, int64_t token) const {
    const int64_t i = b * batch_stride + l * length_stride;
    if (is_wide) {
      static_cast<int64_t*>(written)[i] = token;
    } else {
      static_cast<int32_t*>(written)[i] = static_cast<int32_t>(token);
    }
  }
};

}  // namespace r2dllm

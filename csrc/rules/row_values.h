// SPDX-License-Identifier: Apache-2.0
// Arrays of one number per row, in the dtype that the caller has.
#pragma once

#include "host_device.h"

namespace r2dllm {

struct RowValues {
  const void* data = nullptr;  // float64 if is_double, else float32
  bool is_double = false;

  R2D_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  R2D_HOST_DEVICE double get(int64_t i) const {
    return is_double ? static_cast<const double*>(data)[i]
                     : static_cast<double>(static_cast<const float*>(data)[i]);
  }
};

struct WritableRowValues {
  void* data;
  bool is_double;

  R2D_HOST_DEVICE void set(int64_t i, double value) const {
    if (is_double) {
      static_cast<double*>(data)[i] = value;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  }
};

struct RowIntegers {
  const void* data = nullptr;  // int64 if is_wide, else int32
  bool is_wide = false;

  R2D_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  R2D_HOST_DEVICE int64_t get(int64_t i) const {
    return is_wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace r2dllm

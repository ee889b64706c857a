// SPDX-License-Identifier: Apache-2.0
// The execution context of rules/decode_step.h on one thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace r2dllm::cpu {

struct RowContext {
  template <class F>
  void for_each(int64_t n, F f) {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  template <class F>
  int64_t count(int64_t n, F f) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += f(i) ? 1 : 0;
    return count;
  }
  template <class F>
  uint64_t max(int64_t n, F f) {
    uint64_t max = 0;
    for (int64_t i = 0; i < n; ++i) max = f(i) > max ? f(i) : max;
    return max;
  }
  int64_t sort(int64_t n, const uint64_t* keys, int32_t* order) {
    int32_t* end = order;
    for (int64_t i = 0; i < n; ++i) {
      if (keys[i] != 0) *end++ = static_cast<int32_t>(i);
    }
    std::sort(order, end, [&](int32_t a, int32_t b) { return keys[a] > keys[b]; });
    return end - order;
  }
  template <class F>
  void once(F f) {
    f();
  }
};

}  // namespace r2dllm::cpu

// SPDX-License-Identifier: Apache-2.0
// Stands in for torch's, so that the tests of csrc/cpu need no torch: one thread does all.
#pragma once

#include <cstdint>

namespace at {

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin < end) f(begin, end);
}

}  // namespace at

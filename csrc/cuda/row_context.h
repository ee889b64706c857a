// SPDX-License-Identifier: Apache-2.0
// The execution context of rules/decode_step.h on the first threads of a block. A row of up to 32
// cells is one warp's work and needs no barrier of the block.
#pragma once

#include "lane.h"

namespace r2dllm::cuda {

constexpr int kMaxWarps = 1024 / kWarp;

// Threads that share the cells of a row.
R2D_HOST_DEVICE int row_threads(int64_t length) {
  const int64_t warps = (length + kWarp - 1) / kWarp;
  return static_cast<int>(warps < 1 ? 1 : warps > kMaxWarps ? kMaxWarps : warps) * kWarp;
}

template <class Lane>
class RowContext {
 public:
  // `scratch`: kMaxWarps words of shared memory. Only threads 0 .. threads - 1 have a context.
  R2D_DEVICE RowContext(Lane& lane, int threads, uint64_t* scratch)
      : lane_(lane), threads_(threads), scratch_(scratch) {}

  template <class F>
  R2D_DEVICE void for_each(int64_t n, F f) {
    for (int64_t i = lane_.thread(); i < n; i += threads_) f(i);
    lane_.sync(threads_);
  }

  template <class F>
  R2D_DEVICE int64_t count(int64_t n, F f) {
    uint64_t mine = 0;
    for (int64_t i = lane_.thread(); i < n; i += threads_) mine += f(i) ? 1 : 0;
    return static_cast<int64_t>(combine(mine, [](uint64_t a, uint64_t b) { return a + b; }));
  }

  template <class F>
  R2D_DEVICE uint64_t max(int64_t n, F f) {
    const auto greater = [](uint64_t a, uint64_t b) { return a > b ? a : b; };
    uint64_t mine = 0;
    for (int64_t i = lane_.thread(); i < n; i += threads_) mine = greater(mine, f(i));
    return combine(mine, greater);
  }

  R2D_DEVICE int64_t sort(int64_t n, const uint64_t* keys, int32_t* order) {
    const int64_t there = count(n, [&](int64_t i) { return keys[i] != 0; });
    for_each(n, [&](int64_t i) {
      if (keys[i] == 0) return;
      int32_t rank = 0;
      for (int64_t j = 0; j < n; ++j) rank += keys[j] > keys[i];
      order[rank] = static_cast<int32_t>(i);
    });
    return there;
  }

  template <class F>
  R2D_DEVICE void once(F f) {
    if (lane_.thread() == 0) f();
    lane_.sync(threads_);
  }

 private:
  template <class Combine>
  R2D_DEVICE uint64_t combine(uint64_t x, Combine both) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = both(x, lane_.shuffle_xor(x, mask));
    if (threads_ == kWarp) return x;
    if (place_in_warp(lane_) == 0) scratch_[warp_of(lane_)] = x;
    lane_.sync(threads_);
    x = scratch_[0];
    for (int warp = 1; warp < threads_ / kWarp; ++warp) x = both(x, scratch_[warp]);
    lane_.sync(threads_);  // before scratch is used again
    return x;
  }

  Lane& lane_;
  int threads_;
  uint64_t* scratch_;
};

}  // namespace r2dllm::cuda

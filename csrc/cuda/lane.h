// SPDX-License-Identifier: Apache-2.0
// The kernels' bodies in this folder (*.h) are templates over a Lane, one thread of a thread block.
// CudaLane (cuda_lane.cuh) is the real one; the tests run the same source on the CPU with fibres
// (tests/fibre_lane.h). A Lane has
//
//   thread(), threads(), block()   its number in the block, the block's size, the block's number
//   dynamic_shared()               the block's shared memory of the size that the launch asks for
//   sync(n)                        barrier of the first n threads of the block, whole warps
//   shuffle_xor(x, mask), shuffle(x, from), ballot(b), max(int32)
//                                  among the 32 threads of a warp, all of which take part
//   exp2(float)                    about 2^x; 1 at 0, 0 at -inf, NaN at NaN
//   load(pointer)                  16 bytes, aligned so, of memory that no running launch writes,
//                                  nor one that is awaited
//   load_own(pointer)              the same of memory that this thread alone writes
//   store(pointer, Words)          16 bytes, aligned so
//   release_next()                 the next launch may begin
//   await_previous()               what the launch before this one wrote is there
//
// One path for all threads leads to every barrier and every exchange within a warp.
#pragma once

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "../rules/host_device.h"

#if defined(__CUDACC__)
#define R2D_DEVICE __device__ __forceinline__
#define R2D_UNROLL _Pragma("unroll")
#else
#define R2D_DEVICE inline
#define R2D_UNROLL
#endif

namespace r2dllm::cuda {

constexpr int kWarp = 32;

struct alignas(16) Words {
  uint32_t word[4];
};

template <class To, class From>
R2D_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Integers that order like the floats, its own inverse. NaN is not expected.
R2D_DEVICE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

template <class Lane>
R2D_DEVICE float warp_max(Lane& lane, float x) {
  return bit_cast<float>(ordered(lane.max(ordered(bit_cast<int32_t>(x)))));
}

template <class Lane, class T>
R2D_DEVICE T warp_sum(Lane& lane, T x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += lane.shuffle_xor(x, mask);
  return x;
}

template <class Lane>
R2D_DEVICE int warp_of(const Lane& lane) {
  return lane.thread() / kWarp;
}

template <class Lane>
R2D_DEVICE int place_in_warp(const Lane& lane) {
  return lane.thread() % kWarp;
}

}  // namespace r2dllm::cuda

// SPDX-License-Identifier: Apache-2.0
// R2D_HOST_DEVICE marks every function of csrc/rules: one source for g++, clang and nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define R2D_HOST_DEVICE __host__ __device__ __forceinline__
#else
// always_inline: translation units built for AVX must not leave out-of-line copies that the linker
// could hand to code meant for every CPU.
#define R2D_HOST_DEVICE inline __attribute__((always_inline))
#endif

// SPDX-License-Identifier: Apache-2.0
// Logits as they lie in 32-bit words: one float32 or a pair of 16-bit numbers. Format::pack rounds
// float32 numbers to a word, to nearest even.
#pragma once

#include <cmath>

#include "lane.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace r2dllm::cuda {

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kKeyBits = 32;  // leading bits in which the float32 values differ
  static constexpr uint32_t kNegativeInfinity = 0xFF800000u;

  static R2D_DEVICE float value(Bits bits) { return bit_cast<float>(bits); }
  static R2D_DEVICE float value(uint32_t word, int) { return value(word); }
  static R2D_DEVICE uint32_t pack(const float* z) { return bit_cast<uint32_t>(z[0]); }
  static R2D_DEVICE uint32_t max(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(fmaxf(value(a), value(b)));
  }
};

// The greater of each pair; a NaN loses.
template <class Format>
R2D_DEVICE uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  const auto greater = [](uint32_t x, uint32_t y) {
    const float fx = Format::value(static_cast<uint16_t>(x)),
                fy = Format::value(static_cast<uint16_t>(y));
    return fx != fx || fy > fx ? y : x;
  };
  return greater(a & 0xFFFF, b & 0xFFFF) | greater(a >> 16, b >> 16) << 16;
}

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kKeyBits = 16;
  static constexpr uint32_t kNegativeInfinity = 0xFF80FF80u;

  static R2D_DEVICE float value(Bits bits) {
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  static R2D_DEVICE float value(uint32_t word, int i) {
    return bit_cast<float>(i == 0 ? word << 16 : word & 0xFFFF0000u);
  }
  static R2D_DEVICE uint32_t pack(const float* z) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(z[1]), "f"(z[0]));
    return word;
#else
    const auto round = [](float x) -> uint32_t {
      const uint32_t bits = bit_cast<uint32_t>(x);
      return x != x ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    };
    return round(z[0]) | round(z[1]) << 16;
#endif
  }
  static R2D_DEVICE uint32_t max(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t greater;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
    return greater;
#else
    return max_of_pairs<BFloat16>(a, b);
#endif
  }
};

struct Half {
  using Bits = uint16_t;
  static constexpr int kKeyBits = 19;
  static constexpr uint32_t kNegativeInfinity = 0xFC00FC00u;

  static R2D_DEVICE float value(Bits bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(bit_cast<__half>(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
    if (magnitude >= 0x7C00) {
      return bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
    }
    // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
    const float value = bit_cast<float>(magnitude << 13) * 0x1p112f;
    return sign ? -value : value;
#endif
  }
  static R2D_DEVICE float value(uint32_t word, int i) {
    return value(static_cast<Bits>(i == 0 ? word : word >> 16));
  }
  static R2D_DEVICE uint32_t pack(const float* z) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(z[1]), "f"(z[0]));
    return word;
#else
    const auto round = [](float x) -> uint32_t {
      const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
      const uint32_t magnitude = bits & 0x7FFFFFFF;
      if (x != x) return 0x7FFF;
      if (magnitude >= 0x477FF000) return sign | 0x7C00;  // 65520 and more
      if (magnitude < 0x38800000) {                       // subnormals: multiples of 2^-24
        return sign | static_cast<uint32_t>(rintf(fabsf(x) * 0x1p24f));
      }
      return sign | (((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - (112 << 10));
    };
    return round(z[0]) | round(z[1]) << 16;
#endif
  }
  static R2D_DEVICE uint32_t max(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t greater;
    asm("max.f16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
    return greater;
#else
    return max_of_pairs<Half>(a, b);
#endif
  }
};

// Columns of 16 bytes, and of one word.
template <class Format>
constexpr int kVector = 16 / sizeof(typename Format::Bits);
template <class Format>
constexpr int kPair = 4 / sizeof(typename Format::Bits);

template <class Format>
R2D_DEVICE Words nothing() {
  return {{Format::kNegativeInfinity, Format::kNegativeInfinity, Format::kNegativeInfinity,
           Format::kNegativeInfinity}};
}

// Column i of the vector; i is known when compiling wherever it matters.
template <class Format>
R2D_DEVICE float value(const Words& vector, int i) {
  return Format::value(vector.word[i / kPair<Format>], i % kPair<Format>);
}

template <class Format>
R2D_DEVICE typename Format::Bits bits(const Words& vector, int i) {
  constexpr int width = 8 * sizeof(typename Format::Bits);
  return static_cast<typename Format::Bits>(vector.word[i / kPair<Format>] >>
                                            (i % kPair<Format> * width % 32));
}

template <class Format>
R2D_DEVICE void put(Words& vector, int i, typename Format::Bits bits) {
  constexpr int width = 8 * sizeof(bits);
  const int shift = i % kPair<Format> * width % 32;
  const uint32_t field = (0xFFFFFFFFu >> (32 - width)) << shift;
  uint32_t& word = vector.word[i / kPair<Format>];
  word = (word & ~field) | static_cast<uint32_t>(bits) << shift;
}

template <class Format>
R2D_DEVICE typename Format::Bits round_to_format(float x) {
  const float pair[] = {x, x};
  return static_cast<typename Format::Bits>(Format::pack(pair));
}

template <class Format>
R2D_DEVICE float greatest(uint32_t word) {
  const float first = Format::value(word, 0), last = Format::value(word, kPair<Format> - 1);
  return last > first ? last : first;
}

}  // namespace r2dllm::cuda

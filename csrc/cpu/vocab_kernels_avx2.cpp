// SPDX-License-Identifier: Apache-2.0
// The instruction set is asked for here, not on the command line: nothing outside this file may use
// it.
#include "vocab_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")

namespace r2dllm::cpu {
namespace {

constexpr int64_t kGroup = 64;  // columns that are read together

struct Simd {
  static constexpr int kLanes = 8;
  using Floats = __m256;
  struct Doubles {
    __m256d low, high;
  };

  static Floats set(float x) { return _mm256_set1_ps(x); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static constexpr int kExp2Parts = 1;
  static constexpr float kExp2Round = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the exponent's bias
  static Floats exp2(Floats t) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23));
  }
  static Floats keep_if_ge(Floats x, Floats a, Floats b) {
    return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), x);
  }
  static Doubles zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Doubles add(Doubles a, Floats b) {
    return {_mm256_add_pd(a.low, _mm256_cvtps_pd(_mm256_castps256_ps128(b))),
            _mm256_add_pd(a.high, _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1)))};
  }
  static double sum(Doubles x) {
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, _mm256_add_pd(x.low, x.high));
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
  static float greatest(Floats x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    float greatest = lanes[0];
    for (float lane : lanes) greatest = lane > greatest ? lane : greatest;
    return greatest;
  }
};

struct FloatLoader {
  using Element = float;
  static constexpr int kPerLoad = 8;
  static constexpr Element kNegativeInfinity = -INFINITY;
  static void load(const Element* p, __m256* out) { out[0] = _mm256_loadu_ps(p); }
  static void store(Element* p, const __m256* in) { _mm256_storeu_ps(p, in[0]); }
  static float to_float(Element x) { return x; }
  static Element from_float(float x) { return x; }
  static bool is_nan(Element x) { return x != x; }

  struct Max {
    __m256 max, nan;
    Max() : max(_mm256_set1_ps(-INFINITY)), nan(_mm256_setzero_ps()) {}
    void absorb(const Element* p) {
      for (int i = 0; i < kGroup; i += 16) {
        const __m256 a = _mm256_loadu_ps(p + i), b = _mm256_loadu_ps(p + i + 8);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
        max = _mm256_max_ps(b, _mm256_max_ps(a, max));
      }
    }
    // NaN if any is: its payload could get lost in the exponent arithmetic.
    template <class Otherwise>
    float result(Otherwise) const {
      return _mm256_movemask_ps(nan) ? NAN : Simd::greatest(max);
    }
  };
};

// Both 16-bit formats order like their bits, as signed integers, from +0 upwards.
template <class Format>
struct SixteenBitLoader : Format {
  using Element = uint16_t;
  static constexpr int kPerLoad = 16;

  struct Max {
    __m256i max;
    Max() : max(_mm256_set1_epi16(INT16_MIN)) {}
    void absorb(const Element* p) {
      for (int i = 0; i < kGroup; i += 16) {
        const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
        max = _mm256_max_epi16(max, loaded);
      }
    }
    template <class Otherwise>
    float result(Otherwise all_negative) const {
      alignas(32) int16_t lanes[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), max);
      int16_t greatest = INT16_MIN;
      for (int16_t lane : lanes) greatest = lane > greatest ? lane : greatest;
      return greatest >= 0 ? Format::to_float(static_cast<uint16_t>(greatest)) : all_negative();
    }
  };
};

struct BFloat16 {
  static constexpr uint16_t kNegativeInfinity = 0xFF80;
  static void load(const uint16_t* p, __m256* out) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xFFFF0000)));
  }
  // Half of the last place kept, less one if that place is even: ties go to even.
  static __m256i rounded(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  }
  static void store(uint16_t* p, const __m256* in) {
    const __m256i high = _mm256_and_si256(rounded(in[1]), _mm256_set1_epi32(0xFFFF0000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_or_si256(_mm256_srli_epi32(rounded(in[0]), 16), high));
  }
  static float to_float(uint16_t x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x) << 16)));
  }
  static uint16_t from_float(float x) {
    if (x != x) return 0x7FC0;
    const __m256i bits = rounded(_mm256_set1_ps(x));
    return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(bits)) >> 16);
  }
  static bool is_nan(uint16_t x) { return (x & 0x7FFF) > 0x7F80; }
};

struct Half {
  static constexpr uint16_t kNegativeInfinity = 0xFC00;
  static void load(const uint16_t* p, __m256* out) {
    out[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    out[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }
  static void store(uint16_t* p, const __m256* in) {
    for (int i = 0; i < 2; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i),
                       _mm256_cvtps_ph(in[i], _MM_FROUND_TO_NEAREST_INT));
    }
  }
  static float to_float(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
  static uint16_t from_float(float x) {
    const __m128i half = _mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT);
    return static_cast<uint16_t>(_mm_cvtsi128_si32(half));
  }
  static bool is_nan(uint16_t x) { return (x & 0x7FFF) > 0x7C00; }
};

#include "vocab_kernels_inl.h"

constexpr VocabKernels kKernels[] = {kernels_for<FloatLoader>("avx2"),
                                     kernels_for<SixteenBitLoader<BFloat16>>("avx2"),
                                     kernels_for<SixteenBitLoader<Half>>("avx2")};

}  // namespace

const VocabKernels* avx2_kernels() { return kKernels; }

}  // namespace r2dllm::cpu

#else

namespace r2dllm::cpu {
const VocabKernels* avx2_kernels() { return nullptr; }
}  // namespace r2dllm::cpu

#endif

// SPDX-License-Identifier: Apache-2.0
// The instruction set is asked for here, not on the command line: nothing outside this file may use
// it.
#include "vocab_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
// GCC reports the deliberately undefined operands inside its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace r2dllm::cpu {
namespace {

constexpr int64_t kGroup = 64;  // columns that are read together

struct Simd {
  static constexpr int kLanes = 16;
  using Floats = __m512;
  struct Doubles {
    __m512d low, high;
  };

  static Floats set(float x) { return _mm512_set1_ps(x); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  // A table of 2^(j / 32) takes three operations off the polynomial and costs two: the low bits of
  // t are 32 * integer + j, and an entry holds the bits of 2^(j / 32) less what j adds to them.
  static constexpr int kExp2Parts = 32;
  static constexpr float kExp2Round = 393216.0f;  // 1.5 * 2^18
  static Floats exp2(Floats t) {
    alignas(64) static constexpr uint32_t kTable[] = {
        0x3F800000, 0x3F7ECD87, 0x3F7DAAC3, 0x3F7C980F, 0x3F7B95C2, 0x3F7AA43A, 0x3F79C3D3,
        0x3F78F4F0, 0x3F7837F0, 0x3F778D3A, 0x3F76F532, 0x3F767043, 0x3F75FED7, 0x3F75A15B,
        0x3F75583F, 0x3F7523F6, 0x3F7504F3, 0x3F74FBAF, 0x3F7508A4, 0x3F752C4D, 0x3F75672A,
        0x3F75B9BE, 0x3F76248C, 0x3F76A81E, 0x3F7744FD, 0x3F77FBB8, 0x3F78CCDF, 0x3F79B907,
        0x3F7AC0C7, 0x3F7BE4BA, 0x3F7D257D, 0x3F7E83B3};
    const __m512i bits = _mm512_castps_si512(t);
    const __m512i entry =
        _mm512_permutex2var_epi32(_mm512_load_si512(kTable), bits, _mm512_load_si512(kTable + 16));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bits, 18), entry));
  }
  static Floats keep_if_ge(Floats x, Floats a, Floats b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), x);
  }
  static Doubles zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static Doubles add(Doubles a, Floats b) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(b), 1));
    return {_mm512_add_pd(a.low, _mm512_cvtps_pd(_mm512_castps512_ps256(b))),
            _mm512_add_pd(a.high, _mm512_cvtps_pd(high))};
  }
  static double sum(Doubles x) { return _mm512_reduce_add_pd(_mm512_add_pd(x.low, x.high)); }
  static float greatest(Floats x) { return _mm512_reduce_max_ps(x); }
};

struct FloatLoader {
  using Element = float;
  static constexpr int kPerLoad = 16;
  static constexpr Element kNegativeInfinity = -INFINITY;
  static void load(const Element* p, __m512* out) { out[0] = _mm512_loadu_ps(p); }
  static void store(Element* p, const __m512* in) { _mm512_storeu_ps(p, in[0]); }
  static float to_float(Element x) { return x; }
  static Element from_float(float x) { return x; }
  static bool is_nan(Element x) { return x != x; }

  struct Max {
    __m512 max;
    __mmask16 nan;
    Max() : max(_mm512_set1_ps(-INFINITY)), nan(0) {}
    void absorb(const Element* p) {
      for (int i = 0; i < kGroup; i += 32) {
        const __m512 a = _mm512_loadu_ps(p + i), b = _mm512_loadu_ps(p + i + 16);
        nan |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
        max = _mm512_max_ps(b, _mm512_max_ps(a, max));
      }
    }
    // NaN if any is: its payload could get lost in the exponent arithmetic.
    template <class Otherwise>
    float result(Otherwise) const {
      return nan ? NAN : Simd::greatest(max);
    }
  };
};

// Both 16-bit formats order like their bits, as signed integers, from +0 upwards.
template <class Format>
struct SixteenBitLoader : Format {
  using Element = uint16_t;
  static constexpr int kPerLoad = 32;

  struct Max {
    __m512i max;
    Max() : max(_mm512_set1_epi16(INT16_MIN)) {}
    void absorb(const Element* p) {
      for (int i = 0; i < kGroup; i += 32) {
        max = _mm512_max_epi16(max, _mm512_loadu_si512(p + i));
      }
    }
    template <class Otherwise>
    float result(Otherwise all_negative) const {
      alignas(64) int16_t lanes[32];
      _mm512_store_si512(lanes, max);
      int16_t greatest = INT16_MIN;
      for (int16_t lane : lanes) greatest = lane > greatest ? lane : greatest;
      return greatest >= 0 ? Format::to_float(static_cast<uint16_t>(greatest)) : all_negative();
    }
  };
};

struct BFloat16 {
  static constexpr uint16_t kNegativeInfinity = 0xFF80;
  static void load(const uint16_t* p, __m512* out) {
    const __m512i pairs = _mm512_loadu_si512(p);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF0000)));
  }
  // Half of the last place kept, less one if that place is even: ties go to even.
  static __m512i rounded(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  }
  static void store(uint16_t* p, const __m512* in) {
    const __m512i high = _mm512_and_si512(rounded(in[1]), _mm512_set1_epi32(0xFFFF0000));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(rounded(in[0]), 16), high));
  }
  static float to_float(uint16_t x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x) << 16)));
  }
  static uint16_t from_float(float x) {
    if (x != x) return 0x7FC0;
    const __m512i bits = rounded(_mm512_set1_ps(x));
    return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(bits)) >> 16);
  }
  static bool is_nan(uint16_t x) { return (x & 0x7FFF) > 0x7F80; }
};

struct Half {
  static constexpr uint16_t kNegativeInfinity = 0xFC00;
  static void load(const uint16_t* p, __m512* out) {
    const __m512i all = _mm512_loadu_si512(p);
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(all));
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(all, 1));
  }
  static void store(uint16_t* p, const __m512* in) {
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(in[0], _MM_FROUND_TO_NEAREST_INT));
    _mm512_storeu_si512(
        p, _mm512_inserti64x4(low, _mm512_cvtps_ph(in[1], _MM_FROUND_TO_NEAREST_INT), 1));
  }
  static float to_float(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
  static uint16_t from_float(float x) {
    const __m128i half = _mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT);
    return static_cast<uint16_t>(_mm_cvtsi128_si32(half));
  }
  static bool is_nan(uint16_t x) { return (x & 0x7FFF) > 0x7C00; }
};

#include "vocab_kernels_inl.h"

constexpr VocabKernels kKernels[] = {kernels_for<FloatLoader>("avx512"),
                                     kernels_for<SixteenBitLoader<BFloat16>>("avx512"),
                                     kernels_for<SixteenBitLoader<Half>>("avx512")};

}  // namespace

const VocabKernels* avx512_kernels() { return kKernels; }

}  // namespace r2dllm::cpu

#else

namespace r2dllm::cpu {
const VocabKernels* avx512_kernels() { return nullptr; }
}  // namespace r2dllm::cpu

#endif

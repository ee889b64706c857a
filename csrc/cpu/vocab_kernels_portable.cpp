// SPDX-License-Identifier: Apache-2.0
// Any processor: the compiler's generic vectors for three types, plain double arithmetic for
// float64.
#include <cstring>

#include "vocab_kernels.h"

namespace r2dllm::cpu {
namespace {

constexpr int64_t kGroup = 64;  // columns that are read together

struct Simd {
  static constexpr int kLanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  struct Doubles {
    double lanes[kLanes];
  };

  static Floats set(float x) { return x - Floats{}; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats sub(Floats a, Floats b) { return a - b; }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats fma(Floats a, Floats b, Floats c) {
#if defined(__FP_FAST_FMAF) || defined(__FP_FAST_FMAF32)
    Floats result;
    for (int i = 0; i < kLanes; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return result;
#else
    // The product of two floats is exact in double.
    typedef double Wide __attribute__((vector_size(32)));
    const Wide sum = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) +
                     __builtin_convertvector(c, Wide);
    return __builtin_convertvector(sum, Floats);
#endif
  }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static constexpr int kExp2Parts = 1;
  static constexpr float kExp2Round = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the exponent's bias
  static Floats exp2(Floats t) {
    typedef uint32_t Bits __attribute__((vector_size(16)));
    return (Floats)((Bits)t << 23);
  }
  static Floats keep_if_ge(Floats x, Floats a, Floats b) { return (Floats)((Ints)x & (a >= b)); }
  static Doubles zero() { return {}; }
  static Doubles add(Doubles a, Floats b) {
    for (int i = 0; i < kLanes; ++i) a.lanes[i] += static_cast<double>(b[i]);
    return a;
  }
  static double sum(const Doubles& x) {
    return (x.lanes[0] + x.lanes[1]) + (x.lanes[2] + x.lanes[3]);
  }
  static float greatest(Floats x) {
    float greatest = x[0];
    for (int i = 1; i < kLanes; ++i) greatest = x[i] > greatest ? x[i] : greatest;
    return greatest;
  }
};

template <class Format>
struct Loader : Format {
  using Element = typename Format::Element;
  static constexpr int kPerLoad = Simd::kLanes;
  static void load(const Element* p, Simd::Floats* out) {
    for (int i = 0; i < Simd::kLanes; ++i) out[0][i] = Format::to_float(p[i]);
  }
  static void store(Element* p, const Simd::Floats* in) {
    for (int i = 0; i < Simd::kLanes; ++i) p[i] = Format::from_float(in[0][i]);
  }
  static bool is_nan(Element x) { return Format::to_float(x) != Format::to_float(x); }

  struct Max {
    Simd::Floats max = Simd::set(-INFINITY);
    Simd::Ints nan = {};
    void absorb(const Element* p) {
      for (int64_t i = 0; i < kGroup; i += Simd::kLanes) {
        Simd::Floats z;
        load(p + i, &z);
        nan |= z != z;
        max = Simd::max(z, max);
      }
    }
    template <class Otherwise>
    float result(Otherwise) const {
      for (int i = 0; i < Simd::kLanes; ++i) {
        if (nan[i]) return NAN;
      }
      return Simd::greatest(max);
    }
  };
};

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Float {
  using Element = float;
  static constexpr Element kNegativeInfinity = -INFINITY;
  static float to_float(Element x) { return x; }
  static Element from_float(float x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr Element kNegativeInfinity = 0xFF80;
  static float to_float(Element x) { return from_bits(static_cast<uint32_t>(x) << 16); }
  static Element from_float(float x) {
    if (x != x) return 0x7FC0;
    const uint32_t bits = to_bits(x);
    return static_cast<Element>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
};

struct Half {
  using Element = uint16_t;
  static constexpr Element kNegativeInfinity = 0xFC00;
  static float to_float(Element x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7FFF;
    if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | ((magnitude & 0x3FF) << 13));
    // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
    const float value = from_bits(magnitude << 13) * 0x1p112f;
    return sign ? -value : value;
  }
  static Element from_float(float x) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
    uint32_t half;
    if (magnitude >= 0x47800000) {  // 2^16 or more, infinity, NaN
      half = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
    } else if (magnitude < 0x38800000) {  // subnormal: the last place of 0.5f is that of the format
      half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    } else {  // the exponent bias from 127 to 15, and ties to even
      half = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    }
    return static_cast<Element>(sign | half);
  }
};

#include "vocab_kernels_inl.h"

OnlineSoftmax stats_and_moment_double(const void* logits, int64_t n, double* moment) {
  const auto* p = static_cast<const double*>(logits);
  double max = -INFINITY;
  bool has_nan = false;
  for (int64_t i = 0; i < n; ++i) {
    max = p[i] > max ? p[i] : max;
    has_nan |= p[i] != p[i];
  }
  *moment = has_nan || max == INFINITY ? NAN : 0.0;
  if (has_nan || max == INFINITY) return {max, 0.0, NAN};
  if (max == -INFINITY) return OnlineSoftmax::empty();
  const double exponent = rint(max * kLog2eWide);
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double term = wide_term(p[i], exponent);
    sum += term;
    *moment += wide_product(term, p[i], max);
  }
  return {max, exponent, sum};
}

OnlineSoftmax stats_double(const void* logits, int64_t n) {
  double moment;
  return stats_and_moment_double(logits, n, &moment);
}

double correction_double(const void*, int64_t, int64_t, const OnlineSoftmax&) { return 0.0; }

int64_t find_double(const void* logits, int64_t n, double value) {
  const auto* p = static_cast<const double*>(logits);
  for (int64_t i = 0; i < n; ++i) {
    if (p[i] == value) return i;
  }
  return -1;
}

double tempered_mass_double(const void* logits, int64_t n, double max, double scale,
                            double cutoff) {
  const auto* p = static_cast<const double*>(logits);
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (p[i] >= cutoff) sum += exp2((p[i] - max) * scale);
  }
  return sum;
}

TemperedSums tempered_sums_double(const void* logits, int64_t n, double max, double scale) {
  const auto* p = static_cast<const double*>(logits);
  TemperedSums sums{0.0, 0.0};
  for (int64_t i = 0; i < n; ++i) add_tempered(sums, (p[i] - max) * scale);
  return sums;
}

void gradient_double(const void* logits, void* gradient, int64_t n, const RowGradient& row) {
  const auto* p = static_cast<const double*>(logits);
  auto* out = static_cast<double*>(gradient);
  for (int64_t i = 0; i < n; ++i) out[i] = is_nan(row) ? NAN : logit_gradient(row, p[i]);
}

double load_double(const void* logits, int64_t i) { return static_cast<const double*>(logits)[i]; }

void store_double(void* logits, int64_t i, double value) {
  static_cast<double*>(logits)[i] = value;
}

constexpr VocabKernels kKernels[] = {
    kernels_for<Loader<Float>>("portable"), kernels_for<Loader<BFloat16>>("portable"),
    kernels_for<Loader<Half>>("portable"),
    VocabKernels{"portable", stats_double, stats_and_moment_double, correction_double, find_double,
                 tempered_mass_double, tempered_sums_double, gradient_double, load_double,
                 store_double}};

}  // namespace

const VocabKernels* portable_kernels() { return kKernels; }

}  // namespace r2dllm::cpu

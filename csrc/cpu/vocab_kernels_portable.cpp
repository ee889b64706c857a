// SPDX-License-Identifier: Apache-2.0
// Any processor: the compiler's generic vectors for three types, plain double arithmetic for
// float64.
#include <cstring>

#include "vocab_kernels.h"

// Vectors of doubles are wider than a register here; no function boundary is crossed with one.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace r2dllm::cpu {
namespace {

constexpr int64_t kGroup = 64;  // columns that are read together

struct Simd {
  static constexpr int kLanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(32)));

  static Floats set(float x) { return x - Floats{}; }
  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats sub(Floats a, Floats b) { return a - b; }
  static Floats fma(Floats a, Floats b, Floats c) {
#if defined(__FP_FAST_FMAF) || defined(__FP_FAST_FMAF32)
    Floats result;
    for (int i = 0; i < kLanes; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return result;
#else
    // The product of two floats is exact in double.
    const Doubles sum = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles) +
                        __builtin_convertvector(c, Doubles);
    return __builtin_convertvector(sum, Floats);
#endif
  }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static Floats power_of_two(Floats t) {
    typedef uint32_t Bits __attribute__((vector_size(16)));
    return (Floats)((Bits)t << 23);
  }
  static Floats keep_if_ge(Floats x, Floats a, Floats b) { return (Floats)((Ints)x & (a >= b)); }
  static double sum(Floats x) {
    double sum = 0.0;
    for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(x[i]);
    return sum;
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

struct Float {
  using Element = float;
  static constexpr Element kNegativeInfinity = -INFINITY;
  static float to_float(Element x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr Element kNegativeInfinity = 0xFF80;
  static float to_float(Element x) { return from_bits(static_cast<uint32_t>(x) << 16); }
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
};

#include "vocab_kernels.inc"

VocabStats stats_double(const void* logits, int64_t n) {
  const auto* p = static_cast<const double*>(logits);
  double max = -INFINITY;
  bool has_nan = false;
  for (int64_t i = 0; i < n; ++i) {
    max = p[i] > max ? p[i] : max;
    has_nan |= p[i] != p[i];
  }
  if (has_nan || max == INFINITY) return {max, 0.0, NAN};
  if (max == -INFINITY) return VocabStats::empty();
  const double exponent = rint(max * kLog2eWide);
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += wide_term(p[i], exponent);
  return {max, exponent, sum};
}

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

double load_double(const void* logits, int64_t i) { return static_cast<const double*>(logits)[i]; }

constexpr VocabKernels kKernels[] = {
    kernels_for<Loader<Float>>("portable"), kernels_for<Loader<BFloat16>>("portable"),
    kernels_for<Loader<Half>>("portable"),
    VocabKernels{"portable", stats_double, find_double, tempered_mass_double, load_double}};

}  // namespace

const VocabKernels* portable_kernels() { return kKernels; }

namespace {

const VocabKernels* best_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (avx512_kernels() != nullptr && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return avx512_kernels();
  }
  if (avx2_kernels() != nullptr && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return avx2_kernels();
  }
#endif
  return portable_kernels();
}

const VocabKernels* const kBest = best_kernels();

}  // namespace

const VocabKernels& vocab_kernels(LogitType type) {
  if (type == LogitType::kDouble) return portable_kernels()[static_cast<int>(type)];
  return kBest[static_cast<int>(type)];
}

const char* instruction_set() { return kBest->instruction_set; }

}  // namespace r2dllm::cpu

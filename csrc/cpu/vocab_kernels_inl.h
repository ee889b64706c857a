// SPDX-License-Identifier: Apache-2.0
// The pass over V, written once over a `Simd` type. Included by one translation unit per
// instruction set, inside an anonymous namespace: nothing here may be shared between them.
//
// Before it stand kGroup, the columns that are read together, and
//   Simd    kLanes, Floats (a vector of kLanes float32), Doubles (sums of Floats), set, add, sub,
//           mul, fma(a, b, c) = a * b + c, max(a, b) = b if either is NaN, keep_if_ge(x, a, b) = x
//           where a >= b else 0, greatest; zero and add to Doubles, their sum in a fixed order;
//           kExp2Parts (1 or 32), kExp2Round, adding which rounds to multiples of 1 / kExp2Parts,
//           and exp2(t) = 2^k for t = kExp2Round + such a multiple k
//   Loader  Element, kPerLoad, kNegativeInfinity, load(p, Floats[kPerLoad / kLanes]), store (no
//           NaN), to_float, from_float, is_nan, and Max: absorb(group), result(otherwise). A 16-bit
//           NaN may be missed there; it makes the sum NaN.

constexpr int kVectors = static_cast<int>(kGroup / Simd::kLanes);

using Floats = typename Simd::Floats;
using Doubles = typename Simd::Doubles;

// 2^f on [-1/2, 1/2] / kExp2Parts, exact at 0. Relative error 9e-8 (weighted least squares,
// iterated towards the minimax), with 32 parts 5.4e-8 (the cubic term's minimax line put into the
// linear one).
inline Floats exp2_fraction(Floats f) {
  if constexpr (Simd::kExp2Parts == 32) {
    return Simd::fma(Simd::fma(Simd::set(0.24022886f), f, Simd::set(0.6931573f)), f,
                     Simd::set(1.0f));
  }
  Floats p = Simd::set(0.00132647273f);
  p = Simd::fma(p, f, Simd::set(0.00967151299f));
  p = Simd::fma(p, f, Simd::set(0.0555073358f));
  p = Simd::fma(p, f, Simd::set(0.240222424f));
  p = Simd::fma(p, f, Simd::set(0.693147004f));
  return Simd::fma(p, f, Simd::set(1.0f));
}

template <class Loader>
inline void load_group(const typename Loader::Element* p, Floats (&out)[kVectors]) {
  constexpr int per_load = Loader::kPerLoad / Simd::kLanes;
  for (int v = 0; v < kVectors; v += per_load) Loader::load(p + v * Simd::kLanes, out + v);
}

template <class Loader>
inline void store_group(typename Loader::Element* p, const Floats (&in)[kVectors]) {
  constexpr int per_load = Loader::kPerLoad / Simd::kLanes;
  for (int v = 0; v < kVectors; v += per_load) Loader::store(p + v * Simd::kLanes, in + v);
}

// Calls f(pointer to kGroup elements) for every group; the last one is padded with -inf.
template <class Loader, class F>
inline void for_each_group(const typename Loader::Element* p, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) f(p + i);
  if (i < n) {
    typename Loader::Element padded[kGroup];
    for (int64_t j = 0; j < kGroup; ++j)
      padded[j] = i + j < n ? p[i + j] : Loader::kNegativeInfinity;
    f(padded);
  }
}

// As many columns are added up in float32 before the sum goes on in double.
constexpr int64_t kChain = 8 * kGroup;

// K sums in double of what add(logits, sums[K]) adds.
template <class Loader, int K, class Add>
inline void sums_over_groups(const typename Loader::Element* p, int64_t n, double (&totals)[K],
                             Add add) {
  using Element = typename Loader::Element;
  constexpr int per_load = Loader::kPerLoad / Simd::kLanes, loads = kVectors / per_load;
  constexpr int64_t kBytes = sizeof(Element), kLines = kChain * kBytes / 64;
  Doubles wide[K];
  for (int k = 0; k < K; ++k) wide[k] = Simd::zero();
  for (int64_t i = 0; i < n; i += kChain) {
    const Element* chain = p + i;
    Element padded[kChain];
    int64_t size = n - i < kChain ? n - i : kChain;
    if (size % kGroup != 0) {
      for (int64_t j = 0; j < size; ++j) padded[j] = chain[j];
      for (; size % kGroup != 0; ++size) padded[size] = Loader::kNegativeInfinity;
      chain = padded;
    }
    Floats sums[kVectors][K];
    // Load by load, each through all groups: the sums stay in registers.
    for (int load = 0; load < loads; ++load) {
      // The next slice comes from memory while this one is worked on in the cache.
      for (int64_t line = load * kLines / loads; line < (load + 1) * kLines / loads; ++line) {
        __builtin_prefetch(reinterpret_cast<const char*>(p + i) + n * kBytes + line * 64);
      }
      Floats mine[per_load][K];
      for (int v = 0; v < per_load; ++v) {
        for (int k = 0; k < K; ++k) mine[v][k] = Simd::set(0.0f);
      }
#pragma GCC unroll 4
      for (int64_t group = 0; group < size; group += kGroup) {
        Floats z[per_load];
        Loader::load(chain + group + load * Loader::kPerLoad, z);
        for (int v = 0; v < per_load; ++v) add(z[v], mine[v]);
      }
      for (int v = 0; v < per_load; ++v) {
        for (int k = 0; k < K; ++k) sums[load * per_load + v][k] = mine[v][k];
      }
    }
    for (int v = kVectors / 2; v > 0; v /= 2) {
      for (int w = 0; w < v; ++w) {
        for (int k = 0; k < K; ++k) sums[w][k] = Simd::add(sums[w][k], sums[w + v][k]);
      }
    }
    for (int k = 0; k < K; ++k) wide[k] = Simd::add(wide[k], sums[0][k]);
  }
  for (int k = 0; k < K; ++k) totals[k] = Simd::sum(wide[k]);
}

template <class Loader, class Add>
inline double sum_over_groups(const typename Loader::Element* p, int64_t n, Add add) {
  double total[1];
  sums_over_groups<Loader>(p, n, total,
                           [&](Floats z, Floats(&sum)[1]) { sum[0] = add(sum[0], z); });
  return total[0];
}

template <class Loader>
inline float greatest(const typename Loader::Element* p, int64_t n) {
  typename Loader::Max max;
  for_each_group<Loader>(p, n, [&](const typename Loader::Element* group) { max.absorb(group); });
  return max.result([&] {
    Floats greatest = Simd::set(-INFINITY);
    for_each_group<Loader>(p, n, [&](const typename Loader::Element* group) {
      Floats z[kVectors];
      load_group<Loader>(group, z);
      for (int v = 0; v < kVectors; ++v) greatest = Simd::max(z[v], greatest);
    });
    return Simd::greatest(greatest);
  });
}

// 2^(z * kLog2e - exponent) = fraction * power, with z no further than kTermFloor below the
// maximum: z * kLog2e = k + exponent + f, k a multiple of 1 / kExp2Parts, f not rounded on the way.
struct Term {
  Floats floor, log2e, round;

  Term(float max, float exponent)
      : floor(Simd::set(max - kTermFloor)),
        log2e(Simd::set(kLog2e)),
        round(Simd::set(Simd::kExp2Round - exponent)) {}

  void operator()(Floats z, Floats& fraction, Floats& power) const {
    const Floats clamped = Simd::max(floor, z);
    const Floats t = Simd::fma(clamped, log2e, round);
    const Floats f = Simd::fma(clamped, log2e, Simd::sub(round, t));
    fraction = exp2_fraction(f);
    power = Simd::exp2(t);
  }
};

template <class Loader>
inline double sum_of_terms(const typename Loader::Element* p, int64_t n, const Term& term) {
  return sum_over_groups<Loader>(p, n, [&](Floats sum, Floats z) {
    Floats fraction, power;
    term(z, fraction, power);
    return Simd::fma(fraction, power, sum);
  });
}

// Sums of the terms, to the bit as `sum_of_terms`, and of term * (z - max).
template <class Loader>
inline void sum_and_moment(const typename Loader::Element* p, int64_t n, float max,
                           const Term& term, double (&totals)[2]) {
  const Floats top = Simd::set(max);
  sums_over_groups<Loader>(p, n, totals, [&](Floats z, Floats(&sums)[2]) {
    Floats fraction, power;
    term(z, fraction, power);
    const Floats product = Simd::mul(fraction, power),
                 below = Simd::sub(Simd::max(term.floor, z), top);
    // A power of 2 makes the product exact, and the cheaper sum the same.
    sums[0] =
        Simd::kExp2Parts == 1 ? Simd::add(sums[0], product) : Simd::fma(fraction, power, sums[0]);
    sums[1] = Simd::fma(product, below, sums[1]);
  });
}

// kMoment: `moment` too.
template <class Loader, bool kMoment>
inline OnlineSoftmax statistics(const void* logits, int64_t n, double* moment) {
  const auto* p = static_cast<const typename Loader::Element*>(logits);
  const float max = greatest<Loader>(p, n);
  if (!(max > -INFINITY && max < INFINITY)) {
    // +inf or NaN on top makes the row invalid. So does a NaN among nothing but -inf.
    bool has_nan = max != -INFINITY;
    for (int64_t i = 0; i < n && !has_nan; ++i) has_nan = Loader::is_nan(p[i]);
    if constexpr (kMoment) *moment = has_nan ? NAN : 0.0;
    return {max, 0.0, has_nan ? NAN : 0.0};
  }
  if (!is_narrow(max)) {
    const double exponent = rint(static_cast<double>(max) * kLog2eWide);
    double sum = 0.0, products = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double z = Loader::to_float(p[i]), term = wide_term(z, exponent);
      sum += term;
      if constexpr (kMoment) products += wide_product(term, z, max);
    }
    if constexpr (kMoment) *moment = products;
    return {max, exponent, sum};
  }
  const float exponent = rintf(max * kLog2e);
  const Term term(max, exponent);
  const double factor = log2e_factor(max);
  if constexpr (kMoment) {
    double totals[2];
    sum_and_moment<Loader>(p, n, max, term, totals);
    *moment = totals[1] * factor;
    return {max, exponent, totals[0] * factor};
  }
  return {max, exponent, sum_of_terms<Loader>(p, n, term) * factor};
}

template <class Loader>
OnlineSoftmax stats(const void* logits, int64_t n) {
  const float first =
      n == 1 ? Loader::to_float(*static_cast<const typename Loader::Element*>(logits)) : NAN;
  if (is_narrow(first)) {
    // A token's own: what is padded with -inf leaves no trace beside the only term.
    const float exponent = rintf(first * kLog2e);
    Floats fraction, power;
    Term(first, exponent)(Simd::set(first), fraction, power);
    const double term = Simd::greatest(Simd::mul(fraction, power));
    return {first, exponent, term * log2e_factor(first)};
  }
  return statistics<Loader, false>(logits, n, nullptr);
}

template <class Loader>
OnlineSoftmax stats_and_moment(const void* logits, int64_t n, double* moment) {
  return statistics<Loader, true>(logits, n, moment);
}

template <class Loader>
double correction(const void* logits, int64_t n, int64_t column, const OnlineSoftmax& stats) {
  const float max = static_cast<float>(stats.max);
  if (!is_narrow(max)) return 0.0;
  const int64_t begin = column / kChain * kChain, size = n - begin < kChain ? n - begin : kChain;
  const auto* p = static_cast<const typename Loader::Element*>(logits) + begin;
  const Term term(max, static_cast<float>(stats.exponent));
  Doubles sum = Simd::zero();
  for_each_group<Loader>(p, size, [&](const typename Loader::Element* group) {
    Floats z[kVectors];
    load_group<Loader>(group, z);
    for (int v = 0; v < kVectors; ++v) {
      Floats fraction, power;
      term(z[v], fraction, power);
      sum = Simd::add(sum, Simd::mul(fraction, power));
    }
  });
  return (Simd::sum(sum) - sum_of_terms<Loader>(p, size, term)) * log2e_factor(max);
}

template <class Loader>
int64_t find(const void* logits, int64_t n, double value) {
  const auto* p = static_cast<const typename Loader::Element*>(logits);
  const Floats wanted = Simd::set(static_cast<float>(value));
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    Floats z[kVectors];
    load_group<Loader>(p + i, z);
    Floats found = Simd::set(0.0f);
    // wanted is the maximum: z >= wanted is equality.
    for (int v = 0; v < kVectors; ++v) {
      found = Simd::add(found, Simd::keep_if_ge(Simd::set(1.0f), z[v], wanted));
    }
    if (Simd::greatest(found) > 0.0f) break;
  }
  while (i < n && !(Loader::to_float(p[i]) >= static_cast<float>(value))) ++i;
  return i < n ? i : -1;
}

template <class Loader>
double tempered_mass(const void* logits, int64_t n, double max, double scale, double cutoff) {
  const auto* p = static_cast<const typename Loader::Element*>(logits);
  if (!is_narrow_scale(scale)) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double z = Loader::to_float(p[i]);
      if (z >= cutoff) sum += exp2((z - max) * scale);
    }
    return sum;
  }
  const Floats top = Simd::set(static_cast<float>(max)), low = Simd::set(least_float(cutoff)),
               factor = Simd::set(static_cast<float>(scale)), round = Simd::set(Simd::kExp2Round),
               floor = Simd::set(-115.0f / static_cast<float>(scale));
  return sum_over_groups<Loader>(p, n, [&](Floats sum, Floats z) {
    const Floats below = Simd::max(floor, Simd::sub(z, top));
    const Floats t = Simd::fma(below, factor, round);
    const Floats f = Simd::fma(below, factor, Simd::sub(round, t));
    const Floats power = Simd::keep_if_ge(Simd::exp2(t), z, low);
    return Simd::fma(exp2_fraction(f), power, sum);
  });
}

// 2^u with u = (z - max) * scale, at least 2^-115.
struct TemperedTerm {
  Floats top, factor, floor, round;

  TemperedTerm(double max, double scale)
      : top(Simd::set(static_cast<float>(max))),
        factor(Simd::set(static_cast<float>(scale))),
        floor(Simd::set(-115.0f / static_cast<float>(scale))),
        round(Simd::set(Simd::kExp2Round)) {}

  // exp2(u) = fraction * power
  void operator()(Floats z, Floats& u, Floats& fraction, Floats& power) const {
    const Floats below = Simd::max(floor, Simd::sub(z, top));
    const Floats t = Simd::fma(below, factor, round);
    u = Simd::mul(below, factor);
    fraction = exp2_fraction(Simd::fma(below, factor, Simd::sub(round, t)));
    power = Simd::exp2(t);
  }
};

template <class Loader>
TemperedSums tempered_sums(const void* logits, int64_t n, double max, double scale) {
  const auto* p = static_cast<const typename Loader::Element*>(logits);
  if (!is_narrow_scale(scale)) {
    TemperedSums sums{0.0, 0.0};
    for (int64_t i = 0; i < n; ++i) add_tempered(sums, (Loader::to_float(p[i]) - max) * scale);
    return sums;
  }
  const TemperedTerm term(max, scale);
  double totals[2];
  sums_over_groups<Loader>(p, n, totals, [&](Floats z, Floats(&sums)[2]) {
    Floats u, fraction, power;
    term(z, u, fraction, power);
    sums[0] = Simd::fma(fraction, power, sums[0]);
    sums[1] = Simd::fma(Simd::mul(fraction, u), power, sums[1]);
  });
  return {totals[0], totals[1]};
}

template <class Loader, bool kEntropy>
inline void narrow_gradient(const typename Loader::Element* p, typename Loader::Element* out,
                            int64_t n, const RowGradient& row) {
  const Term term(static_cast<float>(row.max), static_cast<float>(row.exponent));
  const Floats softmax = Simd::set(static_cast<float>(row.softmax * log2e_factor(row.max))),
               entropy = Simd::set(static_cast<float>(row.entropy)),
               minus_mean = Simd::set(static_cast<float>(-row.mean));
  const TemperedTerm tempered(row.max, row.scale);
  for (int64_t i = 0; i < n; i += kGroup) {
    typename Loader::Element padded[kGroup];
    const int64_t size = n - i < kGroup ? n - i : kGroup;
    if (size < kGroup) {
      for (int64_t j = 0; j < kGroup; ++j)
        padded[j] = j < size ? p[i + j] : Loader::kNegativeInfinity;
    }
    Floats z[kVectors];
    load_group<Loader>(size < kGroup ? padded : p + i, z);
    for (int v = 0; v < kVectors; ++v) {
      Floats fraction, power;
      term(z[v], fraction, power);
      // What is below the floor has a gradient of exactly 0, as -inf has to.
      const Floats scaled = Simd::keep_if_ge(Simd::mul(power, softmax), z[v], term.floor);
      Floats gradient = Simd::mul(fraction, scaled);
      if (kEntropy) {
        Floats u;
        tempered(z[v], u, fraction, power);
        const Floats slope = Simd::mul(Simd::mul(power, entropy), Simd::add(u, minus_mean));
        const Floats visible =
            Simd::keep_if_ge(slope, Simd::sub(z[v], tempered.top), tempered.floor);
        gradient = Simd::fma(fraction, visible, gradient);
      }
      z[v] = gradient;
    }
    if (size < kGroup) {
      store_group<Loader>(padded, z);
      for (int64_t j = 0; j < size; ++j) out[i + j] = padded[j];
    } else {
      store_group<Loader>(out + i, z);
    }
  }
}

template <class Loader>
void gradient(const void* logits, void* gradient, int64_t n, const RowGradient& row) {
  const auto* p = static_cast<const typename Loader::Element*>(logits);
  auto* out = static_cast<typename Loader::Element*>(gradient);
  if (is_nan(row)) {
    for (int64_t i = 0; i < n; ++i) out[i] = Loader::from_float(NAN);
  } else if (!is_narrow(static_cast<float>(row.max)) ||
             (row.entropy != 0.0 && !is_narrow_scale(row.scale))) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = Loader::from_float(static_cast<float>(logit_gradient(row, Loader::to_float(p[i]))));
    }
  } else if (row.entropy != 0.0) {
    narrow_gradient<Loader, true>(p, out, n, row);
  } else {
    narrow_gradient<Loader, false>(p, out, n, row);
  }
}

template <class Loader>
double load_one(const void* logits, int64_t i) {
  return Loader::to_float(static_cast<const typename Loader::Element*>(logits)[i]);
}

template <class Loader>
void store_one(void* logits, int64_t i, double value) {
  static_cast<typename Loader::Element*>(logits)[i] = Loader::from_float(static_cast<float>(value));
}

template <class Loader>
constexpr VocabKernels kernels_for(const char* name) {
  return {name,
          stats<Loader>,
          stats_and_moment<Loader>,
          correction<Loader>,
          find<Loader>,
          tempered_mass<Loader>,
          tempered_sums<Loader>,
          gradient<Loader>,
          load_one<Loader>,
          store_one<Loader>};
}

// SPDX-License-Identifier: Apache-2.0
// 2^(z * log2(e) - exponent) of one logit in float32, for back ends without vectors of their own.
#pragma once

#include <cstring>

#include "confidence.h"

namespace r2dllm {

R2D_HOST_DEVICE float exp2_polynomial(float f) {
  float p = kExp2C5;
  p = fmaf(p, f, kExp2C4);
  p = fmaf(p, f, kExp2C3);
  p = fmaf(p, f, kExp2C2);
  p = fmaf(p, f, kExp2C1);
  return fmaf(p, f, 1.0f);
}

// 2^(below * factor) for a product in [-115, 0], which is not rounded on the way.
R2D_HOST_DEVICE float exp2_of_product(float below, float factor) {
  const float t = fmaf(below, factor, kExp2Round);
  const float f = fmaf(below, factor, kExp2Round - t);
  uint32_t bits;
  memcpy(&bits, &t, sizeof bits);
  bits <<= 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return exp2_polynomial(f) * power;
}

// `logit` >= max - kTermFloor of its slice, |max| within float32's range of exponents (is_narrow).
R2D_HOST_DEVICE float narrow_term(float logit, float exponent) {
  const float round = kExp2Round - exponent;
  const float t = fmaf(logit, kLog2e, round);
  const float f = fmaf(logit, kLog2e, round - t);
  uint32_t bits;
  memcpy(&bits, &t, sizeof bits);
  bits <<= 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return exp2_polynomial(f) * power;
}

// Statistics of a slice that holds nothing but `logit`, a finite maximum.
R2D_HOST_DEVICE VocabStats single(float logit) {
  if (is_narrow(logit)) {
    const float exponent = rintf(logit * kLog2e);
    return {logit, exponent, narrow_term(logit, exponent)};
  }
  const double exponent = rint(logit * kLog2eWide);
  return {logit, exponent, wide_term(logit, exponent)};
}

}  // namespace r2dllm

// SPDX-License-Identifier: Apache-2.0
// Logits in each format of cuda/logit_format.h.
#pragma once

#include <memory>
#include <random>

#include "../cuda/vocab_row.h"

namespace r2dllm::test {

inline uint32_t bits_of(float x) { return cuda::bit_cast<uint32_t>(x); }

// Rounded towards zero; values that the format has stay as they are.
template <class Format>
typename Format::Bits encode(float x);
template <>
inline uint32_t encode<cuda::Float32>(float x) {
  return bits_of(x);
}
template <>
inline uint16_t encode<cuda::BFloat16>(float x) {
  return x != x ? 0x7FC0 : static_cast<uint16_t>(bits_of(x) >> 16);
}
template <>
inline uint16_t encode<cuda::Half>(float x) {
  const auto sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFF;
  if (x != x) return 0x7E00;
  if (magnitude >= 0x47800000) return sign | (magnitude == 0x7F800000 ? 0x7C00 : 0x7BFF);
  if (magnitude < 0x38800000) return sign;
  return sign | static_cast<uint16_t>((magnitude >> 13) - (112 << 10));
}

constexpr LogitType type_of(cuda::Float32) { return LogitType::kFloat; }
constexpr LogitType type_of(cuda::BFloat16) { return LogitType::kBFloat16; }
constexpr LogitType type_of(cuda::Half) { return LogitType::kHalf; }

// [batch, length, vocab] logits in a heap block that ends with the last one. `offset`: elements
// before the first; `pad`: between rows.
template <class Format>
struct Logits {
  using Bits = typename Format::Bits;
  int64_t batch, length, vocab, offset, pitch;
  std::unique_ptr<Bits[]> memory;
  int64_t excluded = -1, shift = 0;

  Logits(int64_t batch, int64_t length, int64_t vocab, int64_t offset = 0, int64_t pad = 0)
      : batch(batch),
        length(length),
        vocab(vocab),
        offset(offset),
        pitch(vocab + pad),
        memory(new Bits[static_cast<size_t>(offset + (batch * length - 1) * pitch + vocab)]) {}

  void set(int64_t cell, int64_t column, float z) {
    memory[static_cast<size_t>(offset + cell * pitch + column)] = encode<Format>(z);
  }
  double get(int64_t cell, int64_t column) const {
    if (column == excluded) return -INFINITY;
    return Format::value(memory[static_cast<size_t>(offset + cell * pitch + column)]);
  }
  LogitsView view() const {
    return {memory.get() + offset,
            type_of(Format()),
            batch,
            length,
            vocab,
            length * pitch,
            pitch,
            excluded,
            shift};
  }
  int64_t slices() const {
    return (vocab + cuda::kSliceColumns<Format> - 1) / cuda::kSliceColumns<Format>;
  }
  void fill(std::mt19937& random, float spread = 3.0f) {
    std::normal_distribution<float> normal(0.0f, spread);
    for (int64_t cell = 0; cell < batch * length; ++cell) {
      for (int64_t i = 0; i < vocab; ++i) set(cell, i, normal(random));
    }
  }
};

template <class F>
void for_each_format(F f) {
  f(cuda::Float32());
  f(cuda::BFloat16());
  f(cuda::Half());
}

}  // namespace r2dllm::test

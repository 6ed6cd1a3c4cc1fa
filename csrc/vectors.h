// Sixteen numbers at once, in however many registers that takes.
#pragma once

#include <cstdint>

#include "lanes.h"
#include "numbers.h"

namespace realign {

// They may lie at any address.
using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));
using Words = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
using Halves = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

template <Dtype kDtype>
REALIGN_INLINE float load(const void* array, int64_t i) {
  if constexpr (kDtype == Dtype::float32) return static_cast<const float*>(array)[i];
  const uint16_t half = static_cast<const uint16_t*>(array)[i];
  return kDtype == Dtype::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half);
}

template <Dtype kDtype>
REALIGN_INLINE void load(const void* array, int64_t i, Floats& out) {
  if constexpr (kDtype == Dtype::float32) {
    out = *reinterpret_cast<const Floats*>(static_cast<const float*>(array) + i);
  } else if constexpr (kDtype == Dtype::bfloat16) {
    const auto& halves = *reinterpret_cast<const Halves*>(static_cast<const uint16_t*>(array) + i);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    out = reinterpret_cast<const Floats&>(words);
  } else {
    float numbers[kLanes];
    for (int j = 0; j < kLanes; ++j) numbers[j] = load<kDtype>(array, i + j);
    out = *reinterpret_cast<const Floats*>(numbers);
  }
}

}  // namespace realign

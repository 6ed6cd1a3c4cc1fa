// Philox4x32-10 and the normals made of its words, one number at a time, for the host and for CUDA.
//
// The definition is realign_kernels/philox_normal/reference.py: the same float operations in the same order, so the
// same bits, where the compiler fuses no multiplication with an addition (-ffp-contract=off, nvcc's --fmad=false).
#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace realign {

// Four words: a Philox counter, then what it becomes.
struct PhiloxBlock {
  uint32_t word[4];
};

// Two normals from two words.
struct NormalPair {
  float cos, sin;
};

REALIGN_HOST_DEVICE REALIGN_INLINE void philox_round(PhiloxBlock& c, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t(c.word[0]) * 0xD2511F53u;
  const uint64_t product1 = uint64_t(c.word[2]) * 0xCD9E8D57u;
  c = {{uint32_t(product1 >> 32) ^ c.word[1] ^ key0, uint32_t(product1), uint32_t(product0 >> 32) ^ c.word[3] ^ key1,
        uint32_t(product0)}};
}

// The words of the counter (block, step, 0, 0) under a key.
REALIGN_HOST_DEVICE REALIGN_INLINE PhiloxBlock philox(uint32_t block, uint32_t step, uint32_t key0, uint32_t key1) {
  PhiloxBlock counter = {{block, step, 0, 0}};
  for (int round = 0; round < 10; ++round) {
    philox_round(counter, key0, key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// ln(units / 2^24) for units from 1 to 2^24.
REALIGN_HOST_DEVICE REALIGN_INLINE float log_of_units(int32_t units) {
  constexpr int32_t kSqrtHalfBits = 0x3F3504F3, kOneBits = 0x3F800000;
  constexpr float kLn2High = float(0x2C5C8 * 0x1p-18);
  constexpr float kLn2Low = float(0.6931471805599453 - 0x2C5C8 * 0x1p-18);
  const int32_t bits = int32_t(float_to_bits(float(units) * 0x1p-24f)) + (kOneBits - kSqrtHalfBits);
  const float exponent = float((bits >> 23) - 127);
  const float f = bits_to_float(uint32_t((bits & 0x7FFFFF) + kSqrtHalfBits)) - 1.0f;
  const float s = f / (f + 2.0f);
  const float z = s * s;
  const float series = (((z * float(2.0 / 9) + float(2.0 / 7)) * z + float(2.0 / 5)) * z + float(2.0 / 3)) * z;
  return exponent * kLn2High + (s * 2.0f + (s * series + exponent * kLn2Low));
}

// Cosine and sine of units / 2^24 of a turn, for units from 0 to 2^24 - 1.
REALIGN_HOST_DEVICE REALIGN_INLINE NormalPair cos_sin_of_turn(int32_t units) {
  constexpr float kUnitAngle = float(2.0 * 3.141592653589793 / 16777216);
  const int32_t quarter = (units + (1 << 21)) >> 22;
  const float angle = float(units - (quarter << 22)) * kUnitAngle;
  const float z = angle * angle;
  const float sin =
      ((((z * float(1.0 / 362880) - float(1.0 / 5040)) * z + float(1.0 / 120)) * z - float(1.0 / 6)) * z) * angle +
      angle;
  const float cos = ((((z * float(-1.0 / 3628800) + float(1.0 / 40320)) * z - float(1.0 / 720)) * z +
                      float(1.0 / 24)) * z - 0.5f) * z + 1.0f;
  const uint32_t across = float_to_bits(quarter & 1 ? sin : cos);
  const uint32_t up = float_to_bits(quarter & 1 ? cos : sin);
  // Bit 1 of a quarter's number says that its sign is turned; moved to bit 31, it turns a float's.
  const uint32_t back = uint32_t((quarter + 1) & 2) << 30;
  const uint32_t down = uint32_t(quarter & 2) << 30;
  return {bits_to_float(across ^ back), bits_to_float(up ^ down)};
}

// Box-Muller.
REALIGN_HOST_DEVICE REALIGN_INLINE NormalPair normals_of_words(uint32_t radius_word, uint32_t turn_word) {
  const float radius = sqrtf(log_of_units(int32_t(radius_word >> 8) + 1) * -2.0f);
  const NormalPair turn = cos_sin_of_turn(int32_t(turn_word >> 8));
  return {radius * turn.cos, radius * turn.sin};
}

}  // namespace realign

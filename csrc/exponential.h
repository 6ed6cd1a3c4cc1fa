// Exponential and logarithm where attention and gates need them, in float, without a library call or a branch: loops
// over them vectorise.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace realign {

// exp(-x) for x from 0 to infinity, within 2 ulp; 0 where that is no normal float; a NaN stays a NaN.
//
// By Cody and Waite: -x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by a polynomial that is 1e-7 off at most, times 2^n.
REALIGN_INLINE float exp_of_minus(float x) {
  const float clamped = x > 100.0f ? 100.0f : x;
  const float shifted = clamped * -1.44269504088896341f + 0x1.8p23f;  // the sum rounds to a whole number
  const float n = shifted - 0x1.8p23f;
  const float r = (-clamped - n * 0.693359375f) - n * -2.12194440054690583e-4f;
  float series = 0.008312501944601536f;
  series = series * r + 0.041890330612659454f;
  series = series * r + 0.16667115688323975f;
  series = series * r + 0.499992311000824f;
  series = series * (r * r) + r + 1.0f;
  const int32_t exponent = int32_t(float_to_bits(shifted)) - (0x4b400000 - 127);
  return series * bits_to_float(uint32_t(exponent < 0 ? 0 : exponent) << 23);
}

// log(1 + x) for x from 0 to 1, within 3 ulp; a NaN stays a NaN. It is 2 artanh(s) for s = x / (2 + x), at most a
// third, of which eight terms of the series are 1e-9 off.
REALIGN_INLINE float log_of_one_plus(float x) {
  const float s = x / (2.0f + x), square = s * s;
  float series = 1.0f / 15;
  series = series * square + 1.0f / 13;
  series = series * square + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  return 2.0f * (s * (series * square) + s);
}

}  // namespace realign

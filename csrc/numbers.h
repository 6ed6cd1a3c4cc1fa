// Storage types of the tensors that csrc reads and writes, and their conversion to and from float.
//
// The conversions are plain integer arithmetic: they vectorise on any x86-64 and round to nearest even, as torch does.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define REALIGN_HOST_DEVICE __host__ __device__
#else
#define REALIGN_HOST_DEVICE
#endif

// For what is called by a function with REALIGN_VECTOR_WIDTHS: it must become part of it, or is compiled for the least
// width alone.
#ifdef __GNUC__
#define REALIGN_INLINE inline __attribute__((always_inline))
#else
#define REALIGN_INLINE inline
#endif

namespace realign {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

REALIGN_HOST_DEVICE inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

REALIGN_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

REALIGN_HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

REALIGN_HOST_DEVICE inline float bfloat16_to_float(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

REALIGN_HOST_DEVICE inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(is_nan ? 0x7fc0u : rounded);
}

REALIGN_HOST_DEVICE inline float float16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(half & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, and normalises what was subnormal.
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return bits_to_float(sign | (magnitude >= 0x0f800000u ? special : finite));
}

REALIGN_HOST_DEVICE inline uint16_t float_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 a half's last bit is worth 2^-24, as that of a float in [0.5, 1): the addition rounds.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return uint16_t(sign | (magnitude >= 0x47800000u ? special : finite));
}

}  // namespace realign

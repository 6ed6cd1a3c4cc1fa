// Units of 8 neighbouring numbers: what a GPU thread loads and stores at once, 16 bytes at a time where they are aligned.
//
// Plain C++ but for the vector type, so that kernels written with it also run on the CPU, in tests.
#pragma once

#include "numbers.h"

#ifdef __CUDACC__
#define REALIGN_DEVICE __device__ __forceinline__
#define REALIGN_UNROLL _Pragma("unroll")
#else
#define REALIGN_DEVICE inline
#define REALIGN_UNROLL
#endif

namespace realign {

constexpr int kUnit = 8;

#ifdef __CUDACC__
using Vector = uint4;
#else
struct alignas(16) Vector {
  uint32_t x, y, z, w;
};
#endif

// A unit as it stands in memory.
template <Dtype kDtype>
struct RawUnit {
  static constexpr int kWords = kDtype == Dtype::float32 ? kUnit : kUnit / 2;
  uint32_t word[kWords];
};

// What is read once should not push out of the caches what is read again.
REALIGN_DEVICE Vector load_vector(const Vector* from) {
#ifdef __CUDA_ARCH__
  return __ldcs(from);
#else
  return *from;
#endif
}

// The first `count` numbers from `index` on; the others are 0. An aligned unit is whole, and its address divides by 16.
template <Dtype kDtype, bool kAligned>
REALIGN_DEVICE RawUnit<kDtype> load_unit(const void* array, int64_t index, int count) {
  RawUnit<kDtype> raw = {};
  if constexpr (kAligned) {
    const auto* from = reinterpret_cast<const Vector*>(static_cast<const char*>(array) + index * size_of(kDtype));
    REALIGN_UNROLL
    for (int i = 0; i < raw.kWords / 4; ++i) {
      const Vector vector = load_vector(from + i);
      raw.word[4 * i] = vector.x, raw.word[4 * i + 1] = vector.y;
      raw.word[4 * i + 2] = vector.z, raw.word[4 * i + 3] = vector.w;
    }
  } else if constexpr (kDtype == Dtype::float32) {
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) {
      if (i < count) raw.word[i] = static_cast<const uint32_t*>(array)[index + i];
    }
  } else {
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) {
      if (i < count) raw.word[i / 2] |= uint32_t(static_cast<const uint16_t*>(array)[index + i]) << (i % 2 * 16);
    }
  }
  return raw;
}

template <Dtype kDtype, bool kAligned>
REALIGN_DEVICE void store_unit(const RawUnit<kDtype>& raw, void* array, int64_t index, int count) {
  if constexpr (kAligned) {
    auto* to = reinterpret_cast<Vector*>(static_cast<char*>(array) + index * size_of(kDtype));
    REALIGN_UNROLL
    for (int i = 0; i < raw.kWords / 4; ++i) {
      to[i] = Vector{raw.word[4 * i], raw.word[4 * i + 1], raw.word[4 * i + 2], raw.word[4 * i + 3]};
    }
  } else if constexpr (kDtype == Dtype::float32) {
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) {
      if (i < count) static_cast<uint32_t*>(array)[index + i] = raw.word[i];
    }
  } else {
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) {
      if (i < count) static_cast<uint16_t*>(array)[index + i] = uint16_t(raw.word[i / 2] >> (i % 2 * 16));
    }
  }
}

template <Dtype kDtype>
REALIGN_DEVICE void widen_unit(const RawUnit<kDtype>& raw, float (&out)[kUnit]) {
  REALIGN_UNROLL
  for (int i = 0; i < kUnit; ++i) {
    if constexpr (kDtype == Dtype::float32) {
      out[i] = bits_to_float(raw.word[i]);
    } else {
      const uint16_t half = uint16_t(raw.word[i / 2] >> (i % 2 * 16));
      out[i] = kDtype == Dtype::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half);
    }
  }
}

template <Dtype kDtype>
REALIGN_DEVICE RawUnit<kDtype> narrow_unit(const float (&number)[kUnit]) {
  RawUnit<kDtype> raw = {};
  REALIGN_UNROLL
  for (int i = 0; i < kUnit; ++i) {
    if constexpr (kDtype == Dtype::float32) {
      raw.word[i] = float_to_bits(number[i]);
    } else {
      const uint16_t half =
          kDtype == Dtype::bfloat16 ? float_to_bfloat16(number[i]) : float_to_float16(number[i]);
      raw.word[i / 2] |= uint32_t(half) << (i % 2 * 16);
    }
  }
  return raw;
}

// A unit whose type is known only at run time; a 16-bit type fills the first half.
using AnyUnit = RawUnit<Dtype::float32>;

REALIGN_DEVICE AnyUnit put_any(const RawUnit<Dtype::float32>& raw) { return raw; }

template <Dtype kDtype>
REALIGN_DEVICE AnyUnit put_any(const RawUnit<kDtype>& raw) {
  return {{raw.word[0], raw.word[1], raw.word[2], raw.word[3], 0, 0, 0, 0}};
}

template <Dtype kDtype>
REALIGN_DEVICE RawUnit<kDtype> take_any(const AnyUnit& any) {
  RawUnit<kDtype> raw;
  REALIGN_UNROLL
  for (int i = 0; i < raw.kWords; ++i) raw.word[i] = any.word[i];
  return raw;
}

template <bool kAligned>
REALIGN_DEVICE AnyUnit load_any(Dtype dtype, const void* array, int64_t index, int count) {
  // The 16-bit types are loaded alike.
  if (dtype == Dtype::float32) return load_unit<Dtype::float32, kAligned>(array, index, count);
  return put_any(load_unit<Dtype::bfloat16, kAligned>(array, index, count));
}

template <bool kAligned>
REALIGN_DEVICE void store_any(Dtype dtype, const AnyUnit& any, void* array, int64_t index, int count) {
  if (dtype == Dtype::float32) {
    store_unit<Dtype::float32, kAligned>(any, array, index, count);
  } else {
    store_unit<Dtype::bfloat16, kAligned>(take_any<Dtype::bfloat16>(any), array, index, count);
  }
}

REALIGN_DEVICE void widen_any(Dtype dtype, const AnyUnit& any, float (&out)[kUnit]) {
  if (dtype == Dtype::float32) {
    widen_unit(any, out);
  } else if (dtype == Dtype::bfloat16) {
    widen_unit(take_any<Dtype::bfloat16>(any), out);
  } else {
    widen_unit(take_any<Dtype::float16>(any), out);
  }
}

REALIGN_DEVICE AnyUnit narrow_any(Dtype dtype, const float (&number)[kUnit]) {
  if (dtype == Dtype::float32) return narrow_unit<Dtype::float32>(number);
  if (dtype == Dtype::bfloat16) return put_any(narrow_unit<Dtype::bfloat16>(number));
  return put_any(narrow_unit<Dtype::float16>(number));
}

}  // namespace realign

#include "rows.h"

#include <cstring>

// One copy of each function per vector width; the loader picks. Only GCC with glibc on x86-64 has this reliably.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define REALIGN_VECTOR_WIDTHS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define REALIGN_VECTOR_WIDTHS
#endif

namespace realign {

REALIGN_VECTOR_WIDTHS
void widen(const void* from, Dtype dtype, float* out, int64_t count) {
  const auto* half = static_cast<const uint16_t*>(from);
  if (dtype == Dtype::float32) {
    std::memcpy(out, from, count * sizeof(float));
  } else if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(half[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = float16_to_float(half[i]);
  }
}

REALIGN_VECTOR_WIDTHS
void narrow(const float* from, Dtype dtype, void* out, int64_t count) {
  auto* half = static_cast<uint16_t*>(out);
  if (dtype == Dtype::float32) {
    std::memcpy(out, from, count * sizeof(float));
  } else if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_float16(from[i]);
  }
}

REALIGN_VECTOR_WIDTHS
void extrapolate(const float* base, const float* toward, float scale, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = base[i] + scale * (toward[i] - base[i]);
}

REALIGN_VECTOR_WIDTHS
void multiply(float* x, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

REALIGN_VECTOR_WIDTHS
double sum_squares(const float* x, int64_t count) {
  constexpr int kLanes = 16;
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lane[j] += double(x[i + j]) * double(x[i + j]);
  }
  for (int j = 0; i < count; ++i, ++j) lane[j] += double(x[i]) * double(x[i]);
  double total = 0;
  for (int j = 0; j < kLanes; ++j) total += lane[j];
  return total;
}

REALIGN_VECTOR_WIDTHS
void step(const float* x, const float* v, const float* noise, float a, float b, float std, float* out, int64_t count) {
  if (noise == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = a * x[i] + b * v[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = (a * x[i] + b * v[i]) + std * noise[i];
  }
}

}  // namespace realign

#include "rows.h"

#include <cstring>

#include "vector_widths.h"
#include "vectors.h"

namespace realign {
namespace {

// The sum of the squares of number_at(i) for i below count, over sixteen lanes, so that no addition waits for the last.
template <typename NumberAt>
REALIGN_INLINE double sum_squares_of(NumberAt number_at, int64_t count) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lane[j] += double(number_at(i + j)) * double(number_at(i + j));
  }
  for (int j = 0; i < count; ++i, ++j) lane[j] += double(number_at(i)) * double(number_at(i));
  double total = 0;
  for (int j = 0; j < kLanes; ++j) total += lane[j];
  return total;
}

// Of one number or of many.
template <typename Number>
REALIGN_INLINE void guide_number(const Number& v, const Number& t, const Number* image, const Guide& guide,
                                 Number& guided) {
  guided = t + guide.text_scale * (v - t);
  if (image != nullptr) guided = *image + guide.image_scale * (guided - *image);
}

template <Dtype kDtype, bool kHasImage>
REALIGN_INLINE NormSquares guide_with(const Branches& branches, const Guide& guide, float* guided, int64_t count) {
  constexpr int kUnroll = 2;
  Floats cond_lanes[kUnroll] = {}, guided_lanes[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
    for (int k = 0; k < kUnroll; ++k) {
      Floats v, t, u, g;
      load<kDtype>(branches.cond, i + k * kLanes, v);
      load<kDtype>(branches.text, i + k * kLanes, t);
      if constexpr (kHasImage) load<kDtype>(branches.image, i + k * kLanes, u);
      guide_number(v, t, kHasImage ? &u : nullptr, guide, g);
      *reinterpret_cast<Floats*>(guided + i + k * kLanes) = g;
      cond_lanes[k] += v * v;
      guided_lanes[k] += g * g;
    }
  }
  NormSquares squares;
  const Floats cond_sums = cond_lanes[0] + cond_lanes[1], guided_sums = guided_lanes[0] + guided_lanes[1];
  for (int j = 0; j < kLanes; ++j) {
    squares.cond += cond_sums[j];
    squares.guided += guided_sums[j];
  }
  for (; i < count; ++i) {
    const float v = load<kDtype>(branches.cond, i), t = load<kDtype>(branches.text, i);
    const float u = kHasImage ? load<kDtype>(branches.image, i) : 0;
    guide_number(v, t, kHasImage ? &u : nullptr, guide, guided[i]);
    squares.cond += double(v) * double(v);
    squares.guided += double(guided[i]) * double(guided[i]);
  }
  return squares;
}

template <Dtype kDtype>
REALIGN_INLINE NormSquares guide_as(const Branches& branches, const Guide& guide, float* guided, int64_t count) {
  return branches.image == nullptr ? guide_with<kDtype, false>(branches, guide, guided, count)
                                   : guide_with<kDtype, true>(branches, guide, guided, count);
}

}  // namespace

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
void multiply(const float* x, float factor, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor;
}

REALIGN_VECTOR_WIDTHS
double sum_squares(const float* x, int64_t count) {
  return sum_squares_of([=](int64_t i) { return x[i]; }, count);
}

REALIGN_VECTOR_WIDTHS
NormSquares guide_and_measure(const Branches& branches, const Guide& guide, float* guided, int64_t count) {
  if (branches.dtype == Dtype::float32) return guide_as<Dtype::float32>(branches, guide, guided, count);
  if (branches.dtype == Dtype::bfloat16) return guide_as<Dtype::bfloat16>(branches, guide, guided, count);
  return guide_as<Dtype::float16>(branches, guide, guided, count);
}

REALIGN_VECTOR_WIDTHS
void step(const StepInputs& inputs, const StepCoefficients& coefficients, float* next, int64_t count) {
  const float *x = inputs.x, *v = inputs.v.numbers, *noise = inputs.noise;
  const float factor = inputs.v.factor;
  const float a = coefficients.a, b = coefficients.b, std = coefficients.std;
  if (noise == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) next[i] = a * x[i] + b * (v[i] * factor);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) next[i] = (a * x[i] + b * (v[i] * factor)) + std * noise[i];
  }
}

REALIGN_VECTOR_WIDTHS
double sum_squared_errors(const float* next, const float* x, const float* v, float a, float b, int64_t count) {
  return sum_squares_of([=](int64_t i) { return next[i] - (a * x[i] + b * v[i]); }, count);
}

REALIGN_VECTOR_WIDTHS
double sum_squared_changes(const float* v, const float* old, float b, int64_t count) {
  return sum_squares_of([=](int64_t i) { return b * (v[i] - old[i]); }, count);
}

}  // namespace realign

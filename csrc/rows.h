// Arithmetic on short runs of numbers ("rows"), in float: what the CPU path of an op is made of.
//
// Results are the same on every machine: no contraction into fused multiply-adds (the build says so), and sums run over
// a fixed number of lanes, added in a fixed order, whatever the width of the vector unit.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace realign {

// out = from, widened to float.
void widen(const void* from, Dtype dtype, float* out, int64_t count);

// out = from, rounded to dtype.
void narrow(const float* from, Dtype dtype, void* out, int64_t count);

// out = base + scale * (toward - base). out may be one of the inputs.
void extrapolate(const float* base, const float* toward, float scale, float* out, int64_t count);

// x = x * factor.
void multiply(float* x, float factor, int64_t count);

// Sum of squares, in double.
double sum_squares(const float* x, int64_t count);

// out = (a * x + b * v) + std * noise; noise may be null. out may be one of the inputs.
void step(const float* x, const float* v, const float* noise, float a, float b, float std, float* out, int64_t count);

}  // namespace realign

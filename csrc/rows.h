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

// out = x * factor. out may be x.
void multiply(const float* x, float factor, float* out, int64_t count);

// Sum of squares, in double.
double sum_squares(const float* x, int64_t count);

// Velocities of the branches of a sample: arrays of one dtype; no image is null.
struct Branches {
  const void* cond;
  const void* text;
  const void* image;
  Dtype dtype;
};

// Sums of squares of two velocities, in double.
struct NormSquares {
  double cond = 0, guided = 0;
};

// How far along each branch.
struct Guide {
  float text_scale, image_scale;
};

// guided = text + text_scale * (cond - text), then image + image_scale * (guided - image). Returns the sums of squares,
// in float along 32 lanes, in double across them.
NormSquares guide_and_measure(const Branches& branches, const Guide& guide, float* guided, int64_t count);

// A velocity that is still to be multiplied by a factor.
struct ScaledVelocity {
  const float* numbers;
  float factor;
};

// What a step starts from; noise may be null.
struct StepInputs {
  const float* x;
  ScaledVelocity v;
  const float* noise;
};

struct StepCoefficients {
  float a, b, std;
};

// next = (a * x + b * v) + std * noise. next may be one of the inputs.
void step(const StepInputs& inputs, const StepCoefficients& coefficients, float* next, int64_t count);

// Sum of the squares of next - (a * x + b * v), in double.
double sum_squared_errors(const float* next, const float* x, const float* v, float a, float b, int64_t count);

// Sum of the squares of b * (v - old), in double.
double sum_squared_changes(const float* v, const float* old, float b, int64_t count);

}  // namespace realign

// RMS norm of tokens of two experts, with the residual added first, and its gradients: the CPU path. The formula is in
// realign_kernels/mot_norm/api.py.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace realign {

// Addresses of contiguous arrays [num_rows, width], but for weights [width], expert [num_rows] and scale [num_rows].
// Weights are floats that `dtype`, that of the sum and of the normed rows, can hold.
struct MotNormParams {
  int64_t num_rows = 0;
  int64_t width = 0;
  int num_threads = 1;
  float eps = 0;
  Dtype dtype = Dtype::float32;
  const float* und = nullptr;
  const float* gen = nullptr;         // null: one expert
  const int32_t* expert = nullptr;    // null: all rows are understanding's

  // Forward.
  Dtype hidden_dtype = Dtype::float32;
  Dtype residual_dtype = Dtype::float32;
  const void* hidden = nullptr;
  const void* residual = nullptr;     // null: the sum is hidden itself
  void* normed = nullptr;
  void* total = nullptr;              // the sum; null without a residual
  float* scale = nullptr;             // 1 / sqrt(mean(x^2) + eps); backward reads it

  // Backward; x is the sum.
  const void* x = nullptr;
  const void* grad_normed = nullptr;
  const void* grad_total = nullptr;   // null: none
  void* grad_x = nullptr;
  float* grad_weights = nullptr;      // [1 or 2, width]
};

// A row's bits follow from the row alone; the weights' gradients do not depend on num_threads.
void mot_norm(const MotNormParams& params);
void mot_norm_backward(const MotNormParams& params);

}  // namespace realign

// Log-prob of a stored step under a velocity, per sample: the CPU path.
//
// The formula is in realign_kernels/sde_logprob/api.py. From the numbers of a step it gives the bits that
// guided_flow_step gave.
#pragma once

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace realign {

// Addresses of contiguous arrays: [num_tokens, num_channels] for the fields, float [num_samples] for the numbers.
struct LogProbParams {
  int64_t num_channels = 0;
  int64_t num_samples = 0;
  int num_threads = 1;
  Dtype sample_dtype = Dtype::float32;    // of sample and next_sample
  Dtype velocity_dtype = Dtype::float32;
  Dtype old_velocity_dtype = Dtype::float32;
  bool reduce_sum = false;

  const int32_t* cu_seqlens = nullptr;  // [num_samples + 1]
  const void* sample = nullptr;
  const void* velocity = nullptr;
  const void* next_sample = nullptr;
  const float* a = nullptr;
  const float* b = nullptr;
  const float* weight = nullptr;
  const float* constant = nullptr;
  float* logprob = nullptr;

  const void* old_velocity = nullptr;
  const float* bias_weight = nullptr;
  float* bias = nullptr;  // null: none is computed
};

void sde_logprob(const LogProbParams& params);

// Sum or mean over count numbers; of none it is 0.
inline float reduce(double total, int64_t count, bool reduce_sum) {
  return float(reduce_sum ? total : total / double(std::max<int64_t>(count, 1)));
}

inline float gaussian_logprob(float weight, float constant, float reduced_squares) {
  return constant - weight * reduced_squares;
}

}  // namespace realign

// Guidance, per-sample renorm and sampler step on packed samples: the CPU path.
//
// The formulas are in realign_kernels/guided_velocity/api.py and realign_kernels/flow_step/api.py.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace realign {

enum class Renorm : int { none = 0, global = 1, channel = 2, text_channel = 3 };

// Addresses of contiguous arrays: [num_tokens, num_channels] for the fields, [num_samples] for the numbers.
// Null sample: the result is the guided velocity. Null text_scale: the velocity is not guided. Null std: no noise.
// Null logprob: none is computed.
struct FlowParams {
  int64_t num_channels = 0;
  int64_t num_samples = 0;
  int num_threads = 1;
  Dtype velocity_dtype = Dtype::float32;
  Dtype sample_dtype = Dtype::float32;
  Dtype out_dtype = Dtype::float32;

  const int32_t* cu_seqlens = nullptr;  // [num_samples + 1]
  void* out = nullptr;

  const void* cond = nullptr;
  const void* text_uncond = nullptr;
  const void* image_uncond = nullptr;
  const float* text_scale = nullptr;
  const float* image_scale = nullptr;
  const float* renorm_min = nullptr;
  const int32_t* renorm = nullptr;  // Renorm of each sample; null: common_renorm
  int common_renorm = 0;

  const void* sample = nullptr;
  const float* a = nullptr;
  const float* b = nullptr;
  const float* std = nullptr;
  const void* noise = nullptr;          // in sample_dtype; or null and made inside from the next two
  const int64_t* noise_key = nullptr;
  const int64_t* noise_step = nullptr;

  const float* logprob_weight = nullptr;
  const float* logprob_constant = nullptr;
  float* logprob = nullptr;  // [num_samples]
  bool reduce_sum = false;   // the log-prob is of the sum over a sample's numbers, not of their mean
};

// A sample's result depends on that sample alone, bit for bit: not on its neighbours, nor on num_threads.
void guided_flow_step(const FlowParams& params);

}  // namespace realign

// Guidance, per-sample renorm and sampler step on packed samples: the CPU path.
//
// The formulas are in realign_kernels/guided_velocity/api.py and realign_kernels/flow_step/api.py.
#pragma once

#include <cstdint>
#include <vector>

#include "numbers.h"

namespace realign {

enum class Renorm : int { none = 0, global = 1, channel = 2, text_channel = 3 };

// Addresses of contiguous arrays: [num_tokens, num_channels] for the fields, float [num_samples] for the numbers.
// Null sample: the result is the guided velocity, in velocity_dtype. Null text_scale: the velocity is not guided.
struct FlowParams {
  int64_t num_tokens = 0;
  int64_t num_channels = 0;
  int64_t num_samples = 0;
  int num_threads = 1;
  Dtype velocity_dtype = Dtype::float32;
  Dtype sample_dtype = Dtype::float32;

  const int32_t* cu_seqlens = nullptr;  // [num_samples + 1]
  void* out = nullptr;

  const void* cond = nullptr;
  const void* text_uncond = nullptr;
  const void* image_uncond = nullptr;
  const float* text_scale = nullptr;
  const float* image_scale = nullptr;
  const float* renorm_min = nullptr;
  std::vector<int> renorm;  // Renorm of each sample

  const void* sample = nullptr;
  const void* noise = nullptr;
  const float* a = nullptr;
  const float* b = nullptr;
  const float* std = nullptr;
};

// A sample's result depends on that sample alone, bit for bit: not on its neighbours, nor on num_threads.
void guided_flow_step(const FlowParams& params);

}  // namespace realign

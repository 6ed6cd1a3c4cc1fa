// Guidance, per-sample renorm and sampler step on packed samples, in one launch on a GPU with thread-block clusters.
//
// The formulas are in realign_kernels/guided_velocity/api.py and realign_kernels/flow_step/api.py.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace realign {

// Device addresses of contiguous arrays: [tokens, num_channels] for the fields, [num_samples] for the numbers.
struct ClusterStepParams {
  int num_samples = 0;
  int num_channels = 0;
  int max_tokens = 0;  // of one sample, as far as is known: what more a sample has is read twice
  int device = 0;
  Dtype velocity_dtype = Dtype::float32;
  Dtype sample_dtype = Dtype::float32;
  int common_renorm = 0;  // of all samples, where `renorm` is null
  bool reduce_sum = false;
  int kept_units = 0;  // filled in by the launcher

  const int32_t* cu_seqlens = nullptr;  // [num_samples + 1]
  const void* cond = nullptr;
  const void* text_uncond = nullptr;   // null: no sample is guided
  const void* image_uncond = nullptr;  // may be null
  const float* text_scale = nullptr;
  const float* image_scale = nullptr;  // null: 1 for all
  const int32_t* renorm = nullptr;     // indexes into RENORMS of arguments.py
  const float* renorm_min = nullptr;   // null: 0 for all

  const void* sample = nullptr;
  const float* a = nullptr;
  const float* b = nullptr;
  const float* std = nullptr;           // null: no noise
  const void* noise = nullptr;          // in sample_dtype; or null, and
  const int64_t* noise_key = nullptr;   // the words of a Philox key
  const int64_t* noise_step = nullptr;  // word 1 of its counter
  void* out = nullptr;

  const float* logprob_weight = nullptr;  // null: no log-prob is wanted
  const float* logprob_constant = nullptr;
  float* logprob = nullptr;
};

}  // namespace realign

// Puts the step on a stream, a cudaStream_t as an integer. cluster_size is 1, 2, 4, 8 or 16 blocks, or 0 for the
// launcher's choice; the result is the same bits. Returns null, or what went wrong. No device is needed to load this.
extern "C" const char* realign_guided_flow_step_cuda(const realign::ClusterStepParams* params, int cluster_size,
                                                     uint64_t stream);

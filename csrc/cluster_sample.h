// What one sample of the guided step asks for, and how a cluster shares it out: slices of whole tokens, cut by the
// sample's own length alone, and units of 8 numbers within one token.
#pragma once

#include <initializer_list>

#include "cluster_plan.h"
#include "cluster_sums.h"
#include "guided_flow_step_cuda.h"

namespace realign {

constexpr int kSquaresPerUnit = 4;

enum ClusterRenorm { kNone = 0, kGlobal = 1, kChannel = 2, kTextChannel = 3 };  // RENORMS of arguments.py
enum ClusterSum { kCond = 0, kGuided = 1, kError = 2 };

struct alignas(8) Squares {
  float cond, guided;
};

// A block's shared memory. After it there is room for params.kept_units guided units of 8 floats, kept under the global
// renorm; under the renorms by token it holds squares of units, four times as many.
struct alignas(16) ClusterShared {
  ClusterSums sums;

  REALIGN_DEVICE Vector* velocities() { return reinterpret_cast<Vector*>(this + 1); }
  REALIGN_DEVICE Squares* squares() { return reinterpret_cast<Squares*>(this + 1); }
};

// Tokens of a sample that one block works on together.
struct Slice {
  int number;  // of kSlices
  int first_token;
  int num_units;
  int first_kept;  // place of its first unit in the block's shared memory
};

// Where a unit begins in the sample, and how many numbers it has: 8, or what is left of its token.
struct Place {
  int64_t first;
  int count;
};

// What one sample asks for.
struct ClusterSample {
  int64_t first_number = 0;  // in the packed arrays
  int num_tokens = 0;
  int token_units = 0;
  int slice_tokens = 0;
  int renorm = kNone;
  bool has_text = false, has_image = false;
  float text_scale = 1, image_scale = 1, renorm_min = 0;
  float a = 1, b = 0, std = 0;
  uint32_t key0 = 0, key1 = 0, step = 0;
};

REALIGN_DEVICE void load_guidance(const ClusterStepParams& params, int index, ClusterSample& sample) {
  if (params.text_uncond == nullptr) return;
  sample.text_scale = params.text_scale[index];
  sample.has_text = sample.text_scale > 1;
  if (!sample.has_text) return;
  sample.renorm = params.renorm == nullptr ? params.common_renorm : params.renorm[index];
  if (params.renorm_min != nullptr) sample.renorm_min = params.renorm_min[index];
  if (params.image_uncond == nullptr || params.image_scale == nullptr) return;
  sample.image_scale = params.image_scale[index];
  sample.has_image = sample.image_scale > 1;
}

REALIGN_DEVICE ClusterSample load_sample(const ClusterStepParams& params, int index) {
  ClusterSample sample;
  sample.first_number = int64_t(params.cu_seqlens[index]) * params.num_channels;
  sample.num_tokens = params.cu_seqlens[index + 1] - params.cu_seqlens[index];
  sample.token_units = (params.num_channels + kUnit - 1) / kUnit;
  sample.slice_tokens = (sample.num_tokens + kSlices - 1) / kSlices;
  load_guidance(params, index, sample);
  sample.a = params.a[index];
  sample.b = params.b[index];
  if (params.std != nullptr) sample.std = params.std[index];
  if (params.noise_key != nullptr) {
    sample.key0 = uint32_t(params.noise_key[index]);
    sample.key1 = uint32_t(uint64_t(params.noise_key[index]) >> 32);
    sample.step = uint32_t(params.noise_step[index]);
  }
  return sample;
}

REALIGN_DEVICE float shrink_factor(const Squares& squares, float floor) {
  const float factor = sqrtf(squares.cond) / (sqrtf(squares.guided) + 1e-8f);
  // Comparisons, not fminf: a NaN stays a NaN.
  const float raised = factor < floor ? floor : factor;
  return raised > 1 ? 1.0f : raised;
}

REALIGN_DEVICE float sum_squares(const float (&number)[kUnit]) {
  float sum = 0;
  REALIGN_UNROLL
  for (int i = 0; i < kUnit; ++i) sum += number[i] * number[i];
  return sum;
}

// What the launch must have room for.
inline ClusterDemand find_demand(const ClusterStepParams& params) {
  const int64_t token_units = (params.num_channels + kUnit - 1) / kUnit;
  const int64_t slice_units = (int64_t(params.max_tokens) + kSlices - 1) / kSlices * token_units;
  return {params.num_samples, slice_units, kSlices, kUnit * int64_t(sizeof(float)), int64_t(sizeof(ClusterShared))};
}

// Whether every unit is whole and can be loaded and stored 16 bytes at a time.
inline bool is_aligned(const ClusterStepParams& params) {
  uintptr_t bits = 0;
  for (const void* array : {params.cond, params.text_uncond, params.image_uncond, params.sample, params.noise,
                            static_cast<const void*>(params.out)}) {
    bits |= reinterpret_cast<uintptr_t>(array);
  }
  return params.num_channels % kUnit == 0 && bits % sizeof(Vector) == 0;
}

}  // namespace realign

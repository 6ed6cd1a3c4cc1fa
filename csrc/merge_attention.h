// Attention to two sets of keys from attention to each: the CPU path. The formula is in
// realign_kernels/merge_attention/api.py.
#pragma once

#include <array>
#include <cstdint>

#include "numbers.h"

namespace realign {

// Addresses of arrays: out_a and out_b [tokens, heads, dim] with any strides but the last, which is 1; lse_a and lse_b
// [tokens, heads] with any strides; contiguous out [tokens, heads, dim] and lse [tokens, heads].
struct MergeAttentionParams {
  std::array<int64_t, 3> shape = {}, out_a_stride = {}, out_b_stride = {};
  std::array<int64_t, 2> lse_a_stride = {}, lse_b_stride = {};
  int num_threads = 1;
  Dtype dtype = Dtype::float32;
  const void* out_a = nullptr;
  const void* out_b = nullptr;
  const float* lse_a = nullptr;
  const float* lse_b = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
};

// A head's bits follow from its own inputs alone: not from other tokens, strides or num_threads.
void merge_attention(const MergeAttentionParams& params);

}  // namespace realign

// Attention of one query token per row to the first tokens of the row's slot: the CPU path. The formula is in
// realign_kernels/decode_attention/api.py.
#pragma once

#include <array>
#include <cstdint>

#include "numbers.h"

namespace realign {

// Addresses of arrays: query [rows, heads, dim], key and value [rows, key heads, tokens, dim] with any strides but the
// last, which is 1; length [rows], int32 or int64; contiguous out [rows, heads, dim] and lse [rows, heads].
struct DecodeAttentionParams {
  std::array<int64_t, 3> query_shape = {}, query_stride = {};
  std::array<int64_t, 4> key_shape = {}, key_stride = {}, value_stride = {};
  int num_threads = 1;
  bool has_long_lengths = false;
  Dtype dtype = Dtype::float32;
  const void* query = nullptr;
  const void* key = nullptr;
  const void* value = nullptr;
  const void* length = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
};

// A row's bits follow from its own query, keys, values and length alone: not from other rows, strides or num_threads.
void decode_attention(const DecodeAttentionParams& params);

}  // namespace realign

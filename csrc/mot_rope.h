// Norm of queries and keys by expert, their rotation, and the gradients: the CPU path. The formula is in
// realign_kernels/mot_rope/api.py.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace realign {

// Addresses of arrays: queries [num_tokens, num_query_heads, dim], keys alike, each with any stride between tokens;
// tables [num_tokens, dim / 2] and weights [dim], dense.
struct MotRopeParams {
  int64_t num_tokens = 0;
  int64_t dim = 0;
  int64_t num_query_heads = 0;
  int64_t num_key_heads = 0;
  int num_threads = 1;
  int64_t query_stride = 0;
  int64_t key_stride = 0;
  float eps = 0;
  Dtype dtype = Dtype::float32;
  const void* query = nullptr;
  const void* key = nullptr;
  const float* cos = nullptr;
  const float* sin = nullptr;
  const float* und_query = nullptr;  // null: no norm
  const float* gen_query = nullptr;  // null: one expert
  const float* und_key = nullptr;
  const float* gen_key = nullptr;
  const int32_t* expert = nullptr;   // [num_tokens]; null: all tokens are understanding's
  const int64_t* index = nullptr;    // [num_tokens], a token's row of the results; null: its own number
  const int64_t* slot = nullptr;     // the same of the keys; null: as the queries

  // Backward: gradients of queries and keys, dense. Forward: the results, keys with any strides between tokens and heads.
  void* query_out = nullptr;
  void* key_out = nullptr;
  int64_t key_out_stride = 0;
  int64_t key_out_head_stride = 0;

  // Backward: gradients of the results, dense; and of the weights [2, 1 or 2, dim], queries' first.
  const void* grad_query = nullptr;
  const void* grad_key = nullptr;
  float* grad_weights = nullptr;
};

// A token's bits follow from the token alone; the weights' gradients do not depend on num_threads.
void mot_rope(const MotRopeParams& params);
void mot_rope_backward(const MotRopeParams& params);

}  // namespace realign

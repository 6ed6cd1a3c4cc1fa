#include "merge_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "exponential.h"
#include "vector_widths.h"
#include "vectors.h"

namespace realign {
namespace {

constexpr int64_t kNumbersPerThread = 1 << 15;  // below this a second thread costs more than it saves
constexpr int64_t kBlockHeads = 256;            // whose weights are found together, or those of one token

int64_t block_tokens(const MergeAttentionParams& params) {
  return std::max<int64_t>(1, kBlockHeads / std::max<int64_t>(1, params.shape[1]));
}

// Of the heads of a block of tokens: what both sides are multiplied by. A side that weighs 0 is not read.
struct Weights {
  float *a, *b;
};

REALIGN_INLINE void gather(const float* lse, const std::array<int64_t, 2>& stride, int64_t begin, int64_t end,
                           int64_t num_heads, float* out) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t head = 0; head < num_heads; ++head) *out++ = lse[token * stride[0] + head * stride[1]];
  }
}

// Log-sum-exps of both sides to weights, in their places, and to those of both together.
REALIGN_INLINE void weigh(const Weights& weights, float* lse, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float a = weights.a[i], b = weights.b[i];
    const float highest = a > b ? a : b, lowest = a > b ? b : a;
    const float ratio = exp_of_minus(highest - lowest);  // of the lesser weight to the greater
    const float most = 1.0f / (1.0f + ratio), least = ratio * most;
    const bool is_empty = highest == -HUGE_VALF;
    weights.a[i] = is_empty ? 0.0f : a > b ? most : least;
    weights.b[i] = is_empty ? 0.0f : a > b ? least : most;
    lse[i] = is_empty ? -HUGE_VALF : highest + log_of_one_plus(ratio);
  }
}

template <Dtype kDtype>
REALIGN_INLINE void store(void* array, int64_t i, float number) {
  if constexpr (kDtype == Dtype::float32) static_cast<float*>(array)[i] = number;
  if constexpr (kDtype == Dtype::bfloat16) static_cast<uint16_t*>(array)[i] = float_to_bfloat16(number);
  if constexpr (kDtype == Dtype::float16) static_cast<uint16_t*>(array)[i] = float_to_float16(number);
}

template <Dtype kDtype>
REALIGN_INLINE void scale(const void* x, float weight, void* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store<kDtype>(out, i, load<kDtype>(x, i) * weight);
}

template <Dtype kDtype>
REALIGN_INLINE void add(const void* a, const void* b, float weight_a, float weight_b, void* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    store<kDtype>(out, i, load<kDtype>(a, i) * weight_a + load<kDtype>(b, i) * weight_b);
  }
}

template <Dtype kDtype>
REALIGN_INLINE void merge_head(const char* a, const char* b, float weight_a, float weight_b, char* out, int64_t dim) {
  if (weight_a != 0 && weight_b != 0) {
    add<kDtype>(a, b, weight_a, weight_b, out, dim);
  } else if (weight_a != 0) {
    scale<kDtype>(a, weight_a, out, dim);
  } else if (weight_b != 0) {
    scale<kDtype>(b, weight_b, out, dim);
  } else {
    std::fill(out, out + dim * size_of(kDtype), char(0));
  }
}

template <Dtype kDtype>
REALIGN_INLINE void merge_block(const MergeAttentionParams& params, int64_t begin, int64_t end, Weights weights) {
  const auto [num_tokens, num_heads, dim] = params.shape;
  constexpr int64_t kSize = kDtype == Dtype::float32 ? 4 : 2;
  gather(params.lse_a, params.lse_a_stride, begin, end, num_heads, weights.a);
  gather(params.lse_b, params.lse_b_stride, begin, end, num_heads, weights.b);
  weigh(weights, params.lse + begin * num_heads, (end - begin) * num_heads);
  char* out = static_cast<char*>(params.out) + begin * num_heads * dim * kSize;
  for (int64_t token = begin; token < end; ++token) {
    const char* a = static_cast<const char*>(params.out_a) + token * params.out_a_stride[0] * kSize;
    const char* b = static_cast<const char*>(params.out_b) + token * params.out_b_stride[0] * kSize;
    for (int64_t head = 0; head < num_heads; ++head, out += dim * kSize) {
      merge_head<kDtype>(a, b, *weights.a++, *weights.b++, out, dim);
      a += params.out_a_stride[1] * kSize;
      b += params.out_b_stride[1] * kSize;
    }
  }
}

REALIGN_VECTOR_WIDTHS
void merge_tokens(const MergeAttentionParams& params, int64_t begin, int64_t end, const Weights& weights) {
  if (params.dtype == Dtype::float32) merge_block<Dtype::float32>(params, begin, end, weights);
  if (params.dtype == Dtype::bfloat16) merge_block<Dtype::bfloat16>(params, begin, end, weights);
  if (params.dtype == Dtype::float16) merge_block<Dtype::float16>(params, begin, end, weights);
}

}  // namespace

void merge_attention(const MergeAttentionParams& params) {
  const auto [num_tokens, num_heads, dim] = params.shape;
  const int64_t num_numbers = num_tokens * num_heads * dim, block = block_tokens(params);
  const int num_threads = int(std::min<int64_t>(params.num_threads, 1 + num_numbers / kNumbersPerThread));
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    std::unique_ptr<float[]> memory(new float[2 * block * params.shape[1]]);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < params.shape[0]; begin += block) {
      const int64_t end = std::min(begin + block, params.shape[0]);
      merge_tokens(params, begin, end, {memory.get(), memory.get() + block * params.shape[1]});
    }
  }
}

}  // namespace realign

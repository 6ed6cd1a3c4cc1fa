#include "mot_rope.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "rows.h"
#include "vector_widths.h"

namespace realign {
namespace {

constexpr int64_t kNumbersPerThread = 1 << 15;  // below this a second thread costs more than it saves
constexpr int64_t kChunkTokens = 64;            // whose share of the weights' gradients is summed first

inline __attribute__((always_inline)) float scale_of(const float* x, float eps, int64_t dim) {
  return 1.0f / std::sqrt(float(sum_products(x, x, dim) / double(dim)) + eps);
}

// One head: normed by the weight if there is one, and turned.
REALIGN_VECTOR_WIDTHS
void turn(const float* x, const float* weight, float eps, const float* cos, const float* sin, float* out, int64_t dim) {
  const int64_t half = dim / 2;
  if (weight == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float first = x[i], second = x[half + i];
      out[i] = first * cos[i] - second * sin[i];
      out[half + i] = second * cos[i] + first * sin[i];
    }
    return;
  }
  const float scale = scale_of(x, eps, dim);
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i] * scale * weight[i], second = x[half + i] * scale * weight[half + i];
    out[i] = first * cos[i] - second * sin[i];
    out[half + i] = second * cos[i] + first * sin[i];
  }
}

// The gradient of one head: turned back, and through the norm as in mot_norm. `products` has room for a head.
REALIGN_VECTOR_WIDTHS
void turn_back(const float* grad, const float* x, const float* weight, float eps, const float* cos, const float* sin,
               float* sums, float* products, float* out, int64_t dim) {
  const int64_t half = dim / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = grad[i], second = grad[half + i];
    out[i] = first * cos[i] + second * sin[i];
    out[half + i] = second * cos[i] - first * sin[i];
  }
  if (weight == nullptr) return;
  const float scale = scale_of(x, eps, dim);
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) {
    products[i] = out[i] * (x[i] * scale);
    sums[i] += products[i];
  }
  const float along = float(sum_products(products, weight, dim) / double(dim));
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) out[i] = (out[i] * weight[i] - x[i] * scale * along) * scale;
}

template <typename Address>
Address numbers_at(Address array, Dtype dtype, int64_t index) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Address>>, const char, char>;
  return static_cast<Byte*>(array) + index * size_of(dtype);
}

// A token's heads as floats: the array itself where it holds floats, else a widened copy.
const float* read(const void* array, Dtype dtype, int64_t first, int64_t count, float* buffer) {
  const void* from = numbers_at(array, dtype, first);
  if (dtype == Dtype::float32) return static_cast<const float*>(from);
  widen(from, dtype, buffer, count);
  return buffer;
}

// Queries or keys.
struct Side {
  int64_t num_heads;
  const void* heads;
  int64_t stride;
  const float* und;
  const float* gen;
  const int64_t* row;  // of out, or in backward of grad
  void* out;
  int64_t out_stride;
  int64_t out_head_stride;
  const void* grad;
};

Side query_side(const MotRopeParams& params) {
  const int64_t heads = params.num_query_heads;
  return {heads,
          params.query,
          params.query_stride,
          params.und_query,
          params.gen_query,
          params.index,
          params.query_out,
          heads * params.dim,
          params.dim,
          params.grad_query};
}

Side key_side(const MotRopeParams& params) {
  return {params.num_key_heads,
          params.key,
          params.key_stride,
          params.und_key,
          params.gen_key,
          params.slot == nullptr ? params.index : params.slot,
          params.key_out,
          params.key_out_stride,
          params.key_out_head_stride,
          params.grad_key};
}

const float* weight_of(const MotRopeParams& params, const Side& side, int64_t token) {
  return params.expert != nullptr && params.expert[token] == 1 ? side.gen : side.und;
}

void forward_token(const MotRopeParams& params, const Side& side, int64_t token, float* buffers) {
  const int64_t dim = params.dim, count = side.num_heads * dim;
  const float* x = read(side.heads, params.dtype, token * side.stride, count, buffers);
  const float* weight = weight_of(params, side, token);
  const float *cos = params.cos + token * dim / 2, *sin = params.sin + token * dim / 2;
  const int64_t row = side.row == nullptr ? token : side.row[token];
  for (int64_t head = 0; head < side.num_heads; ++head) {
    void* out = numbers_at(side.out, params.dtype, row * side.out_stride + head * side.out_head_stride);
    if (params.dtype == Dtype::float32) {
      turn(x + head * dim, weight, params.eps, cos, sin, static_cast<float*>(out), dim);
    } else {
      turn(x + head * dim, weight, params.eps, cos, sin, buffers + count, dim);
      narrow(buffers + count, params.dtype, out, dim);
    }
  }
}

void backward_token(const MotRopeParams& params, const Side& side, int64_t token, float* sums, float* buffers) {
  const int64_t dim = params.dim, count = side.num_heads * dim;
  const bool is_float = params.dtype == Dtype::float32;
  const int64_t row = side.row == nullptr ? token : side.row[token];
  const float* x = read(side.heads, params.dtype, token * side.stride, count, buffers);
  const float* grad = read(side.grad, params.dtype, row * count, count, buffers + count);
  const float* weight = weight_of(params, side, token);
  const float *cos = params.cos + token * dim / 2, *sin = params.sin + token * dim / 2;
  void* grad_heads = numbers_at(side.out, params.dtype, token * count);
  float* out = is_float ? static_cast<float*>(grad_heads) : buffers + 2 * count;
  float* own = weight == side.und ? sums : sums + dim;
  float* products = buffers + 3 * count;
  for (int64_t i = 0; i < count; i += dim) {
    turn_back(grad + i, x + i, weight, params.eps, cos, sin, own, products, out + i, dim);
  }
  if (!is_float) narrow(out, params.dtype, grad_heads, count);
}

int threads_of(const MotRopeParams& params) {
  const int64_t count = params.num_tokens * (params.num_query_heads + params.num_key_heads) * params.dim;
  return int(std::min<int64_t>(params.num_threads, 1 + count / kNumbersPerThread));
}

// Room for the heads of a token, and more.
std::unique_ptr<float[]> make_buffers(const MotRopeParams& params, int64_t num_copies) {
  const int64_t num_heads = std::max(params.num_query_heads, params.num_key_heads);
  return std::unique_ptr<float[]>(new float[num_copies * num_heads * params.dim + params.dim]);
}

}  // namespace

void mot_rope(const MotRopeParams& params) {
  const int num_threads = threads_of(params);
  const Side query = query_side(params), key = key_side(params);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const auto buffers = make_buffers(params, 1);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < params.num_tokens; ++token) {
      forward_token(params, query, token, buffers.get());
      forward_token(params, key, token, buffers.get());
    }
  }
}

void mot_rope_backward(const MotRopeParams& params) {
  const int num_threads = threads_of(params);
  const Side query = query_side(params), key = key_side(params);
  const int64_t num_chunks = (params.num_tokens + kChunkTokens - 1) / kChunkTokens;
  const int64_t num_sums = query.und == nullptr ? 0 : 2 * params.dim * (query.gen == nullptr ? 1 : 2);
  std::vector<float> sums(num_chunks * num_sums, 0.0f);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const auto buffers = make_buffers(params, 3);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      float* own = sums.data() + chunk * num_sums;
      const int64_t end = std::min((chunk + 1) * kChunkTokens, params.num_tokens);
      for (int64_t token = chunk * kChunkTokens; token < end; ++token) {
        backward_token(params, query, token, own, buffers.get());
        backward_token(params, key, token, own + num_sums / 2, buffers.get());
      }
    }
  }
  sum_rows(sums.data(), num_chunks, num_sums, params.grad_weights);
}

}  // namespace realign

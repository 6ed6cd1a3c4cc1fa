#include "mot_norm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "lanes.h"
#include "rows.h"
#include "vector_widths.h"

namespace realign {
namespace {

constexpr int64_t kNumbersPerThread = 1 << 15;  // below this a second thread costs more than it saves
constexpr int64_t kChunkRows = 64;              // whose share of the weights' gradients is summed first

const void* row_of(const void* array, Dtype dtype, const MotNormParams& params, int64_t row) {
  return static_cast<const char*>(array) + row * params.width * size_of(dtype);
}

void* row_of(void* array, Dtype dtype, const MotNormParams& params, int64_t row) {
  return static_cast<char*>(array) + row * params.width * size_of(dtype);
}

// A row as floats: the array itself where it holds floats, else a widened copy.
const float* read(const void* array, Dtype dtype, const MotNormParams& params, int64_t row, float* buffer) {
  const void* from = row_of(array, dtype, params, row);
  if (dtype == Dtype::float32) return static_cast<const float*>(from);
  widen(from, dtype, buffer, params.width);
  return buffer;
}

const float* weight_of(const MotNormParams& params, int64_t row) {
  return params.expert != nullptr && params.expert[row] == 1 ? params.gen : params.und;
}

REALIGN_VECTOR_WIDTHS
void add(const float* a, const float* b, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

REALIGN_VECTOR_WIDTHS
float scale_of(const float* x, float eps, int64_t count) {
  return 1.0f / std::sqrt(float(sum_products(x, x, count) / double(count)) + eps);
}

REALIGN_VECTOR_WIDTHS
void scale_and_weigh(const float* x, float scale, const float* weight, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * scale * weight[i];
}

// out = (g w - y mean(g w y)) scale with y = x scale, and the products g y added to sums.
REALIGN_VECTOR_WIDTHS
void row_backward(const float* grad, const float* x, float scale, const float* weight, float* sums, float* products,
                  float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    products[i] = grad[i] * (x[i] * scale);
    sums[i] += products[i];
  }
  const float along = float(sum_products(products, weight, count) / double(count));
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = (grad[i] * weight[i] - x[i] * scale * along) * scale;
}

// The sum with the residual, rounded to the dtype as it is stored.
const float* add_residual(const MotNormParams& params, int64_t row, float* buffer, float* other) {
  const float* hidden = read(params.hidden, params.hidden_dtype, params, row, buffer);
  if (params.residual == nullptr) return hidden;
  const float* residual = read(params.residual, params.residual_dtype, params, row, other);
  void* total = row_of(params.total, params.dtype, params, row);
  if (params.dtype == Dtype::float32) {
    add(hidden, residual, static_cast<float*>(total), params.width);
    return static_cast<const float*>(total);
  }
  add(hidden, residual, buffer, params.width);
  narrow(buffer, params.dtype, total, params.width);
  widen(total, params.dtype, buffer, params.width);
  return buffer;
}

void forward_row(const MotNormParams& params, int64_t row, float* buffers) {
  float* other = buffers + params.width;
  const float* x = add_residual(params, row, buffers, other);
  const float scale = scale_of(x, params.eps, params.width);
  const float* weight = weight_of(params, row);
  void* normed = row_of(params.normed, params.dtype, params, row);
  params.scale[row] = scale;
  if (params.dtype == Dtype::float32) {
    scale_and_weigh(x, scale, weight, static_cast<float*>(normed), params.width);
    return;
  }
  multiply(x, scale, other, params.width);
  narrow(other, params.dtype, normed, params.width);
  widen(normed, params.dtype, other, params.width);
  scale_and_weigh(other, 1.0f, weight, other, params.width);
  narrow(other, params.dtype, normed, params.width);
}

void backward_row(const MotNormParams& params, int64_t row, float* sums, float* buffers) {
  const int64_t width = params.width;
  const bool is_float = params.dtype == Dtype::float32;
  const float* x = read(params.x, params.dtype, params, row, buffers);
  const float* grad = read(params.grad_normed, params.dtype, params, row, buffers + width);
  void* grad_x = row_of(params.grad_x, params.dtype, params, row);
  float* out = is_float ? static_cast<float*>(grad_x) : buffers + 2 * width;
  const float* weight = weight_of(params, row);
  float* own = weight == params.und ? sums : sums + width;
  row_backward(grad, x, params.scale[row], weight, own, buffers + 3 * width, out, width);
  if (params.grad_total != nullptr) {
    add(out, read(params.grad_total, params.dtype, params, row, buffers), out, width);
  }
  if (!is_float) narrow(out, params.dtype, grad_x, width);
}

int threads_of(const MotNormParams& params) {
  return int(std::min<int64_t>(params.num_threads, 1 + params.num_rows * params.width / kNumbersPerThread));
}

}  // namespace

void mot_norm(const MotNormParams& params) {
  const int num_threads = threads_of(params);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    std::unique_ptr<float[]> buffers(new float[2 * params.width]);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < params.num_rows; ++row) forward_row(params, row, buffers.get());
  }
}

void mot_norm_backward(const MotNormParams& params) {
  const int num_threads = threads_of(params);
  const int64_t num_chunks = (params.num_rows + kChunkRows - 1) / kChunkRows;
  const int64_t num_sums = params.width * (params.gen == nullptr ? 1 : 2);
  std::vector<float> sums(num_chunks * num_sums, 0.0f);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    std::unique_ptr<float[]> buffers(new float[4 * params.width]);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int64_t end = std::min((chunk + 1) * kChunkRows, params.num_rows);
      for (int64_t row = chunk * kChunkRows; row < end; ++row) {
        backward_row(params, row, sums.data() + chunk * num_sums, buffers.get());
      }
    }
  }
  sum_rows(sums.data(), num_chunks, num_sums, params.grad_weights);
}

}  // namespace realign

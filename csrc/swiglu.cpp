#include "swiglu.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "exponential.h"
#include "vector_widths.h"

namespace realign {
namespace {

constexpr int64_t kBlock = 1024;                // threads meet at multiples of this, whole cache lines
constexpr int64_t kNumbersPerThread = 1 << 15;  // below this a second thread costs more than it saves

// How a dtype is read and written; round(x) is read(write(x)), in fewer operations. A NaN that comes here has its low
// bits clear, as it comes from a stored number or from the arithmetic itself, and so stays one.
struct Float32 {
  using Number = float;
  static float read(float x) { return x; }
  static float write(float x) { return x; }
  static float round(float x) { return x; }
};
struct BFloat16 {
  using Number = uint16_t;
  static float read(uint16_t x) { return bfloat16_to_float(x); }
  static uint16_t write(float x) { return uint16_t(round_bits(x) >> 16); }
  static float round(float x) { return bits_to_float(round_bits(x) & 0xffff0000u); }
  static uint32_t round_bits(float x) {
    const uint32_t bits = float_to_bits(x);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
};
struct Float16 {
  using Number = uint16_t;
  static float read(uint16_t x) { return float16_to_float(x); }
  static uint16_t write(float x) { return float_to_float16(x); }
  static float round(float x) {
    const uint32_t sign = float_to_bits(x) & 0x80000000u, bits = float_to_bits(x) & 0x7fffffffu;
    const float normal = bits_to_float((bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu);
    const float magnitude = bits_to_float(bits);
    const float rounded = magnitude < 0x1p-14f ? (magnitude + 0.5f) - 0.5f : normal;  // subnormals: multiples of 2^-24
    return bits_to_float(float_to_bits(rounded > 65504.0f ? HUGE_VALF : rounded) | sign);
  }
};

// 1 / (1 + exp(-x)) within 3 ulp. With e = exp(-|x|) it is 1 / (1 + e), or e / (1 + e) for negative x.
inline float sigmoid_of(float x) {
  const float e = exp_of_minus(bits_to_float(float_to_bits(x) & 0x7fffffffu));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// Where both passes read and write: the parameters with the halves found, and the stride of the gradients' rows.
struct Rows : SwigluParams {
  int64_t grads_stride;
};

// Numbers of one row, from a column on; `dense` is where they lie in the dense arrays.
struct Run {
  int64_t row, column, count, dense;
};

inline __attribute__((always_inline)) Run find_run(int64_t width, int64_t begin, int64_t end) {
  const int64_t row = begin / width, column = begin - row * width;
  return {row, column, std::min(end - begin, width - column), begin};
}

template <typename Storage>
inline __attribute__((always_inline)) void forward_run(const Rows& rows, const Run& run) {
  using Number = typename Storage::Number;
  const Number* gate = static_cast<const Number*>(rows.gate) + run.row * rows.gate_stride + run.column;
  const Number* up = static_cast<const Number*>(rows.up) + run.row * rows.up_stride + run.column;
  Number* out = static_cast<Number*>(rows.out) + run.dense;
#pragma omp simd
  for (int64_t i = 0; i < run.count; ++i) {
    const float g = Storage::read(gate[i]);
    // The activation is rounded to the dtype before it weighs, as in the two steps of plain torch.
    const float silu = Storage::round(g * sigmoid_of(g));
    out[i] = Storage::write(silu * Storage::read(up[i]));
  }
}

template <typename Storage>
inline __attribute__((always_inline)) void backward_run(const Rows& rows, const Run& run) {
  using Number = typename Storage::Number;
  const Number* gate = static_cast<const Number*>(rows.gate) + run.row * rows.gate_stride + run.column;
  const Number* up = static_cast<const Number*>(rows.up) + run.row * rows.up_stride + run.column;
  const Number* grad = static_cast<const Number*>(rows.grad) + run.dense;
  Number* grad_gate = static_cast<Number*>(rows.grad_gate) + run.row * rows.grads_stride + run.column;
  Number* grad_up = static_cast<Number*>(rows.grad_up) + run.row * rows.grads_stride + run.column;
#pragma omp simd
  for (int64_t i = 0; i < run.count; ++i) {
    const float g = Storage::read(gate[i]), d = Storage::read(grad[i]);
    const float sigmoid = sigmoid_of(g);
    grad_gate[i] = Storage::write(d * Storage::read(up[i]) * (sigmoid * (1.0f + g * (1.0f - sigmoid))));
    grad_up[i] = Storage::write(d * (g * sigmoid));
  }
}

template <typename Storage>
inline __attribute__((always_inline)) void forward_range(const Rows& rows, int64_t begin, int64_t end) {
  for (Run run{0, 0, 0, begin}; run.dense < end; run.dense += run.count) {
    run = find_run(rows.width, run.dense, end);
    forward_run<Storage>(rows, run);
  }
}

template <typename Storage>
inline __attribute__((always_inline)) void backward_range(const Rows& rows, int64_t begin, int64_t end) {
  for (Run run{0, 0, 0, begin}; run.dense < end; run.dense += run.count) {
    run = find_run(rows.width, run.dense, end);
    backward_run<Storage>(rows, run);
  }
}

REALIGN_VECTOR_WIDTHS
void forward(const Rows& rows, int64_t begin, int64_t end) {
  if (rows.dtype == Dtype::float32) forward_range<Float32>(rows, begin, end);
  if (rows.dtype == Dtype::bfloat16) forward_range<BFloat16>(rows, begin, end);
  if (rows.dtype == Dtype::float16) forward_range<Float16>(rows, begin, end);
}

REALIGN_VECTOR_WIDTHS
void backward(const Rows& rows, int64_t begin, int64_t end) {
  if (rows.dtype == Dtype::float32) backward_range<Float32>(rows, begin, end);
  if (rows.dtype == Dtype::bfloat16) backward_range<BFloat16>(rows, begin, end);
  if (rows.dtype == Dtype::float16) backward_range<Float16>(rows, begin, end);
}

template <typename Address>
Address half_after(Address half, const SwigluParams& params) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Address>>, const char, char>;
  return static_cast<Byte*>(half) + params.width * size_of(params.dtype);
}

Rows find_rows(const SwigluParams& params) {
  Rows rows{params, params.width};
  if (params.up == nullptr) {
    rows.up = half_after(params.gate, params);
    rows.up_stride = params.gate_stride;
  }
  if (params.grad_gate != nullptr && params.grad_up == nullptr) {
    rows.grad_up = half_after(params.grad_gate, params);
    rows.grads_stride = 2 * params.width;
  }
  // Rows that follow each other everywhere are one: a loop is then as long as it can be.
  if (rows.gate_stride == rows.width && rows.up_stride == rows.width && rows.grads_stride == rows.width) {
    rows.width *= rows.num_rows;
    rows.num_rows = 1;
  }
  return rows;
}

// Equal parts of whole blocks for each thread.
template <typename Range>
void share(const Rows& rows, Range range) {
  const int64_t num_numbers = rows.num_rows * rows.width;
  const int64_t num_threads = std::min<int64_t>(rows.num_threads, 1 + num_numbers / kNumbersPerThread);
  const int64_t num_blocks = (num_numbers + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(int(num_threads)) if (num_threads > 1)
  for (int64_t part = 0; part < num_threads; ++part) {
    const int64_t begin = num_blocks * part / num_threads * kBlock;
    const int64_t end = num_blocks * (part + 1) / num_threads * kBlock;
    range(rows, begin, std::min(end, num_numbers));
  }
}

}  // namespace

void swiglu(const SwigluParams& params) { share(find_rows(params), forward); }

void swiglu_backward(const SwigluParams& params) { share(find_rows(params), backward); }

}  // namespace realign

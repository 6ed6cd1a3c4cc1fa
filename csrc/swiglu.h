// silu(gate) * up and its gradients: the CPU path. The formula is in realign_kernels/swiglu/api.py.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace realign {

// Addresses of rows of `width` numbers of one dtype. Rows of gate and of up may have any stride; without `up` they are
// the two halves of rows of 2 width numbers, at `gate`. Forward writes out; backward reads grad (of out) and writes
// grad_gate and grad_up, or without the latter both into rows of 2 width numbers. All these are dense.
struct SwigluParams {
  int64_t num_rows = 0;
  int64_t width = 0;
  int64_t gate_stride = 0;
  int64_t up_stride = 0;
  int num_threads = 1;
  Dtype dtype = Dtype::float32;
  const void* gate = nullptr;
  const void* up = nullptr;
  void* out = nullptr;
  const void* grad = nullptr;
  void* grad_gate = nullptr;
  void* grad_up = nullptr;
};

// An element's bits follow from its own inputs alone: not from its neighbours or place, nor from num_threads.
void swiglu(const SwigluParams& params);
void swiglu_backward(const SwigluParams& params);

}  // namespace realign

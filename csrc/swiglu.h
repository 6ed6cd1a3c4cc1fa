// silu(gate) * up and its gradients: the CPU path. The formula is in realign_kernels/swiglu/api.py.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace realign {

// Addresses of contiguous arrays of `count` numbers of one dtype. Forward writes out; backward reads grad (of out) and
// writes grad_gate and grad_up.
struct SwigluParams {
  int64_t count = 0;
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

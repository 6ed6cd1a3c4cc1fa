// Standard normals that are a function of a key, a step and a place: the CPU path.
//
// The layout is in realign_kernels/philox_normal/api.py.
#pragma once

#include <cstdint>

namespace realign {

// Which random numbers a sample has.
struct NoiseKey {
  uint64_t key = 0;
  uint32_t step = 0;
};

// Floats that make_normals may write: whole blocks of four around the numbers asked for.
constexpr int64_t normals_buffer_size(int64_t count) { return count + 6; }

// Numbers first to first + count of a sample's noise; the result points into the buffer.
const float* make_normals(const NoiseKey& noise, int64_t first, int64_t count, float* buffer);

// Addresses of contiguous arrays.
struct NormalParams {
  int64_t num_channels = 0;
  int64_t num_samples = 0;
  int num_threads = 1;
  const int32_t* cu_seqlens = nullptr;  // [num_samples + 1]
  const int64_t* key = nullptr;         // [num_samples]
  const int64_t* step = nullptr;        // [num_samples]
  float* out = nullptr;                 // [num_tokens, num_channels]
};

void philox_normal(const NormalParams& params);

}  // namespace realign

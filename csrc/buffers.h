// Where a thread keeps the float copies of a tile.
#pragma once

#include <cstdint>
#include <memory>

#include "numbers.h"
#include "rows.h"
#include "tiles.h"

namespace realign {

// A few runs of floats, each of the same size.
class Buffers {
 public:
  Buffers(int num_slots, int64_t size) : size_(size), data_(new float[num_slots * size]) {}
  float* operator[](int slot) const { return data_.get() + slot * size_; }

 private:
  int64_t size_;
  std::unique_ptr<float[]> data_;
};

inline const void* address_of(const void* array, Dtype dtype, const Tile& tile) {
  return static_cast<const char*>(array) + tile.first_number * size_of(dtype);
}

inline void* address_of(void* array, Dtype dtype, const Tile& tile) {
  return static_cast<char*>(array) + tile.first_number * size_of(dtype);
}

// The tile as floats: the array itself where it holds floats, else a widened copy.
inline const float* read(const void* array, Dtype dtype, const Tile& tile, float* buffer) {
  const void* from = address_of(array, dtype, tile);
  if (dtype == Dtype::float32) return static_cast<const float*>(from);
  widen(from, dtype, buffer, tile.num_numbers);
  return buffer;
}

}  // namespace realign

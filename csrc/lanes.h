// Sums in double over 16 lanes that are added up in a tree: their order follows from the count alone, whatever the width
// of the vector unit. Inlined, so that a function which has a copy per vector width has its sums in that width too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace realign {

constexpr int kLanes = 16;

// Sum of a * b.
inline __attribute__((always_inline)) double sum_products(const float* a, const float* b, int64_t count) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lane[j] += double(a[i + j]) * double(b[i + j]);
  }
  for (int j = 0; i < count; ++i, ++j) lane[j] += double(a[i]) * double(b[i]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

// out = the sum of so many rows of `count` numbers, in their order.
inline void sum_rows(const float* rows, int64_t num_rows, int64_t count, float* out) {
  std::vector<double> sums(count, 0.0);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t i = 0; i < count; ++i) sums[i] += rows[row * count + i];
  }
  std::copy(sums.begin(), sums.end(), out);
}

}  // namespace realign

// Antialiased bicubic resize to 8 bits along one axis, then the other, crop or padding, and a table look-up: the CPU
// path. The formula is in realign_kernels/clip_preprocess/api.py, the packing in realign_kernels/clip_preprocess/table.py.
#pragma once

#include <cstdint>

namespace realign {

enum class PictureType : int { float32 = 0, bfloat16 = 1, float16 = 2, uint8 = 3 };

// One axis of one picture. At the address: int32 starts[count], lengths[count], taps[count][num_taps].
struct AxisRecord {
  int64_t address;
  int64_t offset;  // of the covered run in the result
  int64_t count;
  int64_t num_taps;
};

// One picture: uint8 rows of interleaved channels, or float planes in [-1, 1]. Strides are in numbers. A picture is
// filtered along `columns` first; where that is its height, it comes transposed, and the result is transposed back.
struct PictureRecord {
  int64_t address;
  int64_t row_stride;
  int64_t channel_stride;
  int64_t is_transposed;
  AxisRecord columns;
  AxisRecord rows;
};

// The result is [num_pictures, 3, height, width] numbers of level_bytes each, taken from levels [3, 256].
struct ClipPreprocessParams {
  int64_t num_pictures = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t level_bytes = 4;
  int num_threads = 1;
  int fill = 0;
  PictureType type = PictureType::uint8;

  const PictureRecord* pictures = nullptr;
  const void* levels = nullptr;
  void* out = nullptr;
};

// Integer arithmetic: the same on every machine, for any number of threads.
void clip_preprocess(const ClipPreprocessParams& params);

}  // namespace realign

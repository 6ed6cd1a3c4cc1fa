#include "tiles.h"

#include <algorithm>

namespace realign {
namespace {

constexpr int64_t kTileNumbers = 2048;          // a few float buffers of this size fit in the first-level cache
constexpr int64_t kNumbersPerThread = 1 << 15;  // below this a second thread costs more than it saves

}  // namespace

Tiling::Tiling(const int32_t* cu_seqlens, int64_t num_samples, int64_t num_channels) {
  const int64_t tile_tokens = std::max<int64_t>(1, kTileNumbers / std::max<int64_t>(1, num_channels));
  max_numbers_ = tile_tokens * num_channels;
  first_tile_.reserve(num_samples + 1);
  tiles_.reserve(cu_seqlens[num_samples] / tile_tokens + num_samples);
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    first_tile_.push_back(size());
    const int64_t start = cu_seqlens[sample], end = num_channels == 0 ? start : cu_seqlens[sample + 1];
    for (int64_t token = start; token < end; token += tile_tokens) {
      const int64_t tokens = std::min(tile_tokens, end - token);
      tiles_.push_back({sample, token * num_channels, (token - start) * num_channels, tokens * num_channels});
    }
  }
  first_tile_.push_back(size());
}

int count_threads(int64_t num_numbers, int max_threads) {
  return int(std::min<int64_t>(max_threads, 1 + num_numbers / kNumbersPerThread));
}

TileRange part_of(const Tiling& tiling, int part, int num_parts) {
  return {tiling.size() * part / num_parts, tiling.size() * (part + 1) / num_parts};
}

}  // namespace realign

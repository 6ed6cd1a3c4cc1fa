// How packed samples are cut up: into tiles, which sums are made of, and tiles into parts, one for each thread.
#pragma once

#include <cstdint>
#include <vector>

namespace realign {

// Whole tokens of one sample. Cut from the sample's own start, so that its sums do not depend on its neighbours.
struct Tile {
  int64_t sample;
  int64_t first_number;       // in the packed arrays
  int64_t first_of_sample;    // the same, counted from the sample's start
  int64_t num_numbers;
};

// The tiles of packed samples, in order; without channels there are none.
class Tiling {
 public:
  Tiling(const int32_t* cu_seqlens, int64_t num_samples, int64_t num_channels);

  const Tile& operator[](int64_t index) const { return tiles_[index]; }
  int64_t size() const { return int64_t(tiles_.size()); }
  int64_t first_of(int64_t sample) const { return first_tile_[sample]; }
  int64_t end_of(int64_t sample) const { return first_tile_[sample + 1]; }
  int64_t max_numbers() const { return max_numbers_; }

 private:
  int64_t max_numbers_;
  std::vector<Tile> tiles_;
  std::vector<int64_t> first_tile_;
};

// Consecutive tiles.
struct TileRange {
  int64_t begin, end;
  bool is_empty() const { return begin >= end; }
};

// Threads worth starting for so many numbers.
int count_threads(int64_t num_numbers, int max_threads);

// Part number `part` of `num_parts` about equal ones.
TileRange part_of(const Tiling& tiling, int part, int num_parts);

}  // namespace realign

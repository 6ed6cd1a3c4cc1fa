#include "philox_normal.h"

#include <cstring>

#include "buffers.h"
#include "philox.h"
#include "tiles.h"
#include "vector_widths.h"

namespace realign {
namespace {

constexpr int64_t kPerBlock = 4;

REALIGN_VECTOR_WIDTHS
void fill_blocks(uint32_t key0, uint32_t key1, uint32_t step, uint32_t first_block, int64_t num_blocks, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < num_blocks; ++i) {
    const PhiloxBlock words = philox(first_block + uint32_t(i), step, key0, key1);
    const NormalPair low = normals_of_words(words.word[0], words.word[1]);
    const NormalPair high = normals_of_words(words.word[2], words.word[3]);
    out[kPerBlock * i] = low.cos;
    out[kPerBlock * i + 1] = low.sin;
    out[kPerBlock * i + 2] = high.cos;
    out[kPerBlock * i + 3] = high.sin;
  }
}

}  // namespace

const float* make_normals(const NoiseKey& noise, int64_t first, int64_t count, float* buffer) {
  const int64_t first_block = first / kPerBlock, end_block = (first + count + kPerBlock - 1) / kPerBlock;
  fill_blocks(uint32_t(noise.key), uint32_t(noise.key >> 32), noise.step, uint32_t(first_block),
              end_block - first_block, buffer);
  return buffer + first % kPerBlock;
}

void philox_normal(const NormalParams& params) {
  const Tiling tiling(params.cu_seqlens, params.num_samples, params.num_channels);
  const int num_threads = count_threads(params.cu_seqlens[params.num_samples] * params.num_channels, params.num_threads);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const Buffers buffers(1, normals_buffer_size(tiling.max_numbers()));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiling.size(); ++i) {
      const Tile& tile = tiling[i];
      const NoiseKey noise = {uint64_t(params.key[tile.sample]), uint32_t(params.step[tile.sample])};
      const float* normals = make_normals(noise, tile.first_of_sample, tile.num_numbers, buffers[0]);
      std::memcpy(params.out + tile.first_number, normals, tile.num_numbers * sizeof(float));
    }
  }
}

}  // namespace realign

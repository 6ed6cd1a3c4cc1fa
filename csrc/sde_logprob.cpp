#include "sde_logprob.h"

#include <vector>

#include "buffers.h"
#include "rows.h"
#include "tiles.h"

namespace realign {
namespace {

struct TileSums {
  double squared_errors = 0, squared_changes = 0;
};

enum Slot { kSample, kVelocity, kNext, kNumSlots };

TileSums sum_tile(const LogProbParams& params, const Tile& tile, const Buffers& buffers) {
  const float a = params.a[tile.sample], b = params.b[tile.sample];
  const float* x = read(params.sample, params.sample_dtype, tile, buffers[kSample]);
  const float* next = read(params.next_sample, params.sample_dtype, tile, buffers[kNext]);
  const float* v = read(params.velocity, params.velocity_dtype, tile, buffers[kVelocity]);
  TileSums sums;
  sums.squared_errors = sum_squared_errors(next, x, v, a, b, tile.num_numbers);
  if (params.bias != nullptr) {
    const float* old = read(params.old_velocity, params.old_velocity_dtype, tile, buffers[kSample]);
    sums.squared_changes = sum_squared_changes(v, old, b, tile.num_numbers);
  }
  return sums;
}

}  // namespace

void sde_logprob(const LogProbParams& params) {
  const Tiling tiling(params.cu_seqlens, params.num_samples, params.num_channels);
  std::vector<TileSums> sums(tiling.size());
  const int num_threads = count_threads(params.cu_seqlens[params.num_samples] * params.num_channels, params.num_threads);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const Buffers buffers(kNumSlots, tiling.max_numbers());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiling.size(); ++i) sums[i] = sum_tile(params, tiling[i], buffers);
  }
  for (int64_t sample = 0; sample < params.num_samples; ++sample) {
    TileSums total;
    for (int64_t i = tiling.first_of(sample); i < tiling.end_of(sample); ++i) {
      total.squared_errors += sums[i].squared_errors;
      total.squared_changes += sums[i].squared_changes;
    }
    const int64_t count = int64_t(params.cu_seqlens[sample + 1] - params.cu_seqlens[sample]) * params.num_channels;
    params.logprob[sample] = gaussian_logprob(params.weight[sample], params.constant[sample],
                                              reduce(total.squared_errors, count, params.reduce_sum));
    if (params.bias != nullptr) {
      params.bias[sample] = params.bias_weight[sample] * reduce(total.squared_changes, count, params.reduce_sum);
    }
  }
}

}  // namespace realign

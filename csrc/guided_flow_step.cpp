#include "guided_flow_step.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "rows.h"

namespace realign {
namespace {

constexpr int64_t kTileNumbers = 2048;           // six float buffers of this size stay in the first-level cache
constexpr int64_t kNumbersPerThread = 1 << 15;   // below this a second thread costs more than it saves
constexpr float kNormEpsilon = 1e-8f;

// What one sample asks for.
struct Sample {
  bool has_text = false;
  bool has_image = false;
  Renorm renorm = Renorm::none;
  float text_scale = 1, image_scale = 1, renorm_min = 0;
  float a = 1, b = 0, std = 0;
};

// Whole tokens of one sample. Cut from the sample's own start, so that its sums do not depend on its neighbours.
struct Tile {
  int64_t sample;
  int64_t first_number;  // in the packed arrays
  int64_t num_numbers;
  double cond_squares = 0;
  double guided_squares = 0;
};

// One thread's float copies of a tile.
class Buffers {
 public:
  explicit Buffers(int64_t tile_numbers) : size_(tile_numbers), data_(new float[6 * tile_numbers]) {}
  float* operator[](int slot) { return data_.get() + slot * size_; }

 private:
  int64_t size_;
  std::unique_ptr<float[]> data_;
};
enum Slot { kCond, kText, kImage, kGuided, kSample, kNoise };

Sample load_sample(const FlowParams& params, int64_t index) {
  Sample sample;
  if (params.text_scale != nullptr) {
    sample.text_scale = params.text_scale[index];
    sample.has_text = sample.text_scale > 1;
    sample.renorm = Renorm(params.renorm[index]);
  }
  if (params.image_scale != nullptr) {
    sample.image_scale = params.image_scale[index];
    sample.has_image = sample.has_text && sample.image_scale > 1;
  }
  if (params.renorm_min != nullptr) sample.renorm_min = params.renorm_min[index];
  if (params.sample != nullptr) {
    sample.a = params.a[index];
    sample.b = params.b[index];
  }
  if (params.noise != nullptr) sample.std = params.std[index];
  return sample;
}

std::vector<Tile> cut_tiles(const FlowParams& params, int64_t tile_tokens) {
  std::vector<Tile> tiles;
  for (int64_t sample = 0; sample < params.num_samples; ++sample) {
    const int64_t end = params.cu_seqlens[sample + 1];
    for (int64_t token = params.cu_seqlens[sample]; token < end; token += tile_tokens) {
      const int64_t tokens = std::min(tile_tokens, end - token);
      tiles.push_back({sample, token * params.num_channels, tokens * params.num_channels});
    }
  }
  return tiles;
}

// The tile as floats: the array itself where it holds floats, else a widened copy.
const float* read(const void* array, Dtype dtype, const Tile& tile, float* buffer) {
  const char* from = static_cast<const char*>(array) + tile.first_number * size_of(dtype);
  if (dtype == Dtype::float32) return reinterpret_cast<const float*>(from);
  widen(from, dtype, buffer, tile.num_numbers);
  return buffer;
}

float shrink_factor(double cond_squares, double guided_squares, float floor) {
  const float factor = float(std::sqrt(cond_squares)) / (float(std::sqrt(guided_squares)) + kNormEpsilon);
  // Comparisons, not std::clamp: a NaN stays a NaN.
  const float raised = factor < floor ? floor : factor;
  return raised > 1 ? 1.0f : raised;
}

void shrink_channels(const float* cond, float* guided, const Tile& tile, int64_t channels, float floor) {
  for (int64_t row = 0; row < tile.num_numbers; row += channels) {
    const double cond_squares = sum_squares(cond + row, channels);
    const double guided_squares = sum_squares(guided + row, channels);
    multiply(guided + row, shrink_factor(cond_squares, guided_squares, floor), channels);
  }
}

// The guided velocity of a tile, all but the factor of the global renorm.
float* guide(const FlowParams& params, const Sample& sample, const Tile& tile, const float* cond, Buffers& buffers) {
  float* guided = buffers[kGuided];
  const float* text = read(params.text_uncond, params.velocity_dtype, tile, buffers[kText]);
  extrapolate(text, cond, sample.text_scale, guided, tile.num_numbers);
  if (sample.renorm == Renorm::text_channel) {
    shrink_channels(cond, guided, tile, params.num_channels, sample.renorm_min);
  }
  if (sample.has_image) {
    const float* image = read(params.image_uncond, params.velocity_dtype, tile, buffers[kImage]);
    extrapolate(image, guided, sample.image_scale, guided, tile.num_numbers);
  }
  if (sample.renorm == Renorm::channel) {
    shrink_channels(cond, guided, tile, params.num_channels, sample.renorm_min);
  }
  return guided;
}

void sum_tile(const FlowParams& params, const Sample& sample, Tile& tile, Buffers& buffers) {
  if (!sample.has_text || sample.renorm != Renorm::global) return;
  const float* cond = read(params.cond, params.velocity_dtype, tile, buffers[kCond]);
  const float* guided = guide(params, sample, tile, cond, buffers);
  tile.cond_squares = sum_squares(cond, tile.num_numbers);
  tile.guided_squares = sum_squares(guided, tile.num_numbers);
}

// One factor per sample; the tiles' sums are added in their order.
std::vector<float> global_factors(const std::vector<Sample>& samples, const std::vector<Tile>& tiles) {
  std::vector<double> cond_squares(samples.size(), 0), guided_squares(samples.size(), 0);
  for (const Tile& tile : tiles) {
    cond_squares[tile.sample] += tile.cond_squares;
    guided_squares[tile.sample] += tile.guided_squares;
  }
  std::vector<float> factors(samples.size(), 1.0f);
  for (size_t i = 0; i < samples.size(); ++i) {
    if (!samples[i].has_text || samples[i].renorm != Renorm::global) continue;
    factors[i] = shrink_factor(cond_squares[i], guided_squares[i], samples[i].renorm_min);
  }
  return factors;
}

void finish_tile(const FlowParams& params, const Sample& sample, const Tile& tile, float factor, Buffers& buffers) {
  const float* velocity = read(params.cond, params.velocity_dtype, tile, buffers[kCond]);
  if (sample.has_text) {
    float* guided = guide(params, sample, tile, velocity, buffers);
    if (sample.renorm == Renorm::global) multiply(guided, factor, tile.num_numbers);
    velocity = guided;
  }
  Dtype dtype = params.velocity_dtype;
  if (params.sample != nullptr) {
    dtype = params.sample_dtype;
    const float* x = read(params.sample, dtype, tile, buffers[kSample]);
    const float* noise = params.noise == nullptr ? nullptr : read(params.noise, dtype, tile, buffers[kNoise]);
    step(x, velocity, noise, sample.a, sample.b, sample.std, buffers[kGuided], tile.num_numbers);
    velocity = buffers[kGuided];
  }
  narrow(velocity, dtype, static_cast<char*>(params.out) + tile.first_number * size_of(dtype), tile.num_numbers);
}

}  // namespace

void guided_flow_step(const FlowParams& params) {
  const int64_t num_numbers = params.num_tokens * params.num_channels;
  if (num_numbers == 0) return;
  const int64_t tile_tokens = std::max<int64_t>(1, kTileNumbers / params.num_channels);
  std::vector<Tile> tiles = cut_tiles(params, tile_tokens);
  std::vector<Sample> samples;
  for (int64_t i = 0; i < params.num_samples; ++i) samples.push_back(load_sample(params, i));
  std::vector<float> factors;

  const int num_threads = int(std::min<int64_t>(params.num_threads, 1 + num_numbers / kNumbersPerThread));
  const int64_t num_tiles = int64_t(tiles.size());
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Buffers buffers(tile_tokens * params.num_channels);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_tiles; ++i) sum_tile(params, samples[tiles[i].sample], tiles[i], buffers);
#pragma omp single
    factors = global_factors(samples, tiles);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t sample = tiles[i].sample;
      finish_tile(params, samples[sample], tiles[i], factors[sample], buffers);
    }
  }
}

}  // namespace realign

#include "guided_flow_step.h"

#include <cmath>

#include "buffers.h"
#include "philox_normal.h"
#include "rows.h"
#include "sde_logprob.h"
#include "tiles.h"

namespace realign {
namespace {

constexpr float kNormEpsilon = 1e-8f;

// What one sample asks for.
struct Sample {
  bool has_text = false;
  bool has_image = false;
  bool has_noise = false;
  Renorm renorm = Renorm::none;
  Guide guide = {1, 1};
  float renorm_min = 0;
  float a = 1, b = 0, std = 0;
  NoiseKey noise;

  // The guided velocity must be measured as a whole before it can be used.
  bool needs_norm() const { return has_text && renorm == Renorm::global; }
};

Sample load_sample(const FlowParams& params, int64_t index) {
  Sample sample;
  if (params.text_scale != nullptr) {
    sample.guide.text_scale = params.text_scale[index];
    sample.has_text = sample.guide.text_scale > 1;
    sample.renorm = Renorm(params.renorm == nullptr ? params.common_renorm : params.renorm[index]);
  }
  if (params.image_scale != nullptr) {
    sample.guide.image_scale = params.image_scale[index];
    sample.has_image = sample.has_text && sample.guide.image_scale > 1;
  }
  if (params.renorm_min != nullptr) sample.renorm_min = params.renorm_min[index];
  if (params.sample != nullptr) {
    sample.a = params.a[index];
    sample.b = params.b[index];
  }
  if (params.std != nullptr) {
    sample.std = params.std[index];
    // A given noise counts even when multiplied by 0: it may be infinite. What is made here is finite.
    sample.has_noise = params.noise != nullptr || sample.std > 0;
  }
  if (params.noise_key != nullptr) {
    sample.noise = {uint64_t(params.noise_key[index]), uint32_t(params.noise_step[index])};
  }
  return sample;
}

// What is known of a tile once it has been measured, and once it is done.
struct TileSums {
  NormSquares norm;
  double squared_errors = 0;
};

enum Slot { kCond, kText, kImage, kVelocity, kSample, kNoise, kNext, kNumSlots };

float shrink_factor(const NormSquares& squares, float floor) {
  const float factor = float(std::sqrt(squares.cond)) / (float(std::sqrt(squares.guided)) + kNormEpsilon);
  // Comparisons, not std::clamp: a NaN stays a NaN.
  const float raised = factor < floor ? floor : factor;
  return raised > 1 ? 1.0f : raised;
}

void shrink_channels(const float* cond, float* guided, int64_t count, int64_t channels, float floor) {
  for (int64_t row = 0; row < count; row += channels) {
    const NormSquares squares = {sum_squares(cond + row, channels), sum_squares(guided + row, channels)};
    multiply(guided + row, shrink_factor(squares, floor), guided + row, channels);
  }
}

// One call: the samples, their tiles, and what the tiles sum to.
class Run {
 public:
  explicit Run(const FlowParams& params)
      : params_(params), tiling_(params.cu_seqlens, params.num_samples, params.num_channels), sums_(tiling_.size()) {
    samples_.reserve(params.num_samples);
    for (int64_t i = 0; i < params.num_samples; ++i) samples_.push_back(load_sample(params, i));
    num_parts_ = count_threads(params.cu_seqlens[params.num_samples] * params.num_channels, params.num_threads);
  }

  void run() {
#pragma omp parallel num_threads(num_parts_) if (num_parts_ > 1)
    {
      const Buffers buffers(kNumSlots, normals_buffer_size(tiling_.max_numbers()));
#pragma omp for schedule(static, 1)
      for (int part = 0; part < num_parts_; ++part) start_part(part_of(tiling_, part, num_parts_), buffers);
#pragma omp for schedule(static, 1) nowait
      for (int part = 0; part < num_parts_; ++part) finish_part(part_of(tiling_, part, num_parts_), buffers);
    }
    if (params_.logprob != nullptr) write_logprobs();
  }

 private:
  // The tiles of one sample in a part.
  TileRange tiles_within(const TileRange& part, int64_t sample) const {
    return {std::max(part.begin, tiling_.first_of(sample)), std::min(part.end, tiling_.end_of(sample))};
  }

  bool must_wait(const TileRange& part, int64_t sample) const {
    return samples_[sample].needs_norm() &&
           (tiling_.first_of(sample) < part.begin || tiling_.end_of(sample) > part.end);
  }

  // All that can be done without knowing the other parts. A sample is measured and finished while it is in the cache;
  // one that is shared with another part is measured last, and finished first after the barrier.
  void start_part(const TileRange& part, const Buffers& buffers) {
    if (part.is_empty()) return;
    const int64_t first = tiling_[part.begin].sample, last = tiling_[part.end - 1].sample;
    for (int64_t sample = first; sample <= last; ++sample) {
      if (must_wait(part, sample)) continue;
      measure(tiles_within(part, sample), buffers);
      finish(sample, tiles_within(part, sample), buffers);
    }
    for (int64_t sample : {first, last}) {
      if (must_wait(part, sample)) measure(tiles_within(part, sample), buffers);
      if (first == last) break;
    }
  }

  void finish_part(const TileRange& part, const Buffers& buffers) {
    if (part.is_empty()) return;
    const int64_t first = tiling_[part.begin].sample, last = tiling_[part.end - 1].sample;
    for (int64_t sample : {last, first}) {
      if (must_wait(part, sample)) finish(sample, tiles_within(part, sample), buffers);
      if (first == last) break;
    }
  }

  // Sums for the norms. The velocity is kept in the result where it fits there.
  void measure(const TileRange& tiles, const Buffers& buffers) {
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
      const Tile& tile = tiling_[i];
      const Sample& sample = samples_[tile.sample];
      if (!sample.needs_norm()) return;
      float* guided = keeps_velocity() ? out_of(tile) : buffers[kVelocity];
      sums_[i].norm = guide_and_measure(branches_of(sample, tile), sample.guide, guided, tile.num_numbers);
    }
  }

  void finish(int64_t sample, const TileRange& tiles, const Buffers& buffers) {
    const float factor = samples_[sample].needs_norm() ? global_factor(sample) : 1.0f;
    for (int64_t i = tiles.begin; i < tiles.end; ++i) finish_tile(i, factor, buffers);
  }

  // The tiles' sums are added in their order, whoever does it.
  float global_factor(int64_t sample) const {
    NormSquares squares;
    for (int64_t i = tiling_.first_of(sample); i < tiling_.end_of(sample); ++i) {
      squares.cond += sums_[i].norm.cond;
      squares.guided += sums_[i].norm.guided;
    }
    return shrink_factor(squares, samples_[sample].renorm_min);
  }

  void finish_tile(int64_t index, float factor, const Buffers& buffers) {
    const Tile& tile = tiling_[index];
    const Sample& sample = samples_[tile.sample];
    ScaledVelocity velocity = {velocity_of(sample, tile, buffers), factor};
    if (params_.sample == nullptr) {
      write_velocity(velocity, tile, buffers);
      return;
    }
    if (params_.logprob != nullptr && sample.needs_norm()) velocity = {scale(velocity, tile, buffers[kVelocity]), 1};
    const float* x = read(params_.sample, params_.sample_dtype, tile, buffers[kSample]);
    const float* noise = noise_of(sample, tile, buffers);
    float* next = keeps_velocity() ? out_of(tile) : buffers[kNext];
    step({x, velocity, noise}, {sample.a, sample.b, sample.std}, next, tile.num_numbers);
    if (!keeps_velocity()) write(next, tile);
    if (params_.logprob == nullptr) return;
    if (!keeps_velocity()) read(params_.out, params_.out_dtype, tile, next);
    sums_[index].squared_errors = sum_squared_errors(next, x, velocity.numbers, sample.a, sample.b, tile.num_numbers);
  }

  void write_velocity(const ScaledVelocity& velocity, const Tile& tile, const Buffers& buffers) const {
    if (keeps_velocity()) {
      scale(velocity, tile, out_of(tile));
    } else {
      write(scale(velocity, tile, buffers[kVelocity]), tile);
    }
  }

  const float* scale(const ScaledVelocity& velocity, const Tile& tile, float* out) const {
    multiply(velocity.numbers, velocity.factor, out, tile.num_numbers);
    return out;
  }

  void write(const float* numbers, const Tile& tile) const {
    narrow(numbers, params_.out_dtype, address_of(params_.out, params_.out_dtype, tile), tile.num_numbers);
  }

  // The velocity of a tile, with guidance and renorm, all but the factor of the global renorm.
  const float* velocity_of(const Sample& sample, const Tile& tile, const Buffers& buffers) const {
    if (!sample.needs_norm()) return guide_by_token(sample, tile, buffers);
    if (keeps_velocity()) return out_of(tile);
    guide_and_measure(branches_of(sample, tile), sample.guide, buffers[kVelocity], tile.num_numbers);
    return buffers[kVelocity];
  }

  const float* guide_by_token(const Sample& sample, const Tile& tile, const Buffers& buffers) const {
    const float* cond = read(params_.cond, params_.velocity_dtype, tile, buffers[kCond]);
    if (!sample.has_text) return cond;
    float* guided = buffers[kVelocity];
    const float* text = read(params_.text_uncond, params_.velocity_dtype, tile, buffers[kText]);
    extrapolate(text, cond, sample.guide.text_scale, guided, tile.num_numbers);
    if (sample.renorm == Renorm::text_channel) shrink(sample, cond, guided, tile);
    if (sample.has_image) {
      const float* image = read(params_.image_uncond, params_.velocity_dtype, tile, buffers[kImage]);
      extrapolate(image, guided, sample.guide.image_scale, guided, tile.num_numbers);
    }
    if (sample.renorm == Renorm::channel) shrink(sample, cond, guided, tile);
    return guided;
  }

  void shrink(const Sample& sample, const float* cond, float* guided, const Tile& tile) const {
    shrink_channels(cond, guided, tile.num_numbers, params_.num_channels, sample.renorm_min);
  }

  const float* noise_of(const Sample& sample, const Tile& tile, const Buffers& buffers) const {
    if (!sample.has_noise) return nullptr;
    if (params_.noise != nullptr) return read(params_.noise, params_.sample_dtype, tile, buffers[kNoise]);
    return make_normals(sample.noise, tile.first_of_sample, tile.num_numbers, buffers[kNoise]);
  }

  void write_logprobs() const {
    for (int64_t sample = 0; sample < params_.num_samples; ++sample) {
      double total = 0;
      for (int64_t i = tiling_.first_of(sample); i < tiling_.end_of(sample); ++i) total += sums_[i].squared_errors;
      const int64_t count = int64_t(params_.cu_seqlens[sample + 1] - params_.cu_seqlens[sample]) * params_.num_channels;
      params_.logprob[sample] = gaussian_logprob(params_.logprob_weight[sample], params_.logprob_constant[sample],
                                                 reduce(total, count, params_.reduce_sum));
    }
  }

  bool keeps_velocity() const { return params_.out_dtype == Dtype::float32; }

  float* out_of(const Tile& tile) const { return static_cast<float*>(params_.out) + tile.first_number; }

  Branches branches_of(const Sample& sample, const Tile& tile) const {
    const Dtype dtype = params_.velocity_dtype;
    return {address_of(params_.cond, dtype, tile), address_of(params_.text_uncond, dtype, tile),
            sample.has_image ? address_of(params_.image_uncond, dtype, tile) : nullptr, dtype};
  }

  const FlowParams& params_;
  Tiling tiling_;
  std::vector<Sample> samples_;
  std::vector<TileSums> sums_;
  int num_parts_;
};

}  // namespace

void guided_flow_step(const FlowParams& params) { Run(params).run(); }

}  // namespace realign

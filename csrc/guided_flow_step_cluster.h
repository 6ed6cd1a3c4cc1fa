// The guided step of one sample on a cluster of thread blocks that keeps the guided velocity in its shared memory.
//
// `run_cluster` lists the phases (see cluster_sums.h); ClusterStep holds them. A sample is cut into slices of whole
// tokens by its own length alone; of a slice, thread t has the units t, t + kThreads, ... of 8 numbers. So a sample's
// bits depend on nothing else: not on its neighbours, its place in memory, or the size of the cluster.
#pragma once

#include "cluster_sample.h"
#include "philox.h"

namespace realign {

// The phases of one sample, for velocities of a given type. Aligned: the channels divide by 8, the addresses by 16.
template <Dtype kVelocity, bool kAligned>
struct ClusterStep {
  // Units that a thread loads before it uses the first: with three branches, six vectors of 16 bytes.
  static constexpr int kInFlight = kAligned && kVelocity != Dtype::float32 ? 2 : 1;

  struct Branches {
    RawUnit<kVelocity> cond, text, image;
  };

  const ClusterStepParams* params;
  int index;
  ClusterSample sample;

  REALIGN_DEVICE ClusterStep(const ClusterStepParams& given, int sample_index)
      : params(&given), index(sample_index), sample(load_sample(given, sample_index)) {}

  REALIGN_DEVICE bool is_global() const { return sample.renorm == kGlobal; }
  REALIGN_DEVICE bool is_by_token() const { return sample.renorm == kChannel || sample.renorm == kTextChannel; }
  REALIGN_DEVICE bool wants_logprob() const { return params->logprob != nullptr; }

  // Slice `number` of the sample, which is slice `local` of its block.
  REALIGN_DEVICE Slice find_slice(int number, int local) const {
    const int first_token = number * sample.slice_tokens;
    const int left = sample.num_tokens - first_token;
    const int num_tokens = left < 0 ? 0 : left < sample.slice_tokens ? left : sample.slice_tokens;
    return {number, first_token, num_tokens * sample.token_units, local * sample.slice_tokens * sample.token_units};
  }

  REALIGN_DEVICE Place find_place(const Slice& slice, int unit) const {
    const int channels = params->num_channels;
    if constexpr (kAligned) return {int64_t(slice.first_token) * channels + int64_t(unit) * kUnit, kUnit};
    const int token = unit / sample.token_units;
    const int channel = (unit - token * sample.token_units) * kUnit;
    const int count = channels - channel < kUnit ? channels - channel : kUnit;
    return {int64_t(slice.first_token + token) * channels + channel, count};
  }

  REALIGN_DEVICE RawUnit<kVelocity> load_velocity(const void* array, const Place& place) const {
    return load_unit<kVelocity, kAligned>(array, sample.first_number + place.first, place.count);
  }

  REALIGN_DEVICE AnyUnit load_number(const void* array, const Place& place) const {
    return load_any<kAligned>(params->sample_dtype, array, sample.first_number + place.first, place.count);
  }

  REALIGN_DEVICE Branches load_branches(const Place& place) const {
    Branches branches;
    branches.cond = load_velocity(params->cond, place);
    if (sample.has_text) branches.text = load_velocity(params->text_uncond, place);
    if (sample.has_image) branches.image = load_velocity(params->image_uncond, place);
    return branches;
  }

  static REALIGN_DEVICE void extrapolate(const RawUnit<kVelocity>& raw, float scale, float (&toward)[kUnit]) {
    float base[kUnit];
    widen_unit(raw, base);
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) toward[i] = base[i] + scale * (toward[i] - base[i]);
  }

  // The guided velocity as its norm is taken.
  REALIGN_DEVICE void guide(const Branches& branches, float (&guided)[kUnit]) const {
    widen_unit(branches.cond, guided);
    if (sample.has_text) extrapolate(branches.text, sample.text_scale, guided);
    if (sample.has_image && sample.renorm != kTextChannel) extrapolate(branches.image, sample.image_scale, guided);
  }

  // What is done to it once the factor is known.
  REALIGN_DEVICE void shrink(const Branches& branches, float factor, float (&guided)[kUnit]) const {
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) guided[i] *= factor;
    if (sample.has_image && sample.renorm == kTextChannel) extrapolate(branches.image, sample.image_scale, guided);
  }

  REALIGN_DEVICE Squares measure(const Branches& branches, const float (&guided)[kUnit]) const {
    float cond[kUnit];
    widen_unit(branches.cond, cond);
    return {sum_squares(cond), sum_squares(guided)};
  }

  // Phase: guide a slice, sum its squares, and keep for the second half what there is room for.
  REALIGN_DEVICE void combine(ClusterShared& shared, const Slice& slice, int thread) const {
    Squares sum = {0, 0};
    for (int first = thread; first < slice.num_units; first += kInFlight * kThreads) {
      Branches branches[kInFlight];
      REALIGN_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        const int unit = first + k * kThreads;
        if (unit < slice.num_units) branches[k] = load_branches(find_place(slice, unit));
      }
      REALIGN_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        const int unit = first + k * kThreads;
        if (unit < slice.num_units) {
          float guided[kUnit];
          guide(branches[k], guided);
          const Squares squares = measure(branches[k], guided);
          keep(shared, slice.first_kept + unit, guided, squares);
          sum = {sum.cond + squares.cond, sum.guided + squares.guided};
        }
      }
    }
    shared.sums.threads[kCond][thread] = sum.cond;
    shared.sums.threads[kGuided][thread] = sum.guided;
  }

  // Velocities stand in two planes of half units, so that neighbouring threads touch neighbouring vectors.
  REALIGN_DEVICE void keep(ClusterShared& shared, int at, const float (&guided)[kUnit], const Squares& squares) const {
    if (is_by_token()) {
      if (at < kSquaresPerUnit * params->kept_units) shared.squares()[at] = squares;
    } else if (is_kept(at)) {
      const RawUnit<Dtype::float32> raw = narrow_unit<Dtype::float32>(guided);
      shared.velocities()[at] = Vector{raw.word[0], raw.word[1], raw.word[2], raw.word[3]};
      shared.velocities()[params->kept_units + at] = Vector{raw.word[4], raw.word[5], raw.word[6], raw.word[7]};
    }
  }

  REALIGN_DEVICE bool is_kept(int at) const { return is_global() && at < params->kept_units; }

  REALIGN_DEVICE void load_kept(ClusterShared& shared, int at, float (&guided)[kUnit]) const {
    const Vector low = shared.velocities()[at], high = shared.velocities()[params->kept_units + at];
    widen_unit(RawUnit<Dtype::float32>{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}}, guided);
  }

  REALIGN_DEVICE float find_sample_factor(const ClusterShared& shared) const {
    return shrink_factor({sum_slices(shared.sums, kCond), sum_slices(shared.sums, kGuided)}, sample.renorm_min);
  }

  // The factor of the token that a unit belongs to. Squares that found no room are computed again.
  REALIGN_DEVICE float find_token_factor(ClusterShared& shared, const Slice& slice, int unit) const {
    Squares sum = {0, 0};
    const int first = unit / sample.token_units * sample.token_units;
    for (int other = first; other < first + sample.token_units; ++other) {
      Squares squares;
      if (slice.first_kept + other < kSquaresPerUnit * params->kept_units) {
        squares = shared.squares()[slice.first_kept + other];
      } else {
        const Branches branches = load_branches(find_place(slice, other));
        float guided[kUnit];
        guide(branches, guided);
        squares = measure(branches, guided);
      }
      sum = {sum.cond + squares.cond, sum.guided + squares.guided};
    }
    return shrink_factor(sum, sample.renorm_min);
  }

  // Phase: the sampler's step on a slice, and the sum of its squared errors.
  REALIGN_DEVICE void step(ClusterShared& shared, const Slice& slice, int thread) const {
    const float common = is_global() ? find_sample_factor(shared) : 1.0f;
    float errors = 0;
    for (int first = thread; first < slice.num_units; first += kInFlight * kThreads) {
      Branches branches[kInFlight];
      AnyUnit x[kInFlight], noise[kInFlight];
      REALIGN_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        const int unit = first + k * kThreads;
        if (unit < slice.num_units) {
          const Place place = find_place(slice, unit);
          x[k] = load_number(params->sample, place);
          if (params->noise != nullptr) noise[k] = load_number(params->noise, place);
          if (!is_kept(slice.first_kept + unit)) branches[k] = load_branches(place);
        }
      }
      REALIGN_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        const int unit = first + k * kThreads;
        if (unit < slice.num_units) {
          float velocity[kUnit];
          if (is_kept(slice.first_kept + unit)) {
            load_kept(shared, slice.first_kept + unit, velocity);
          } else {
            guide(branches[k], velocity);
          }
          shrink(branches[k], is_by_token() ? find_token_factor(shared, slice, unit) : common, velocity);
          errors += step_unit(find_place(slice, unit), x[k], noise[k], velocity);
        }
      }
    }
    shared.sums.threads[0][thread] = errors;
  }

  // Steps and stores a unit; returns the sum of its squared errors, if wanted.
  REALIGN_DEVICE float step_unit(const Place& place, const AnyUnit& x_raw, const AnyUnit& noise_raw,
                                 const float (&velocity)[kUnit]) const {
    float x[kUnit], mean[kUnit], next[kUnit];
    widen_any(params->sample_dtype, x_raw, x);
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) next[i] = mean[i] = sample.a * x[i] + sample.b * velocity[i];
    if (params->std != nullptr) {
      float noise[kUnit];
      if (params->noise != nullptr) {
        widen_any(params->sample_dtype, noise_raw, noise);
      } else {
        make_noise(place.first, noise);
      }
      REALIGN_UNROLL
      for (int i = 0; i < kUnit; ++i) next[i] = mean[i] + sample.std * noise[i];
    }
    const AnyUnit rounded = narrow_any(params->sample_dtype, next);
    store_any<kAligned>(params->sample_dtype, rounded, params->out, sample.first_number + place.first, place.count);
    if (!wants_logprob()) return 0;
    widen_any(params->sample_dtype, rounded, next);
    float errors = 0;
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) {
      if (i < place.count) errors += (next[i] - mean[i]) * (next[i] - mean[i]);
    }
    return errors;
  }

  // The sample's normals `first` to `first + 7`, from the blocks of four that hold them.
  REALIGN_DEVICE void make_noise(int64_t first, float (&noise)[kUnit]) const {
    constexpr int kBlocks = kAligned ? 2 : 3, kShifts = kAligned ? 1 : 4;
    float normal[4 * kBlocks];
    REALIGN_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      const PhiloxBlock random = philox(uint32_t(first / 4) + i, sample.step, sample.key0, sample.key1);
      const NormalPair low = normals_of_words(random.word[0], random.word[1]);
      const NormalPair high = normals_of_words(random.word[2], random.word[3]);
      normal[4 * i] = low.cos, normal[4 * i + 1] = low.sin;
      normal[4 * i + 2] = high.cos, normal[4 * i + 3] = high.sin;
    }
    // Chosen, not indexed: an index that is known only at run time would move the array out of the registers.
    REALIGN_UNROLL
    for (int i = 0; i < kUnit; ++i) {
      noise[i] = normal[i];
      REALIGN_UNROLL
      for (int j = 1; j < kShifts; ++j) noise[i] = first % 4 == j ? normal[i + j] : noise[i];
    }
  }

  // Phase: the log-prob, from the errors of all slices.
  REALIGN_DEVICE void finish(const ClusterShared& shared, int thread) const {
    if (thread != 0) return;
    float reduced = sum_slices(shared.sums, kError);
    const int64_t count = int64_t(sample.num_tokens) * params->num_channels;
    if (!params->reduce_sum) reduced /= float(count < 1 ? 1 : count);
    params->logprob[index] = params->logprob_constant[index] - params->logprob_weight[index] * reduced;
  }
};

// The phases of one sample in order. A block takes its slices one after the other.
template <typename Machine, typename Step>
REALIGN_DEVICE void run_cluster(Machine& machine, const Step& step) {
  using Block = typename Machine::Block;
  const int num_local = kSlices / machine.num_ranks();
  if (step.is_global() || step.wants_logprob()) machine.announce();
  if (step.is_global() || step.is_by_token()) {
    for (int local = 0; local < num_local; ++local) {
      machine.for_threads([=](const Block& block, int thread) {
        step.combine(block.shared(), step.find_slice(block.rank() * num_local + local, local), thread);
      });
      if (step.is_global()) share_sums(machine, local, kCond, 2, machine.num_ranks());
    }
    step.is_global() ? machine.sync_cluster() : machine.sync_block();
  }
  for (int local = 0; local < num_local; ++local) {
    machine.for_threads([=](const Block& block, int thread) {
      step.step(block.shared(), step.find_slice(block.rank() * num_local + local, local), thread);
    });
    if (step.wants_logprob()) share_sums(machine, local, kError, 1, 1);
  }
  if (!step.wants_logprob()) return;
  machine.sync_cluster();
  machine.for_threads([=](const Block& block, int thread) {
    if (block.rank() == 0) step.finish(block.shared(), thread);
  });
}

}  // namespace realign

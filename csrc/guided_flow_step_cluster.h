// The guided step of one sample on a cluster of thread blocks that keeps the guided velocity in its shared memory.
//
// `run_cluster` lists the phases (see cluster_sums.h); ClusterStep holds them. A sample is cut into slices of whole
// tokens by its own length alone; of a slice, thread t has the units t, t + kThreads, ... of 8 numbers. So a sample's
// bits depend on nothing else: not on its neighbours, its place in memory, or the size of the cluster.
#pragma once

#include "cluster_plan.h"
#include "cluster_sums.h"
#include "guided_flow_step_cuda.h"
#include "philox.h"

#include <initializer_list>

namespace realign {

constexpr int kSquaresPerUnit = 4;

enum ClusterRenorm { kNone = 0, kGlobal = 1, kChannel = 2, kTextChannel = 3 };  // RENORMS of arguments.py
enum ClusterSum { kCond = 0, kGuided = 1, kError = 2 };

struct alignas(8) Squares {
  float cond, guided;
};

// A block's shared memory. After it there is room for params.kept_units guided units of 8 floats, kept under the global
// renorm; under the renorms by token it holds squares of units, four times as many.
struct alignas(16) ClusterShared {
  ClusterSums sums;

  REALIGN_DEVICE Vector* velocities() { return reinterpret_cast<Vector*>(this + 1); }
  REALIGN_DEVICE Squares* squares() { return reinterpret_cast<Squares*>(this + 1); }
};

// Tokens of a sample that one block works on together.
struct Slice {
  int number;  // of kSlices
  int first_token;
  int num_units;
  int first_kept;  // place of its first unit in the block's shared memory
};

// Where a unit begins in the sample, and how many numbers it has: 8, or what is left of its token.
struct Place {
  int64_t first;
  int count;
};

// What one sample asks for.
struct ClusterSample {
  int64_t first_number = 0;  // in the packed arrays
  int num_tokens = 0;
  int token_units = 0;
  int slice_tokens = 0;
  int renorm = kNone;
  bool has_text = false, has_image = false;
  float text_scale = 1, image_scale = 1, renorm_min = 0;
  float a = 1, b = 0, std = 0;
  uint32_t key0 = 0, key1 = 0, step = 0;
};

REALIGN_DEVICE void load_guidance(const ClusterStepParams& params, int index, ClusterSample& sample) {
  if (params.text_uncond == nullptr) return;
  sample.text_scale = params.text_scale[index];
  sample.has_text = sample.text_scale > 1;
  if (!sample.has_text) return;
  sample.renorm = params.renorm == nullptr ? params.common_renorm : params.renorm[index];
  if (params.renorm_min != nullptr) sample.renorm_min = params.renorm_min[index];
  if (params.image_uncond == nullptr || params.image_scale == nullptr) return;
  sample.image_scale = params.image_scale[index];
  sample.has_image = sample.image_scale > 1;
}

REALIGN_DEVICE ClusterSample load_sample(const ClusterStepParams& params, int index) {
  ClusterSample sample;
  sample.first_number = int64_t(params.cu_seqlens[index]) * params.num_channels;
  sample.num_tokens = params.cu_seqlens[index + 1] - params.cu_seqlens[index];
  sample.token_units = (params.num_channels + kUnit - 1) / kUnit;
  sample.slice_tokens = (sample.num_tokens + kSlices - 1) / kSlices;
  load_guidance(params, index, sample);
  sample.a = params.a[index];
  sample.b = params.b[index];
  if (params.std != nullptr) sample.std = params.std[index];
  if (params.noise_key != nullptr) {
    sample.key0 = uint32_t(params.noise_key[index]);
    sample.key1 = uint32_t(uint64_t(params.noise_key[index]) >> 32);
    sample.step = uint32_t(params.noise_step[index]);
  }
  return sample;
}

REALIGN_DEVICE float shrink_factor(const Squares& squares, float floor) {
  const float factor = sqrtf(squares.cond) / (sqrtf(squares.guided) + 1e-8f);
  // Comparisons, not fminf: a NaN stays a NaN.
  const float raised = factor < floor ? floor : factor;
  return raised > 1 ? 1.0f : raised;
}

REALIGN_DEVICE float sum_squares(const float (&number)[kUnit]) {
  float sum = 0;
  REALIGN_UNROLL
  for (int i = 0; i < kUnit; ++i) sum += number[i] * number[i];
  return sum;
}

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

// What the launch must have room for.
inline ClusterDemand find_demand(const ClusterStepParams& params) {
  const int64_t token_units = (params.num_channels + kUnit - 1) / kUnit;
  const int64_t slice_units = (int64_t(params.max_tokens) + kSlices - 1) / kSlices * token_units;
  return {params.num_samples, slice_units, kSlices, kUnit * int64_t(sizeof(float)), int64_t(sizeof(ClusterShared))};
}

// Whether every unit is whole and can be loaded and stored 16 bytes at a time.
inline bool is_aligned(const ClusterStepParams& params) {
  uintptr_t bits = 0;
  for (const void* array : {params.cond, params.text_uncond, params.image_uncond, params.sample, params.noise,
                            static_cast<const void*>(params.out)}) {
    bits |= reinterpret_cast<uintptr_t>(array);
  }
  return params.num_channels % kUnit == 0 && bits % sizeof(Vector) == 0;
}

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

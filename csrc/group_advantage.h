// Rewards to advantages within groups: the CPU path.
//
// The formula is in realign_kernels/group_advantage/api.py.
#pragma once

#include <cstdint>

namespace realign {

enum class AdvantageStd : int { none = 0, group = 1, global = 2 };

// N samples, R rewards of each, G groups; K = R where each reward is normalised, else 1, their weighted sum.
struct GroupAdvantageParams {
  int64_t num_samples = 0;
  int64_t num_rewards = 0;
  int64_t num_groups = 0;
  AdvantageStd std = AdvantageStd::group;
  bool normalizes_each = false;
  double epsilon = 0;
  double clamp = 0;  // infinity for no bound
  int64_t correction = 0;

  const float* rewards = nullptr;  // [N, R]
  const float* weights = nullptr;  // [R], or null for 1
  const int64_t* group = nullptr;  // [N]; a sample of no group, 0 to G - 1, gets NaN
  float* advantage = nullptr;      // [N]
  float* group_mean = nullptr;     // [G, K]
  float* group_std = nullptr;      // [G, K]
  bool* is_degenerate = nullptr;   // [G]
};

// Arithmetic in double; sums run over a group's members in their order in the batch, one after the other.
void group_advantage(const GroupAdvantageParams& params);

}  // namespace realign

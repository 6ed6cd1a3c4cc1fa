#include "group_advantage.h"

#include <cmath>
#include <limits>
#include <vector>

namespace realign {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Moments {
  double first = 0;        // the first value
  double mean_offset = 0;  // mean of the differences from it: exactly 0 where all values are equal
  double std = 0;
  bool is_constant = true;
};

// What is normalised, [N, K].
std::vector<double> weigh(const GroupAdvantageParams& params) {
  const int64_t num_rewards = params.num_rewards;
  if (params.normalizes_each) return {params.rewards, params.rewards + params.num_samples * num_rewards};
  std::vector<double> sums(params.num_samples);
  for (int64_t i = 0; i < params.num_samples; ++i) {
    for (int64_t j = 0; j < num_rewards; ++j) {
      const double weight = params.weights == nullptr ? 1 : params.weights[j];
      sums[i] += weight * double(params.rewards[i * num_rewards + j]);
    }
  }
  return sums;
}

// The samples sorted by group, those of one group in their order. starts[g] is where a group begins; G + 1 of them.
std::vector<int64_t> sort_by_group(const GroupAdvantageParams& params, std::vector<int64_t>& starts) {
  starts.assign(params.num_groups + 1, 0);
  const auto is_group = [&](int64_t group) { return group >= 0 && group < params.num_groups; };
  for (int64_t i = 0; i < params.num_samples; ++i) {
    if (is_group(params.group[i])) ++starts[params.group[i] + 1];
  }
  for (int64_t g = 0; g < params.num_groups; ++g) starts[g + 1] += starts[g];
  std::vector<int64_t> order(starts.back()), next(starts);
  for (int64_t i = 0; i < params.num_samples; ++i) {
    if (is_group(params.group[i])) order[next[params.group[i]]++] = i;
  }
  return order;
}

// value(m) is the m-th of count values.
template <typename Value>
Moments measure(const Value& value, int64_t count, int64_t correction) {
  if (count == 0) return {kNan, kNan, kNan, true};
  Moments moments;
  moments.first = value(0);
  for (int64_t m = 0; m < count; ++m) {
    moments.mean_offset += value(m) - moments.first;
    moments.is_constant = moments.is_constant && value(m) == moments.first;
  }
  moments.mean_offset /= double(count);
  double squares = 0;
  for (int64_t m = 0; m < count; ++m) {
    const double deviation = value(m) - moments.first - moments.mean_offset;
    squares += deviation * deviation;
  }
  moments.std = std::sqrt(squares / double(count > correction ? count - correction : 1));
  return moments;
}

double clamp(double x, double bound) {
  // Comparisons, not std::clamp: a NaN stays a NaN.
  const double raised = x < -bound ? -bound : x;
  return raised > bound ? bound : raised;
}

}  // namespace

void group_advantage(const GroupAdvantageParams& params) {
  const std::vector<double> values = weigh(params);
  const int64_t num_columns = params.normalizes_each ? params.num_rewards : 1;
  std::vector<int64_t> starts;
  const std::vector<int64_t> order = sort_by_group(params, starts);
  std::vector<double> advantages(params.num_samples, kNan);
  for (const int64_t i : order) advantages[i] = 0;
  for (int64_t g = 0; g < params.num_groups; ++g) params.is_degenerate[g] = true;

  for (int64_t k = 0; k < num_columns; ++k) {
    const auto value = [&](int64_t i) { return values[i * num_columns + k]; };
    const double weight = params.normalizes_each && params.weights != nullptr ? params.weights[k] : 1;
    double global_std = 0;
    if (params.std == AdvantageStd::global) global_std = measure(value, params.num_samples, params.correction).std;
    for (int64_t g = 0; g < params.num_groups; ++g) {
      const int64_t* members = order.data() + starts[g];
      const int64_t count = starts[g + 1] - starts[g];
      const Moments moments = measure([&](int64_t m) { return value(members[m]); }, count, params.correction);
      params.group_mean[g * num_columns + k] = float(moments.first + moments.mean_offset);
      params.group_std[g * num_columns + k] = float(moments.std);
      params.is_degenerate[g] = params.is_degenerate[g] && moments.is_constant;
      const double std = params.std == AdvantageStd::global ? global_std : moments.std;
      const double divisor = params.std == AdvantageStd::none ? 1 : std + params.epsilon;
      for (int64_t m = 0; m < count; ++m) {
        advantages[members[m]] += weight * ((value(members[m]) - moments.first - moments.mean_offset) / divisor);
      }
    }
  }
  for (int64_t i = 0; i < params.num_samples; ++i) params.advantage[i] = float(clamp(advantages[i], params.clamp));
}

}  // namespace realign

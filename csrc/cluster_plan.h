// How a launch is laid out on thread-block clusters. Plain C++; none of this changes a result's bits.
#pragma once

#include <algorithm>
#include <cstdint>

namespace realign {

// What a GPU has.
struct ClusterLimits {
  int num_processors;
  int max_cluster_size;  // 8 on every chip with clusters; 16 where its groups of processors are large enough
  int64_t max_shared_bytes;
};

// What the largest sample needs, and how many samples there are.
struct ClusterDemand {
  int num_samples;
  int64_t slice_units;  // in the largest sample's longest slice
  int num_slices;       // of a sample
  int64_t unit_bytes;
  int64_t fixed_bytes;  // of a block
};

struct ClusterPlan {
  int cluster_size;
  int64_t kept_units;  // that a block has room for
  int64_t shared_bytes;
};

inline ClusterPlan plan_clusters(const ClusterDemand& demand, const ClusterLimits& limits, int cluster_size) {
  const int64_t room = limits.max_shared_bytes - demand.fixed_bytes;
  const int64_t units = demand.slice_units * (demand.num_slices / cluster_size);
  const int64_t kept_units = std::max<int64_t>(0, std::min(units, room / demand.unit_bytes));
  return {cluster_size, kept_units, demand.fixed_bytes + kept_units * demand.unit_bytes};
}

// The smallest cluster of which two blocks fit on a processor, so that one loads while the other waits, and that gives
// every processor two blocks; the largest where there is none.
inline ClusterPlan choose_clusters(const ClusterDemand& demand, const ClusterLimits& limits) {
  constexpr int64_t kReservedBytes = 1024;  // of each block, by the system
  const int64_t shared_of_two = (limits.max_shared_bytes + kReservedBytes) / 2 - kReservedBytes;
  int size = 1;
  for (; size < limits.max_cluster_size; size *= 2) {
    const bool fits = demand.fixed_bytes + demand.slice_units * (demand.num_slices / size) * demand.unit_bytes <= shared_of_two;
    const bool fills = int64_t(demand.num_samples) * size >= 2 * limits.num_processors;
    if (fits && fills) break;
  }
  return plan_clusters(demand, limits, size);
}

}  // namespace realign

// Sums over what a cluster of thread blocks holds, in an order that does not depend on the size of the cluster.
//
// The work is cut into kSlices slices; a block has one or several. Of a slice, each thread adds up its own numbers;
// the threads of a lane are added, then the lanes, then the slices. What all threads do between two barriers is a
// phase, a function of the thread. Phases are written for a `Machine`: a GPU, or an emulation of one in tests. It has
//   num_ranks()      blocks of the cluster: 1, 2, 4, 8 or 16
//   for_threads(f)   f(block, thread) in every thread; block.rank(), block.shared(), block.shared_of(rank)
//   sync_block(), sync_cluster()
//   announce(), await_others()   before a block first writes to another's memory, which must have begun: said early,
//                                waited for late, the first time only
#pragma once

#include "units.h"

namespace realign {

constexpr int kThreads = 256;  // of a block
constexpr int kLanes = 32;
constexpr int kSlices = 16;    // one a block in the largest cluster
constexpr int kMaxSums = 3;

// In a block's shared memory.
struct ClusterSums {
  float threads[2][kThreads];          // of one slice: up to two sums at a time
  float lanes[2][kLanes];
  float slices[kMaxSums][kSlices];     // of all slices, wherever they were summed
};

// Phase, after each thread has put its sums into `threads`.
REALIGN_DEVICE void sum_lanes(ClusterSums& sums, int count, int thread) {
  if (thread >= count * kLanes) return;
  const int which = thread / kLanes, lane = thread % kLanes;
  float sum = 0;
  REALIGN_UNROLL
  for (int i = lane; i < kThreads; i += kLanes) sum += sums.threads[which][i];
  sums.lanes[which][lane] = sum;
}

// Phase, after sum_lanes: tells blocks 0 to num_targets - 1 the sums of a slice, from number `first` on.
template <typename Block>
REALIGN_DEVICE void share_slice(const Block& block, int slice, int first, int count, int num_targets, int thread) {
  if (thread >= num_targets) return;
  for (int which = 0; which < count; ++which) {
    float sum = 0;
    REALIGN_UNROLL
    for (int i = 0; i < kLanes; ++i) sum += block.shared().sums.lanes[which][i];
    block.shared_of(thread).sums.slices[first + which][slice] = sum;
  }
}

// Adds up what the threads have of slice `local` of each block, and tells the first `num_targets` blocks.
template <typename Machine>
REALIGN_DEVICE void share_sums(Machine& machine, int local, int first, int count, int num_targets) {
  using Block = typename Machine::Block;
  const int num_local = kSlices / machine.num_ranks();
  machine.sync_block();
  machine.for_threads([=](const Block& block, int thread) { sum_lanes(block.shared().sums, count, thread); });
  machine.sync_block();
  machine.await_others();
  machine.for_threads([=](const Block& block, int thread) {
    share_slice(block, block.rank() * num_local + local, first, count, num_targets, thread);
  });
}

// The sum of all slices, after the barrier of the cluster that follows the last share_sums.
REALIGN_DEVICE float sum_slices(const ClusterSums& sums, int which) {
  float sum = 0;
  REALIGN_UNROLL
  for (int i = 0; i < kSlices; ++i) sum += sums.slices[which][i];
  return sum;
}

}  // namespace realign

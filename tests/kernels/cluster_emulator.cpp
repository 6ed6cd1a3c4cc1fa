// Runs the phases of guided_flow_step_cluster.h on the CPU, in place of guided_flow_step.cu, behind the same binding.
//
// Phases wait in a list until a barrier of the cluster. Then each block does all of its own, one block after the other;
// within a block each thread does what stands before the next barrier of the block, one thread after the other. Blocks
// and threads come in an order that the caller chooses, so that a missing barrier shows as a difference.
#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "guided_flow_step_cluster.h"

namespace realign {
namespace {

constexpr int64_t kEmulatedSharedBytes = 232448;
constexpr int kEmulatedProcessors = 132;

// Shared memory of the blocks of a cluster, all bits set at first: floats are NaN, as in tests of fresh memory.
class Memory {
 public:
  Memory(int num_ranks, int64_t kept_units) : size_((sizeof(ClusterShared) + kept_units * 32) / sizeof(Vector)) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      blocks_.emplace_back(new Vector[size_]);
      std::memset(static_cast<void*>(blocks_.back().get()), 0xff, size_ * sizeof(Vector));
    }
  }
  ClusterShared& of(int rank) const { return *reinterpret_cast<ClusterShared*>(blocks_[rank].get()); }
  int num_ranks() const { return int(blocks_.size()); }

 private:
  size_t size_;
  std::vector<std::unique_ptr<Vector[]>> blocks_;
};

struct EmulatedBlock {
  const Memory* memory;
  int number;
  int rank() const { return number; }
  ClusterShared& shared() const { return memory->of(number); }
  ClusterShared& shared_of(int rank) const { return memory->of(rank); }
};

enum Order { kForward = 0, kBackward = 1, kShuffled = 2 };

// The Machine of cluster_sums.h.
class Emulator {
 public:
  using Block = EmulatedBlock;
  using Phase = std::function<void(const Block&, int)>;

  Emulator(const Memory& memory, Order order) : memory_(memory), order_(order), segments_(1) {}

  int num_ranks() const { return memory_.num_ranks(); }
  void for_threads(Phase phase) { segments_.back().push_back(std::move(phase)); }
  void sync_block() { segments_.emplace_back(); }
  void announce() {}
  void await_others() {}
  void sync_cluster() {
    for (int rank : put_in_order(num_ranks())) run_block({&memory_, rank});
    segments_.assign(1, {});
  }

 private:
  void run_block(const Block& block) {
    for (const std::vector<Phase>& segment : segments_) {
      for (int thread : put_in_order(kThreads)) {
        for (const Phase& phase : segment) phase(block, thread);
      }
    }
  }

  std::vector<int> put_in_order(int count) {
    std::vector<int> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    if (order_ == kBackward) std::reverse(numbers.begin(), numbers.end());
    if (order_ == kShuffled) std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  const Memory& memory_;
  Order order_;
  std::mt19937 random_;
  std::vector<std::vector<Phase>> segments_;  // between barriers of the block
};

template <Dtype kVelocity, bool kAligned>
void run(const ClusterStepParams& params, int cluster_size, Order order) {
  for (int index = 0; index < params.num_samples; ++index) {
    const Memory memory(cluster_size, params.kept_units);
    Emulator emulator(memory, order);
    run_cluster(emulator, ClusterStep<kVelocity, kAligned>(params, index));
    emulator.sync_cluster();
  }
}

template <bool kAligned>
void run(const ClusterStepParams& params, int cluster_size, Order order) {
  if (params.velocity_dtype == Dtype::float32) run<Dtype::float32, kAligned>(params, cluster_size, order);
  if (params.velocity_dtype == Dtype::bfloat16) run<Dtype::bfloat16, kAligned>(params, cluster_size, order);
  if (params.velocity_dtype == Dtype::float16) run<Dtype::float16, kAligned>(params, cluster_size, order);
}

}  // namespace
}  // namespace realign

// As the launcher of the GPU; `device` is the shared memory of a block where it is not 0, `stream` the Order.
extern "C" const char* realign_guided_flow_step_cuda(const realign::ClusterStepParams* given, int cluster_size,
                                                     uint64_t stream) {
  using namespace realign;
  ClusterStepParams params = *given;
  const int64_t shared_bytes = params.device == 0 ? kEmulatedSharedBytes : params.device;
  const ClusterLimits limits = {kEmulatedProcessors, 16, shared_bytes};
  const ClusterDemand demand = find_demand(params);
  const ClusterPlan plan =
      cluster_size == 0 ? choose_clusters(demand, limits) : plan_clusters(demand, limits, cluster_size);
  params.kept_units = int(plan.kept_units);
  const auto run_any = is_aligned(params) ? run<true> : run<false>;
  run_any(params, plan.cluster_size, Order(stream));
  return nullptr;
}

// The guided step on a GPU with thread-block clusters (compute capability 9.0): kernels and launcher.
#include "guided_flow_step_cluster.h"

#include <cooperative_groups.h>

#include <map>
#include <mutex>
#include <utility>

namespace realign {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

struct GpuBlock {
  ClusterShared* memory;
  REALIGN_DEVICE int rank() const { return int(cg::this_cluster().block_rank()); }
  REALIGN_DEVICE ClusterShared& shared() const { return *memory; }
  REALIGN_DEVICE ClusterShared& shared_of(int rank) const { return *cg::this_cluster().map_shared_rank(memory, rank); }
};

// The Machine of cluster_sums.h: this thread of this block.
struct Gpu {
  using Block = GpuBlock;
  Block block;
  bool has_awaited = false;

  REALIGN_DEVICE int num_ranks() const { return int(cg::this_cluster().num_blocks()); }
  REALIGN_DEVICE void sync_block() const { __syncthreads(); }
  REALIGN_DEVICE void sync_cluster() const { cg::this_cluster().sync(); }
  REALIGN_DEVICE void announce() const { cg::this_cluster().barrier_arrive(); }
  REALIGN_DEVICE void await_others() {
    if (!has_awaited) cg::this_cluster().barrier_wait();
    has_awaited = true;
  }
  template <typename Phase>
  REALIGN_DEVICE void for_threads(const Phase& phase) const {
    phase(block, int(threadIdx.x));
  }
};

#endif

template <Dtype kVelocity, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    guided_flow_step_kernel(const __grid_constant__ ClusterStepParams params) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char memory[];
  Gpu gpu = {{reinterpret_cast<ClusterShared*>(memory)}};
  const int index = int(blockIdx.x) / gpu.num_ranks();
  run_cluster(gpu, ClusterStep<kVelocity, kAligned>(params, index));
#endif
}

using Kernel = void (*)(ClusterStepParams);

template <bool kAligned>
Kernel choose_kernel(Dtype velocity) {
  if (velocity == Dtype::float32) return guided_flow_step_kernel<Dtype::float32, kAligned>;
  if (velocity == Dtype::bfloat16) return guided_flow_step_kernel<Dtype::bfloat16, kAligned>;
  return guided_flow_step_kernel<Dtype::float16, kAligned>;
}

// Makes a device the current one for as long as this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous_);
    if (error == cudaSuccess && previous_ != device) error = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (error == cudaSuccess) cudaSetDevice(previous_);
  }
  cudaError_t error;

 private:
  int previous_ = 0;
};

int read_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Lets the kernel use all that the device has, and says how much that is. Done once for each kernel and device.
ClusterLimits prepare(Kernel kernel, int device) {
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, ClusterLimits> prepared;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = prepared.find({kernel, device});
  if (found != prepared.end()) return found->second;

  const int max_shared = read_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kSlices);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = max_shared;
  int largest = 0;
  cudaOccupancyMaxPotentialClusterSize(&largest, kernel, &config);
  const int max_cluster = largest >= 16 ? 16 : 8;
  const ClusterLimits limits = {read_attribute(cudaDevAttrMultiProcessorCount, device), max_cluster, max_shared};
  return prepared[{kernel, device}] = limits;
}

const char* launch(Kernel kernel, const ClusterStepParams& params, const ClusterPlan& plan, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = plan.cluster_size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(params.num_samples * plan.cluster_size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace realign

extern "C" const char* realign_guided_flow_step_cuda(const realign::ClusterStepParams* given, int cluster_size,
                                                     uint64_t stream) {
  using namespace realign;
  if (given->num_samples == 0) return nullptr;
  const DeviceGuard guard(given->device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  if (read_attribute(cudaDevAttrComputeCapabilityMajor, given->device) < 9) {
    return "thread-block clusters need compute capability 9.0 or higher";
  }
  ClusterStepParams params = *given;
  const bool aligned = is_aligned(params);
  const Kernel kernel =
      aligned ? choose_kernel<true>(params.velocity_dtype) : choose_kernel<false>(params.velocity_dtype);
  const ClusterLimits limits = prepare(kernel, params.device);
  if (cluster_size > limits.max_cluster_size) return "this device has no clusters of that size";
  if (cluster_size != 0 && kSlices % cluster_size != 0) return "a cluster has 1, 2, 4, 8 or 16 blocks";
  const ClusterDemand demand = find_demand(params);
  const ClusterPlan plan =
      cluster_size == 0 ? choose_clusters(demand, limits) : plan_clusters(demand, limits, cluster_size);
  params.kept_units = int(plan.kept_units);
  return launch(kernel, params, plan, reinterpret_cast<cudaStream_t>(stream));
}

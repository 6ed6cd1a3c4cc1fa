// The Python module realign_kernels._C_cuda. No torch here: arrays come as addresses, checked by realign_kernels.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "cluster_sample.h"

namespace py = pybind11;

namespace {

using realign::ClusterStepParams;
using Params = py::class_<ClusterStepParams>;

// A member that holds an address, as a Python integer.
template <typename Member>
void def_address(Params& params, const char* name, Member member) {
  params.def_property(
      name, [member](const ClusterStepParams& self) { return reinterpret_cast<uintptr_t>(self.*member); },
      [member](ClusterStepParams& self, uintptr_t address) {
        self.*member = reinterpret_cast<std::decay_t<decltype(self.*member)>>(address);
      });
}

template <typename Member>
void def_dtype(Params& params, const char* name, Member member) {
  params.def_property(
      name, [member](const ClusterStepParams& self) { return int(self.*member); },
      [member](ClusterStepParams& self, int code) { self.*member = realign::Dtype(code); });
}

void guided_flow_step(const ClusterStepParams& params, int cluster_size, uint64_t stream) {
  const char* error = realign_guided_flow_step_cuda(&params, cluster_size, stream);
  if (error != nullptr) throw std::runtime_error(error);
}

// Blocks of a cluster, units that a block keeps, bytes of its shared memory: the launcher's choice on such a device.
std::tuple<int, int64_t, int64_t> plan(const ClusterStepParams& params, int num_processors, int max_cluster_size,
                                       int64_t max_shared_bytes) {
  const realign::ClusterLimits limits = {num_processors, max_cluster_size, max_shared_bytes};
  const realign::ClusterPlan plan = realign::choose_clusters(realign::find_demand(params), limits);
  return {plan.cluster_size, plan.kept_units, plan.shared_bytes};
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Compiled CUDA paths of realign_kernels.";
  Params params(m, "ClusterStepParams", py::module_local());  // tests load an emulation beside it
  params.def(py::init<>())
      .def_readwrite("num_samples", &ClusterStepParams::num_samples)
      .def_readwrite("num_channels", &ClusterStepParams::num_channels)
      .def_readwrite("max_tokens", &ClusterStepParams::max_tokens)
      .def_readwrite("device", &ClusterStepParams::device)
      .def_readwrite("common_renorm", &ClusterStepParams::common_renorm)
      .def_readwrite("reduce_sum", &ClusterStepParams::reduce_sum);
  def_dtype(params, "velocity_dtype", &ClusterStepParams::velocity_dtype);
  def_dtype(params, "sample_dtype", &ClusterStepParams::sample_dtype);
  def_address(params, "cu_seqlens", &ClusterStepParams::cu_seqlens);
  def_address(params, "cond", &ClusterStepParams::cond);
  def_address(params, "text_uncond", &ClusterStepParams::text_uncond);
  def_address(params, "image_uncond", &ClusterStepParams::image_uncond);
  def_address(params, "text_scale", &ClusterStepParams::text_scale);
  def_address(params, "image_scale", &ClusterStepParams::image_scale);
  def_address(params, "renorm", &ClusterStepParams::renorm);
  def_address(params, "renorm_min", &ClusterStepParams::renorm_min);
  def_address(params, "sample", &ClusterStepParams::sample);
  def_address(params, "a", &ClusterStepParams::a);
  def_address(params, "b", &ClusterStepParams::b);
  def_address(params, "std", &ClusterStepParams::std);
  def_address(params, "noise", &ClusterStepParams::noise);
  def_address(params, "noise_key", &ClusterStepParams::noise_key);
  def_address(params, "noise_step", &ClusterStepParams::noise_step);
  def_address(params, "out", &ClusterStepParams::out);
  def_address(params, "logprob_weight", &ClusterStepParams::logprob_weight);
  def_address(params, "logprob_constant", &ClusterStepParams::logprob_constant);
  def_address(params, "logprob", &ClusterStepParams::logprob);
  m.def("plan", &plan);
  m.def("guided_flow_step", &guided_flow_step, py::call_guard<py::gil_scoped_release>());
}

// The Python module realign_kernels._C. No torch here: arrays come as addresses, checked by realign_kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "group_advantage.h"
#include "guided_flow_step.h"

namespace py = pybind11;

namespace {

// A member that holds an address, as a Python integer.
template <typename Params, typename Member>
void def_address(py::class_<Params>& params, const char* name, Member member) {
  params.def_property(
      name, [member](const Params& self) { return reinterpret_cast<uintptr_t>(self.*member); },
      [member](Params& self, uintptr_t address) {
        self.*member = reinterpret_cast<std::decay_t<decltype(self.*member)>>(address);
      });
}

template <typename Member>
void def_dtype(py::class_<realign::FlowParams>& params, const char* name, Member member) {
  params.def_property(
      name, [member](const realign::FlowParams& self) { return int(self.*member); },
      [member](realign::FlowParams& self, int code) { self.*member = realign::Dtype(code); });
}

void bind_group_advantage(py::module_& m) {
  using realign::GroupAdvantageParams;
  py::class_<GroupAdvantageParams> params(m, "GroupAdvantageParams");
  params.def(py::init<>())
      .def_readwrite("num_samples", &GroupAdvantageParams::num_samples)
      .def_readwrite("num_rewards", &GroupAdvantageParams::num_rewards)
      .def_readwrite("num_groups", &GroupAdvantageParams::num_groups)
      .def_readwrite("normalizes_each", &GroupAdvantageParams::normalizes_each)
      .def_readwrite("epsilon", &GroupAdvantageParams::epsilon)
      .def_readwrite("clamp", &GroupAdvantageParams::clamp)
      .def_readwrite("correction", &GroupAdvantageParams::correction)
      .def_property(
          "std", [](const GroupAdvantageParams& self) { return int(self.std); },
          [](GroupAdvantageParams& self, int code) { self.std = realign::AdvantageStd(code); });
  def_address(params, "rewards", &GroupAdvantageParams::rewards);
  def_address(params, "weights", &GroupAdvantageParams::weights);
  def_address(params, "group", &GroupAdvantageParams::group);
  def_address(params, "advantage", &GroupAdvantageParams::advantage);
  def_address(params, "group_mean", &GroupAdvantageParams::group_mean);
  def_address(params, "group_std", &GroupAdvantageParams::group_std);
  def_address(params, "is_degenerate", &GroupAdvantageParams::is_degenerate);
  m.def("group_advantage", &realign::group_advantage, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU paths of realign_kernels.";
  using realign::FlowParams;
  py::class_<FlowParams> params(m, "FlowParams");
  params.def(py::init<>())
      .def_readwrite("num_tokens", &FlowParams::num_tokens)
      .def_readwrite("num_channels", &FlowParams::num_channels)
      .def_readwrite("num_samples", &FlowParams::num_samples)
      .def_readwrite("num_threads", &FlowParams::num_threads)
      .def_readwrite("renorm", &FlowParams::renorm);
  def_dtype(params, "velocity_dtype", &FlowParams::velocity_dtype);
  def_dtype(params, "sample_dtype", &FlowParams::sample_dtype);
  def_address(params, "cu_seqlens", &FlowParams::cu_seqlens);
  def_address(params, "out", &FlowParams::out);
  def_address(params, "cond", &FlowParams::cond);
  def_address(params, "text_uncond", &FlowParams::text_uncond);
  def_address(params, "image_uncond", &FlowParams::image_uncond);
  def_address(params, "text_scale", &FlowParams::text_scale);
  def_address(params, "image_scale", &FlowParams::image_scale);
  def_address(params, "renorm_min", &FlowParams::renorm_min);
  def_address(params, "sample", &FlowParams::sample);
  def_address(params, "noise", &FlowParams::noise);
  def_address(params, "a", &FlowParams::a);
  def_address(params, "b", &FlowParams::b);
  def_address(params, "std", &FlowParams::std);
  m.def("guided_flow_step", &realign::guided_flow_step, py::call_guard<py::gil_scoped_release>());
  bind_group_advantage(m);
}

// The Python module realign_kernels._C. No torch here: arrays come as addresses, checked by realign_kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "clip_preprocess.h"
#include "group_advantage.h"
#include "guided_flow_step.h"
#include "philox_normal.h"
#include "sde_logprob.h"

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

template <typename Params, typename Member>
void def_dtype(py::class_<Params>& params, const char* name, Member member) {
  params.def_property(
      name, [member](const Params& self) { return int(self.*member); },
      [member](Params& self, int code) { self.*member = realign::Dtype(code); });
}

// The counts that packed arrays share.
template <typename Params>
void def_counts(py::class_<Params>& params) {
  params.def(py::init<>())
      .def_readwrite("num_channels", &Params::num_channels)
      .def_readwrite("num_samples", &Params::num_samples)
      .def_readwrite("num_threads", &Params::num_threads);
  def_address(params, "cu_seqlens", &Params::cu_seqlens);
}

void bind_guided_flow_step(py::module_& m) {
  using realign::FlowParams;
  py::class_<FlowParams> params(m, "FlowParams");
  def_counts(params);
  params.def_readwrite("reduce_sum", &FlowParams::reduce_sum)
      .def_readwrite("common_renorm", &FlowParams::common_renorm);
  def_dtype(params, "velocity_dtype", &FlowParams::velocity_dtype);
  def_dtype(params, "sample_dtype", &FlowParams::sample_dtype);
  def_dtype(params, "out_dtype", &FlowParams::out_dtype);
  def_address(params, "out", &FlowParams::out);
  def_address(params, "cond", &FlowParams::cond);
  def_address(params, "text_uncond", &FlowParams::text_uncond);
  def_address(params, "image_uncond", &FlowParams::image_uncond);
  def_address(params, "text_scale", &FlowParams::text_scale);
  def_address(params, "image_scale", &FlowParams::image_scale);
  def_address(params, "renorm", &FlowParams::renorm);
  def_address(params, "renorm_min", &FlowParams::renorm_min);
  def_address(params, "sample", &FlowParams::sample);
  def_address(params, "a", &FlowParams::a);
  def_address(params, "b", &FlowParams::b);
  def_address(params, "std", &FlowParams::std);
  def_address(params, "noise", &FlowParams::noise);
  def_address(params, "noise_key", &FlowParams::noise_key);
  def_address(params, "noise_step", &FlowParams::noise_step);
  def_address(params, "logprob_weight", &FlowParams::logprob_weight);
  def_address(params, "logprob_constant", &FlowParams::logprob_constant);
  def_address(params, "logprob", &FlowParams::logprob);
  m.def("guided_flow_step", &realign::guided_flow_step, py::call_guard<py::gil_scoped_release>());
}

void bind_sde_logprob(py::module_& m) {
  using realign::LogProbParams;
  py::class_<LogProbParams> params(m, "LogProbParams");
  def_counts(params);
  params.def_readwrite("reduce_sum", &LogProbParams::reduce_sum);
  def_dtype(params, "sample_dtype", &LogProbParams::sample_dtype);
  def_dtype(params, "velocity_dtype", &LogProbParams::velocity_dtype);
  def_dtype(params, "old_velocity_dtype", &LogProbParams::old_velocity_dtype);
  def_address(params, "sample", &LogProbParams::sample);
  def_address(params, "velocity", &LogProbParams::velocity);
  def_address(params, "next_sample", &LogProbParams::next_sample);
  def_address(params, "a", &LogProbParams::a);
  def_address(params, "b", &LogProbParams::b);
  def_address(params, "weight", &LogProbParams::weight);
  def_address(params, "constant", &LogProbParams::constant);
  def_address(params, "logprob", &LogProbParams::logprob);
  def_address(params, "old_velocity", &LogProbParams::old_velocity);
  def_address(params, "bias_weight", &LogProbParams::bias_weight);
  def_address(params, "bias", &LogProbParams::bias);
  m.def("sde_logprob", &realign::sde_logprob, py::call_guard<py::gil_scoped_release>());
}

void bind_philox_normal(py::module_& m) {
  using realign::NormalParams;
  py::class_<NormalParams> params(m, "NormalParams");
  def_counts(params);
  def_address(params, "key", &NormalParams::key);
  def_address(params, "step", &NormalParams::step);
  def_address(params, "out", &NormalParams::out);
  m.def("philox_normal", &realign::philox_normal, py::call_guard<py::gil_scoped_release>());
}

void bind_group_advantage(py::module_& m) {
void bind_clip_preprocess(py::module_& m) {
  using realign::ClipPreprocessParams;
  py::class_<ClipPreprocessParams> params(m, "ClipPreprocessParams");
  params.def(py::init<>())
      .def_readwrite("num_pictures", &ClipPreprocessParams::num_pictures)
      .def_readwrite("height", &ClipPreprocessParams::height)
      .def_readwrite("width", &ClipPreprocessParams::width)
      .def_readwrite("level_bytes", &ClipPreprocessParams::level_bytes)
      .def_readwrite("num_threads", &ClipPreprocessParams::num_threads)
      .def_readwrite("fill", &ClipPreprocessParams::fill)
      .def_property(
          "type", [](const ClipPreprocessParams& self) { return int(self.type); },
          [](ClipPreprocessParams& self, int code) { self.type = realign::PictureType(code); });
  def_address(params, "pictures", &ClipPreprocessParams::pictures);
  def_address(params, "levels", &ClipPreprocessParams::levels);
  def_address(params, "out", &ClipPreprocessParams::out);
  m.def("clip_preprocess", &realign::clip_preprocess, py::call_guard<py::gil_scoped_release>());
}

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
  bind_guided_flow_step(m);
  bind_sde_logprob(m);
  bind_philox_normal(m);
  bind_group_advantage(m);
}
  bind_clip_preprocess(m);

// The Python module realign_kernels._C. No torch here: arrays come as addresses, or as objects that tell theirs, and were
// checked by realign_kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "clip_preprocess.h"
#include "flow_bindings.h"
#include "group_advantage.h"
#include "numbers.h"
#include "model_bindings.h"

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
  realign::bind_flow_ops(m);
  bind_clip_preprocess(m);
  bind_group_advantage(m);
  realign::bind_model_ops(m);
}

#include "flow_bindings.h"

#include "argument_reader.h"
#include "guided_flow_step.h"
#include "philox_normal.h"
#include "sde_logprob.h"

namespace realign {
namespace {

void bind_guided_flow_step(py::module_& m) {
  ArgumentReader<FlowParams> reader;
  reader.add("num_channels", &FlowParams::num_channels)
      .add("num_samples", &FlowParams::num_samples)
      .add("num_threads", &FlowParams::num_threads)
      .add("velocity_dtype", &FlowParams::velocity_dtype)
      .add("sample_dtype", &FlowParams::sample_dtype)
      .add("out_dtype", &FlowParams::out_dtype)
      .add("cu_seqlens", &FlowParams::cu_seqlens)
      .add("out", &FlowParams::out)
      .add("cond", &FlowParams::cond)
      .add("text_uncond", &FlowParams::text_uncond)
      .add("image_uncond", &FlowParams::image_uncond)
      .add("text_scale", &FlowParams::text_scale)
      .add("image_scale", &FlowParams::image_scale)
      .add("renorm", &FlowParams::renorm)
      .add("common_renorm", &FlowParams::common_renorm)
      .add("renorm_min", &FlowParams::renorm_min)
      .add("sample", &FlowParams::sample)
      .add("a", &FlowParams::a)
      .add("b", &FlowParams::b)
      .add("std", &FlowParams::std)
      .add("noise", &FlowParams::noise)
      .add("noise_key", &FlowParams::noise_key)
      .add("noise_step", &FlowParams::noise_step)
      .add("logprob_weight", &FlowParams::logprob_weight)
      .add("logprob_constant", &FlowParams::logprob_constant)
      .add("logprob", &FlowParams::logprob)
      .add("reduce_sum", &FlowParams::reduce_sum);
  m.def("guided_flow_step",
        [reader](const py::dict& arguments) { reader.run(&guided_flow_step, arguments); });
}

void bind_sde_logprob(py::module_& m) {
  ArgumentReader<LogProbParams> reader;
  reader.add("num_channels", &LogProbParams::num_channels)
      .add("num_samples", &LogProbParams::num_samples)
      .add("num_threads", &LogProbParams::num_threads)
      .add("sample_dtype", &LogProbParams::sample_dtype)
      .add("velocity_dtype", &LogProbParams::velocity_dtype)
      .add("old_velocity_dtype", &LogProbParams::old_velocity_dtype)
      .add("reduce_sum", &LogProbParams::reduce_sum)
      .add("cu_seqlens", &LogProbParams::cu_seqlens)
      .add("sample", &LogProbParams::sample)
      .add("velocity", &LogProbParams::velocity)
      .add("next_sample", &LogProbParams::next_sample)
      .add("a", &LogProbParams::a)
      .add("b", &LogProbParams::b)
      .add("weight", &LogProbParams::weight)
      .add("constant", &LogProbParams::constant)
      .add("logprob", &LogProbParams::logprob)
      .add("old_velocity", &LogProbParams::old_velocity)
      .add("bias_weight", &LogProbParams::bias_weight)
      .add("bias", &LogProbParams::bias);
  m.def("sde_logprob", [reader](const py::dict& arguments) { reader.run(&sde_logprob, arguments); });
}

void bind_philox_normal(py::module_& m) {
  ArgumentReader<NormalParams> reader;
  reader.add("num_channels", &NormalParams::num_channels)
      .add("num_samples", &NormalParams::num_samples)
      .add("num_threads", &NormalParams::num_threads)
      .add("cu_seqlens", &NormalParams::cu_seqlens)
      .add("key", &NormalParams::key)
      .add("step", &NormalParams::step)
      .add("out", &NormalParams::out);
  m.def("philox_normal", [reader](const py::dict& arguments) { reader.run(&philox_normal, arguments); });
}

}  // namespace

void bind_flow_ops(py::module_& m) {
  bind_guided_flow_step(m);
  bind_sde_logprob(m);
  bind_philox_normal(m);
}

}  // namespace realign

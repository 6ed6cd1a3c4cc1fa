#include "model_bindings.h"

#include "argument_reader.h"
#include "decode_attention.h"
#include "merge_attention.h"
#include "mot_norm.h"
#include "mot_rope.h"
#include "swiglu.h"

namespace realign {
namespace {

void bind_decode_attention(py::module_& m) {
  using Params = DecodeAttentionParams;
  ArgumentReader<Params> reader;
  reader.add("query_shape", &Params::query_shape)
      .add("query_stride", &Params::query_stride)
      .add("key_shape", &Params::key_shape)
      .add("key_stride", &Params::key_stride)
      .add("value_stride", &Params::value_stride)
      .add("num_threads", &Params::num_threads)
      .add("has_long_lengths", &Params::has_long_lengths)
      .add("dtype", &Params::dtype)
      .add_strided("query", &Params::query)
      .add_strided("key", &Params::key)
      .add_strided("value", &Params::value)
      .add("length", &Params::length)
      .add("out", &Params::out)
      .add("lse", &Params::lse);
  m.def("decode_attention", [reader](const py::dict& arguments) { reader.run(&decode_attention, arguments); });
}

void bind_merge_attention(py::module_& m) {
  using Params = MergeAttentionParams;
  ArgumentReader<Params> reader;
  reader.add("shape", &Params::shape)
      .add("out_a_stride", &Params::out_a_stride)
      .add("out_b_stride", &Params::out_b_stride)
      .add("lse_a_stride", &Params::lse_a_stride)
      .add("lse_b_stride", &Params::lse_b_stride)
      .add("num_threads", &Params::num_threads)
      .add("dtype", &Params::dtype)
      .add_strided("out_a", &Params::out_a)
      .add_strided("out_b", &Params::out_b)
      .add_strided("lse_a", &Params::lse_a)
      .add_strided("lse_b", &Params::lse_b)
      .add("out", &Params::out)
      .add("lse", &Params::lse);
  m.def("merge_attention", [reader](const py::dict& arguments) { reader.run(&merge_attention, arguments); });
}

void bind_mot_norm(py::module_& m) {
  ArgumentReader<MotNormParams> reader;
  reader.add("num_rows", &MotNormParams::num_rows)
      .add("width", &MotNormParams::width)
      .add("num_threads", &MotNormParams::num_threads)
      .add("eps", &MotNormParams::eps)
      .add("dtype", &MotNormParams::dtype)
      .add("hidden_dtype", &MotNormParams::hidden_dtype)
      .add("residual_dtype", &MotNormParams::residual_dtype)
      .add("und", &MotNormParams::und)
      .add("gen", &MotNormParams::gen)
      .add("expert", &MotNormParams::expert)
      .add("hidden", &MotNormParams::hidden)
      .add("residual", &MotNormParams::residual)
      .add("normed", &MotNormParams::normed)
      .add("total", &MotNormParams::total)
      .add("scale", &MotNormParams::scale)
      .add("x", &MotNormParams::x)
      .add("grad_normed", &MotNormParams::grad_normed)
      .add("grad_total", &MotNormParams::grad_total)
      .add("grad_x", &MotNormParams::grad_x)
      .add("grad_weights", &MotNormParams::grad_weights);
  m.def("mot_norm", [reader](const py::dict& arguments) { reader.run(&mot_norm, arguments); });
  m.def("mot_norm_backward", [reader](const py::dict& arguments) { reader.run(&mot_norm_backward, arguments); });
}

void bind_mot_rope(py::module_& m) {
  ArgumentReader<MotRopeParams> reader;
  reader.add("num_tokens", &MotRopeParams::num_tokens)
      .add("dim", &MotRopeParams::dim)
      .add("num_query_heads", &MotRopeParams::num_query_heads)
      .add("num_key_heads", &MotRopeParams::num_key_heads)
      .add("num_threads", &MotRopeParams::num_threads)
      .add("eps", &MotRopeParams::eps)
      .add("dtype", &MotRopeParams::dtype)
      .add("query_stride", &MotRopeParams::query_stride)
      .add("key_stride", &MotRopeParams::key_stride)
      .add_strided("query", &MotRopeParams::query)
      .add_strided("key", &MotRopeParams::key)
      .add("cos", &MotRopeParams::cos)
      .add("sin", &MotRopeParams::sin)
      .add("und_query", &MotRopeParams::und_query)
      .add("gen_query", &MotRopeParams::gen_query)
      .add("und_key", &MotRopeParams::und_key)
      .add("gen_key", &MotRopeParams::gen_key)
      .add("expert", &MotRopeParams::expert)
      .add("index", &MotRopeParams::index)
      .add("slot", &MotRopeParams::slot)
      .add("query_out", &MotRopeParams::query_out)
      .add_strided("key_out", &MotRopeParams::key_out)
      .add("key_out_stride", &MotRopeParams::key_out_stride)
      .add("key_out_head_stride", &MotRopeParams::key_out_head_stride)
      .add("grad_query", &MotRopeParams::grad_query)
      .add("grad_key", &MotRopeParams::grad_key)
      .add("grad_weights", &MotRopeParams::grad_weights);
  m.def("mot_rope", [reader](const py::dict& arguments) { reader.run(&mot_rope, arguments); });
  m.def("mot_rope_backward", [reader](const py::dict& arguments) { reader.run(&mot_rope_backward, arguments); });
}

void bind_swiglu(py::module_& m) {
  ArgumentReader<SwigluParams> reader;
  reader.add("num_rows", &SwigluParams::num_rows)
      .add("width", &SwigluParams::width)
      .add("gate_stride", &SwigluParams::gate_stride)
      .add("up_stride", &SwigluParams::up_stride)
      .add("num_threads", &SwigluParams::num_threads)
      .add("dtype", &SwigluParams::dtype)
      .add_strided("gate", &SwigluParams::gate)
      .add_strided("up", &SwigluParams::up)
      .add("out", &SwigluParams::out)
      .add("grad", &SwigluParams::grad)
      .add("grad_gate", &SwigluParams::grad_gate)
      .add("grad_up", &SwigluParams::grad_up);
  m.def("swiglu", [reader](const py::dict& arguments) { reader.run(&swiglu, arguments); });
  m.def("swiglu_backward", [reader](const py::dict& arguments) { reader.run(&swiglu_backward, arguments); });
}

}  // namespace

void bind_model_ops(py::module_& m) {
  bind_decode_attention(m);
  bind_merge_attention(m);
  bind_mot_norm(m);
  bind_mot_rope(m);
  bind_swiglu(m);
}

}  // namespace realign

// The ops of the model, as functions of a dict of arguments.
#pragma once

#include <pybind11/pybind11.h>

namespace realign {

void bind_model_ops(pybind11::module_& m);

}  // namespace realign

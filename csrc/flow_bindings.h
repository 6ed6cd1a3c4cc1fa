// The ops on packed samples, as functions of a dict of arguments.
#pragma once

#include <pybind11/pybind11.h>

namespace realign {

void bind_flow_ops(pybind11::module_& m);

}  // namespace realign

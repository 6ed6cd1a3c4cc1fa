// Fills the parameters of an op from a dict of Python arguments: what is a tensor there is an address here.
//
// Done in Python, one attribute at a time, this takes longer than a small sampler step.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "numbers.h"

namespace realign {

namespace py = pybind11;

template <typename Params>
class ArgumentReader {
 public:
  // A number, a bool or a dtype's code.
  template <typename Number>
  ArgumentReader& add(const char* name, Number Params::*member) {
    setters_[intern(name)] = [member](Params& params, py::handle argument, Tensors&) {
      if constexpr (std::is_enum_v<Number>) {
        params.*member = Number(py::cast<int>(argument));
      } else {
        params.*member = py::cast<Number>(argument);
      }
    };
    return *this;
  }

  // A tensor: anything with the methods `contiguous` and `data_ptr`.
  template <typename Number>
  ArgumentReader& add(const char* name, Number* Params::*member) {
    setters_[intern(name)] = [member](Params& params, py::handle argument, Tensors& tensors) {
      static PyObject* const contiguous = intern("contiguous");
      tensors.push_back(call(argument, contiguous));
      params.*member = address_of<Number>(tensors.back());
    };
    return *this;
  }

  // So many whole numbers: a tensor's shape or strides.
  template <size_t kCount>
  ArgumentReader& add(const char* name, std::array<int64_t, kCount> Params::*member) {
    setters_[intern(name)] = [member](Params& params, py::handle argument, Tensors&) {
      const auto numbers = py::reinterpret_borrow<py::tuple>(argument);
      if (numbers.size() != kCount) throw py::type_error("not so many numbers");
      for (size_t i = 0; i < kCount; ++i) (params.*member)[i] = PyLong_AsLongLong(numbers[i].ptr());
    };
    return *this;
  }

  // A tensor that is taken as it lies: its strides are parameters too.
  template <typename Number>
  ArgumentReader& add_strided(const char* name, Number* Params::*member) {
    setters_[intern(name)] = [member](Params& params, py::handle argument, Tensors&) {
      params.*member = address_of<Number>(argument);
    };
    return *this;
  }

  // Runs an op without Python's lock. An argument that is None, or is not there, leaves its parameter as it was.
  void run(void (*op)(const Params&), const py::dict& arguments) const {
    Params params;
    Tensors tensors;  // keeps alive what was made contiguous
    for (const auto& [name, argument] : arguments) {
      if (argument.is_none()) continue;
      const auto setter = setters_.find(intern(name));
      if (setter == setters_.end()) throw py::type_error("no parameter " + py::cast<std::string>(name));
      setter->second(params, argument, tensors);
    }
    py::gil_scoped_release release;
    op(params);
  }

 private:
  using Tensors = std::vector<py::object>;

  // Python keeps one object for each name: its address is the name. They are kept for good.
  static PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }
  static PyObject* intern(py::handle name) {
    PyObject* unique = name.inc_ref().ptr();
    PyUnicode_InternInPlace(&unique);
    Py_DECREF(unique);
    return unique;
  }

  template <typename Number>
  static Number* address_of(py::handle tensor) {
    static PyObject* const data_ptr = intern("data_ptr");
    return reinterpret_cast<Number*>(PyLong_AsVoidPtr(call(tensor, data_ptr).ptr()));
  }

  static py::object call(py::handle object, PyObject* method) {
    PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), method);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  std::unordered_map<PyObject*, std::function<void(Params&, py::handle, Tensors&)>> setters_;
};

}  // namespace realign

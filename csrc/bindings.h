// Tensors and specs read through their Python attributes, so no torch header is needed; both bindings include this.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "attention.h"

namespace llmfast {

namespace py = pybind11;

struct Names {  // interned attribute names and torch's dtype objects, kept for the life of the process
  PyObject *data_ptr, *shape, *stride, *dtype;
  PyObject* dtypes[7];
};

inline const Names& names() {
  static const Names n = [] {
    Names n;
    n.data_ptr = PyUnicode_InternFromString("data_ptr");
    n.shape = PyUnicode_InternFromString("shape");
    n.stride = PyUnicode_InternFromString("stride");
    n.dtype = PyUnicode_InternFromString("dtype");
    py::module_ torch = py::module_::import("torch");
    const char* dtypes[] = {"float32", "bfloat16", "float16", "float64", "bool", "int32", "int64"};
    for (int i = 0; i < 7; i++) n.dtypes[i] = py::object(torch.attr(dtypes[i])).release().ptr();
    return n;
  }();
  return n;
}

inline py::object owned(PyObject* p) {
  if (!p) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(p);
}

inline Tensor view(py::handle t) {
  Tensor v;
  if (t.is_none()) return v;
  const Names& n = names();
  v.data = static_cast<char*>(PyLong_AsVoidPtr(owned(PyObject_CallMethodNoArgs(t.ptr(), n.data_ptr)).ptr()));
  static char empty[64];
  if (!v.data) v.data = empty;  // an empty tensor is present
  py::object shape = owned(PyObject_GetAttr(t.ptr(), n.shape)),
             stride = owned(PyObject_CallMethodNoArgs(t.ptr(), n.stride));
  v.dim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  if (v.dim > 4) throw std::invalid_argument("a tensor has more than 4 dimensions");
  for (int i = 0; i < v.dim; i++) {
    v.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    v.stride[i] = v.size[i] == 1 ? 0 : PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
  }
  py::object dtype = owned(PyObject_GetAttr(t.ptr(), n.dtype));
  for (int i = 0; i < 7; i++)
    if (dtype.ptr() == n.dtypes[i]) {
      v.dtype = static_cast<Dtype>(i);
      return v;
    }
  throw std::invalid_argument("a tensor has a dtype that the kernels do not know");
}

inline AttentionSpec attention_spec(const py::tuple& s) {
  return {s[0].cast<double>(), s[1].cast<int64_t>(), s[2].cast<int64_t>(), s[3].cast<double>(), s[4].cast<double>()};
}

inline Extras extras(const py::tuple& e) {
  return {view(e[0]), view(e[1]), view(e[2]), view(e[3]), view(e[4]), view(e[5]), view(e[6]), view(e[7]), view(e[8])};
}

}  // namespace llmfast
